"""`TuningRequest`: a program to be tuned, and how."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxlayout.convs.signature import Context
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.program import has_effects, needs_real_arguments, runs_host_code
from jaxlayout.graph.shards import spans_processes
from jaxlayout.measure.compiled import CompilerOptions
from jaxlayout.runtime._compat import is_array, open_jaxpr
from jaxlayout.runtime.progress import Progress, Silent
from jaxlayout.tuning.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRequest:
    """A program to be tuned, and how; and what follows from that alone."""

    jaxpr: Any
    """The program, a closed jaxpr."""
    original: Any
    """The closed jaxpr of the same arguments to hold it against: often itself."""
    args: Sequence[Any] | None = None
    """Flat arguments to judge it on; None: made-up ones."""
    shardings: Sequence[Any] = ()
    """Of the arguments, where `args` does not say; None for one of which it is not known."""
    frozen: Sequence[bool] = ()
    """Which arguments are, if any: what depends on them alone is done once, and judged so."""
    options: Options
    context: Context = "entry"
    compiler_options: CompilerOptions = None
    """The user's compiler options."""
    choose_compiler_options: bool = False
    """Whether the plan may ask for compiler options beside those."""
    pinned: Plan | None = None
    """The plan, where the user has one."""
    executor: Executor | None = None
    """Has measurements done elsewhere."""
    progress: Progress = field(default_factory=Silent)
    stop: threading.Event = field(default_factory=threading.Event)
    """Set where tuning is to end."""
    waited: float = 0.0
    """Seconds that the call has waited for others already."""

    @property
    def folded(self) -> bool:
        """Whether scales were folded into the program's kernels (`rewrite.fold`)."""
        return self.original is not self.jaxpr

    @property
    def spans(self) -> bool:
        """Whether the arguments are divided among several processes."""
        return spans_processes(self.placed)

    @property
    def placed(self) -> Sequence[Any]:
        """The shardings of the arguments, as far as they are known."""
        return self.shardings if self.args is None else [getattr(x, "sharding", None) for x in self.args]

    @property
    def shapes(self) -> Sequence[Any]:
        """The arguments as far as compiling needs them."""
        if self.args is not None:
            return self.args
        avals = [v.aval for v in open_jaxpr(self.jaxpr).invars]
        places = self.shardings or [None] * len(avals)
        return list(map(_shape, avals, places))

    @property
    def not_to_be_run(self) -> str:
        """Why the function must not be run on trial, if so."""
        if has_effects(self.jaxpr):
            return "it has side effects"
        if runs_host_code(self.jaxpr):
            return "it calls back into Python"
        if self.spans:
            return "it spans several processes"
        if self.args is None and needs_real_arguments(self.jaxpr):
            return "made-up arguments could stop it from ending"
        return ""


def _shape(aval: Any, sharding: Any) -> Any:
    """What an argument of some type is compiled for; the type of a reference stands for itself."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) if is_array(aval) else aval
