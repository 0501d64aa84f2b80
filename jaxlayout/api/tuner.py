"""`Tuner`: one function, and how it is tuned. A call, a frozen function and an explanation ask it alike."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlayout.api.derived import MeasuringSelector
from jaxlayout.api.processes import agreed, all_take_part
from jaxlayout.api.wrapped import traced_once
from jaxlayout.convs.signature import Context
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.shards import of_arguments, spans_processes
from jaxlayout.measure.compiled import CompilerOptions, with_options
from jaxlayout.measure.turns import TELL_SECONDS, NoTurn
from jaxlayout.report import Explanation, explain
from jaxlayout.runtime._compat import is_array, open_jaxpr
from jaxlayout.runtime.nesting import inside, within
from jaxlayout.runtime.progress import progress_bar
from jaxlayout.runtime.threads import default_device, device_of, in_own_thread
from jaxlayout.tuning.first_run import FirstRun
from jaxlayout.tuning.model import cost_model
from jaxlayout.tuning.options import Options
from jaxlayout.tuning.outcome import Outcome, untouched
from jaxlayout.tuning.pipeline import decide
from jaxlayout.tuning.request import TuningRequest
from jaxlayout.tuning.stores import proofs_of

logger = logging.getLogger("jaxlayout")


class Tuner:
    """A function, the keywords of its jit, and the options it is tuned under."""

    def __init__(self, fun: Callable[..., Any], jit_keywords: Mapping[str, Any], options: Options, pinned: Plan | None):
        self.fun, self.jit_keywords, self.options, self.pinned = fun, jit_keywords, options, pinned
        self.source = traced_once(fun, jit_keywords)
        """The function to be traced: once for the same shapes, whoever asks."""
        self.name: str = getattr(fun, "__name__", "function")
        self._selector = MeasuringSelector(options)
        self._lock = threading.Lock()

    def is_part(self) -> bool:
        """Whether the call is part of something that is being tuned as a whole: then the convolutions are that one's.
        What this function does without measuring it does there too, but not where candidates are compared."""
        where = inside()
        return where == "tuning" or (where == "traced" and self.options.policy == "auto" and self.pinned is None)

    def as_one(self) -> AbstractContextManager[Any]:
        """In here what the function calls is part of it. JAX keeps what is traced here apart from what is not."""
        return within("traced") if self.options.policy == "auto" else nullcontext()

    def selector_for(self, outcome: Outcome) -> MeasuringSelector | None:
        """Who chooses what JAX derives from a program's convolutions: nobody where a policy leaves that alone."""
        left = self.options.policy != "auto" and outcome.source == "none"
        return None if left else self._selector

    def _compiler_options(self, context: Context) -> CompilerOptions:
        """The user's, which hold where the function is compiled by itself."""
        return self.jit_keywords.get("compiler_options") if context == "entry" else None

    def not_fatal(self, jaxpr: Any, outcome: Outcome) -> tuple[Outcome, FirstRun | None]:
        """An outcome, but for a program with what may crash that took a process down, and the record of its first run,
        where one is kept."""
        chosen = outcome.applied
        first = FirstRun.of(
            jaxpr, chosen, lambda: proofs_of(self.options, self._compiler_options("entry"), chosen.compiler_options)
        )
        if first is not None and (died := first.died()):
            logger.warning("%s stays as it is: %s", self.name, died)
            return untouched(died, "failure"), None
        return outcome, first

    def tuned(
        self,
        jaxpr: Any,
        args: Sequence[Any] | None,
        shardings: Sequence[Any] | None,
        context: Context,
        frozen: Sequence[bool] = (),
        original: Any = None,
        choose_compiler_options: bool = False,
        executor: Executor | None = None,
    ) -> Outcome:
        """Tune in a worker thread, where no trace is under way; the caller's thread-local settings go along.
        `shardings`: of the arguments; None where these are traced."""
        decided_alike = self.options.policy != "auto" or self.pinned is not None
        spans = shardings is not None and spans_processes(shardings)
        if jax.process_count() > 1 and not decided_alike:
            if shardings is None:
                return untouched("it is traced where the other processes may not be: decorate the outermost function")
            if spans and not all_take_part(shardings):
                return untouched("it spans some of the processes, not all")

        def decided(stop: threading.Event) -> Outcome:
            with progress_bar(self.name) as progress:
                request = TuningRequest(
                    jaxpr=jaxpr,
                    original=jaxpr if original is None else original,
                    args=None if args is None or spans else _arrays(jaxpr, args, shardings),
                    shardings=shardings or (),
                    frozen=frozen,
                    options=self.options,
                    context=context,
                    compiler_options=self._compiler_options(context),
                    choose_compiler_options=choose_compiler_options,
                    pinned=self.pinned,
                    executor=executor,
                    progress=progress,
                    stop=stop,
                    waited=waited,
                )
                return decide(request)

        # One thread at a time: the next one finds the plan in the table. What an interrupted one has measured is there
        # too: the next call goes on from that.
        waited = self._wait_to_tune()
        try:
            work = (lambda stop: agreed(partial(decided, stop), stop)) if spans and not decided_alike else decided
            try:
                return in_own_thread(work, device_of(args or ()))
            except KeyboardInterrupt:
                kept = "what was measured is kept, and the next call goes on from there"
                raise KeyboardInterrupt(f"tuning {self.name} was interrupted; {kept}") from None
        finally:
            self._lock.release()

    def _wait_to_tune(self) -> float:
        """Take this function's lock, waiting for another thread that has it: the seconds that took. NoTurn after
        `lock_timeout`."""
        start, longest = time.monotonic(), min(self.options.lock_timeout, threading.TIMEOUT_MAX)
        if not self._lock.acquire(timeout=min(TELL_SECONDS, longest)):
            logger.warning("another thread is tuning %s: waiting for it", self.name)
            if not self._lock.acquire(timeout=max(0.0, longest - TELL_SECONDS)):
                raise NoTurn(f"another thread was still tuning {self.name} after {self.options.lock_timeout:g} s")
        return time.monotonic() - start

    def explained(
        self,
        jaxpr: Any,
        outcome: Outcome,
        device: Any = None,
        context: Context = "entry",
        frozen: Sequence[bool] = (),
        shardings: Sequence[Any] | None = None,
    ) -> Explanation:
        """The explanation of what `tuned` gave, with the settings it had."""

        def work(stop: threading.Event) -> Explanation:
            options = with_options(self._compiler_options(context), outcome.plan.compiler_options)
            model = cost_model(self.options, default_device(), context, options)
            divided = of_arguments(jaxpr, shardings or ())
            return explain(
                jaxpr, outcome, model, name=self.name, relaxed=self.options.relaxed, frozen=frozen, divided=divided
            )

        return in_own_thread(work, device)


def _arrays(jaxpr: Any, args: Sequence[Any], shardings: Sequence[Any] | None) -> list[Any]:
    """A closed jaxpr's arguments as jit makes arrays of them."""

    def array(leaf: Any, aval: Any, sharding: Any) -> Any:
        if not is_array(aval):
            return leaf  # a reference
        made = leaf if jnp.issubdtype(aval.dtype, jax.dtypes.extended) else jnp.asarray(leaf, aval.dtype)
        return made if sharding in (None, made.sharding) else jax.device_put(made, sharding)

    places = shardings or [None] * len(args)
    return [array(x, v.aval, s) for x, v, s in zip(args, open_jaxpr(jaxpr).invars, places, strict=True)]
