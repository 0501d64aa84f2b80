"""`CostModel`: what a convolution and a conversion cost here, from the table where it was measured and from the
policy where not; and what is missing, as jobs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlayout.convs.candidates import Candidate, candidates
from jaxlayout.convs.signature import Context, ConvSignature
from jaxlayout.graph.build import LayoutGraph, Mode, Node, Work
from jaxlayout.graph.plan import Plan
from jaxlayout.layout import LayoutPolicy, Order, conversion
from jaxlayout.layout.order import permuted
from jaxlayout.measure.compiled import CompilerOptions
from jaxlayout.measure.environment import current_environment
from jaxlayout.measure.jobs import Job, candidate_id, coalesced, conv_job, transpose_job, transpose_key
from jaxlayout.measure.peaks import KEY, Peaks
from jaxlayout.measure.trials import available_memory
from jaxlayout.table.measurement import Measurement
from jaxlayout.table.table import CostTable
from jaxlayout.tuning.options import Options
from jaxlayout.tuning.stores import open_table
from jaxlayout.tuning.work import mode_id, work_job


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs in nanoseconds, in one environment and context."""

    table: CostTable
    environment: str
    policy: LayoutPolicy
    context: Context = "entry"
    forbidden: frozenset[tuple[str, str]] = frozenset()
    """Lowerings (signature key, name) ruled out for this program: because of their memory, say."""
    byte_ns: float = 0.0
    """Charged for each byte of temporary memory and of converted copies: they take room, and a copy is in the way of
    what would have fused."""
    room: int | None = 0
    """Bytes that a candidate may take here; None: any. One that did not fit elsewhere, or before, is not known where it
    would fit."""
    most: Mapping[str, float] = field(default_factory=dict)
    """Bytes of temporary memory that a convolution may take, by signature key, where not just any."""
    _known: dict[str, dict[str, Measurement]] = field(default_factory=dict)
    """What has been read from the table, by signature key. Models made of one another by `replace` have one: what one
    records the others know."""

    def known(self, key: str) -> dict[str, Measurement]:
        """The measurements of a signature or transpose, by candidate id."""
        if key not in self._known:
            self._known[key] = self._stored(key)
        return self._known[key]

    def _stored(self, key: str) -> dict[str, Measurement]:
        found = self.table.measurements(self.environment, key)
        return {name: one for name, one in found.items() if one.status != "memory" or not self._fits(one)}

    def _fits(self, found: Measurement) -> bool:
        return self.room is None or (found.temp_bytes or 0) <= self.room

    def record(self, key: str, found: dict[str, Measurement]) -> None:
        """Keep what was measured."""
        self.table.record_many(self.environment, key, found)
        self._known[key] = self.known(key) | found

    def peaks(self, device: Any, compiler_options: CompilerOptions) -> Peaks:
        """The machine's, as far as the table knows them, to be looked at again."""
        return Peaks(device, compiler_options, self.known(KEY), partial(self.record, KEY))

    def candidates(self, conv: ConvSignature, written: Candidate, *, relaxed: bool) -> tuple[Candidate, ...]:
        """All that is worth timing here for a convolution, the form written first."""
        preferred = self.policy.preferred(conv.rank, conv.lhs_dtype)
        return candidates(conv, written, relaxed=relaxed, preferred=preferred)

    def learned(self, job: Job) -> bool:
        """Whether the table knows all of a job by now: another process may have measured it meanwhile."""
        self._known[job.key] = self._stored(job.key)
        return job.alternatives.keys() <= self._known[job.key].keys()

    def measurement(self, conv: ConvSignature, candidate: Candidate) -> Measurement | None:
        """What was measured of a candidate, if anything."""
        return self.known(conv.key).get(candidate_id(candidate))

    def site_ns(self, conv: ConvSignature, candidate: Candidate) -> float:
        """The cost of a candidate. inf: measured to fail, ruled out, or not measured where others were."""
        if (conv.key, candidate.lowering) in self.forbidden:
            return np.inf
        if (found := self.measurement(conv, candidate)) is not None:
            usable = found.status in ("ok", "slow") and (found.temp_bytes or 0) <= self.most.get(conv.key, np.inf)
            return float(found.median_ns or 0.0) if usable else np.inf
        return np.inf if self.known(conv.key) else self.prior_ns(conv, candidate)

    def node_ns(self, node: Node, mode: Mode) -> float:
        """`site_ns` of a graph's convolution. What is not as the user wrote it must be faster by more than the
        noise of its measurement. The form written is always allowed, since it is what runs without us; it costs
        much where it was measured to fail."""
        if node.work is not None:
            cost = self.work_ns(node.work, mode)
            return cost if np.isfinite(cost) or mode != node.modes[0] else 0.0
        if node.conv is None or mode.candidate is None:
            return 0.0
        cost = self.site_ns(node.conv, mode.candidate)
        if mode != node.modes[0]:
            found = self.measurement(node.conv, mode.candidate)
            spread, temp = (found.spread_ns, found.temp_bytes) if found is not None else (0.0, 0)
            return cost + (spread or 0.0) + self.byte_ns * (temp or 0)
        return cost if np.isfinite(cost) else 1000 * self.prior_ns(node.conv, mode.candidate)

    def work_ns(self, work: Work, mode: Mode) -> float:
        """The cost of another equation in an order; nothing where it is not measured."""
        known = self.known(work.key)
        found = known.get(mode_id(mode))
        if found is not None and found.median_ns is not None:
            return found.median_ns
        return np.inf if known else 0.0

    def prior_ns(self, conv: ConvSignature, candidate: Candidate) -> float:
        """What the policy believes."""
        return self.policy.conv_ns(
            conv.kind, candidate.lowering, candidate.dims, conv.macs, conv.nbytes, conv.lhs_dtype
        )

    def conversion_ns(self, shape: Sequence[int], dtype: Any, held: Order, wanted: Order) -> float:
        """The cost of one transpose of a value of logical `shape`; where it is not measured, less than it can
        be, so that a plan whose own conversions are all measured is the best one whatever the others cost."""
        _, _, found = self._transpose(shape, dtype, held, wanted)
        nbytes = math.prod(shape) * getattr(dtype, "itemsize", 8)
        if found is not None and found.median_ns is not None:
            return found.median_ns + (found.spread_ns or 0.0) + self.byte_ns * nbytes
        return self.policy.conversion_ns(nbytes) + self.byte_ns * nbytes

    def conversion_measurement(
        self, shape: Sequence[int], dtype: Any, held: Order, wanted: Order
    ) -> Measurement | None:
        """What was measured of one transpose, if anything."""
        return self._transpose(shape, dtype, held, wanted)[2]

    def _transpose(
        self, shape: Sequence[int], dtype: Any, held: Order, wanted: Order
    ) -> tuple[tuple[int, ...], Order, Measurement | None]:
        sizes, permutation = coalesced(permuted(shape, held), conversion(held, wanted))
        key = transpose_key(sizes, dtype, permutation, self.context)
        return sizes, permutation, self.known(key).get("transpose")

    def missing_convolutions(self, graph: LayoutGraph) -> list[Job]:
        """The jobs that would tell all that a graph's solver may ask of its convolutions, each once."""
        wanted: dict[ConvSignature, dict[Candidate, None]] = {}
        for node in graph.sites:
            if node.conv is not None:
                wanted.setdefault(node.conv, {}).update(dict.fromkeys(m.candidate for m in node.modes if m.candidate))
        jobs = []
        for conv, found in wanted.items():
            new = [c for c in found if self.measurement(conv, c) is None]
            if new:  # the written one is timed again beside them: only times of one run compare
                jobs.append(conv_job(conv, list(dict.fromkeys((next(iter(found)), *new)))))
        return jobs

    def missing_works(self, graph: LayoutGraph) -> list[Job]:
        """The jobs for the other equations whose order matters and is open, each once."""
        jobs = {}
        for node in graph.nodes:
            if node.work is None or len(node.modes) == 1:
                continue
            if not {mode_id(mode) for mode in node.modes} <= self.known(node.work.key).keys():
                jobs[node.work.key] = work_job(node.work, node.modes)
        return list(jobs.values())

    def missing_conversions(self, plan: Plan) -> list[Job]:
        """The jobs for the conversions that a plan has and that are believed, not measured."""
        jobs: dict[str, Job] = {}
        for c in plan.conversions:
            dtype = _numpy_dtype(c.dtype)
            if dtype is None or math.prod(c.shape) == 0:  # typed keys, empty arrays
                continue
            sizes, permutation, found = self._transpose(c.shape, dtype, c.held, c.wanted)
            if found is None:
                job = transpose_job(sizes, dtype, permutation, self.context)
                jobs[job.key] = job
        return list(jobs.values())


def cost_model(options: Options, device: Any, context: Context, compiler_options: CompilerOptions) -> CostModel:
    """The costs on a device under these options."""
    environment = current_environment(device, compiled_with(compiler_options)).fingerprint
    if options.relaxed:
        environment += "-relaxed"
    # A policy that measures nothing leaves the file alone.
    table = open_table(options.table) if options.policy == "auto" else CostTable(":memory:")
    return CostModel(table, environment, LayoutPolicy.for_device(device), context, room=available_memory(device))


def compiled_with(compiler_options: CompilerOptions) -> dict[str, str]:
    """What compiler options add to an environment."""
    return {"compiler_options": json.dumps(compiler_options or "", sort_keys=True)}


def _numpy_dtype(name: str) -> np.dtype | None:
    try:
        return jnp.dtype(name)
    except TypeError:
        return None
