"""Convolutions that JAX derives from tuned ones: by differentiation or batching, after the function they stand in was
planned. They are chosen one by one when they are lowered, where their shapes are first seen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.primitive import tuned_conv
from jaxlayout.convs.signature import ConvSignature, written_dims
from jaxlayout.graph.rules import is_placed
from jaxlayout.measure.turns import NoTurn
from jaxlayout.runtime.nesting import inside
from jaxlayout.runtime.progress import progress_bar
from jaxlayout.runtime.threads import in_own_thread
from jaxlayout.tuning.options import Options
from jaxlayout.tuning.pipeline import TableMiss, choose

logger = logging.getLogger("jaxlayout")


@dataclass(frozen=True)
class MeasuringSelector:
    """A `LoweringSelector` that goes by the cost table, and measures what it lacks. Derived convolutions may end up in
    a loop, which lowering does not tell, so their costs are those of a nested computation."""

    options: Options

    def __call__(
        self, lhs: Any, rhs: Any, lowering: str, params: Mapping[str, Any], platforms: Sequence[str]
    ) -> Candidate:
        """The best candidate; the convolution as written where there is nothing to go by."""
        written = Candidate(lowering, written_dims(params))
        # Of several processes, each would choose by itself, and nobody knows which of them are here.
        alone = self.options.policy != "auto" or jax.process_count() == 1
        symbolic = not all(isinstance(size, int) for size in (*lhs.shape, *rhs.shape))
        elsewhere = tuple(platforms) != (jax.default_backend(),)
        if inside() == "tuning" or not alone or symbolic or elsewhere or is_placed(params):
            return written
        params = dict(params) | {name: None for name in ("out_sharding",) if name in params}  # a mesh, and nothing else
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (lhs, rhs)]

        config: Any = jax.config
        wide = config.jax_enable_x64 or ConvSignature.of(lhs, rhs, params).is_wide  # traced with, lowered without

        def work(stop: Any) -> Candidate:
            jaxpr = jax.make_jaxpr(partial(tuned_conv, lowering=lowering, **params))(*shapes)
            with progress_bar("derived convolutions") as progress:
                mode = choose(jaxpr, self.options, progress, stop).choices.get((0,))
            return written if mode is None or mode.candidate is None else mode.candidate

        try:
            with jax.enable_x64(wide):
                return in_own_thread(work)
        except (TableMiss, Warning):
            raise
        except NoTurn as error:
            logger.warning("a derived convolution stays as it is: %s", error)
            return written
        except Exception:
            logger.warning("a derived convolution stays as it is", exc_info=True)
            return written
