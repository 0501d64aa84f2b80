"""Threads to tune in: no trace is under way there, and JAX is set as it is for the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import jax
from jax.core import Tracer

from jaxlayout.runtime.nesting import within
from jaxlayout.runtime.settings import for_tuning, under


def default_device() -> Any:
    """The device that this thread computes on."""
    config: Any = jax.config
    named = config.jax_default_device
    if isinstance(named, str):
        return jax.local_devices(backend=named)[0]
    # Local: in a multi-process program jax.devices()[0] may be another machine's.
    return jax.local_devices()[0] if named is None else named


class Workers(ThreadPoolExecutor):
    """Threads with the JAX settings of the thread that makes them (settings are thread-local), but for what would
    disturb tuning (`settings.TUNING`). `device`: their default device, if not that thread's."""

    def __init__(self, count: int, device: Any = None):
        super().__init__(count, thread_name_prefix="jaxlayout")
        config: Any = jax.config
        named = config.jax_default_device is not None
        self._device = default_device() if device is None and named else device
        self._settings = for_tuning()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As of any executor."""

        def work() -> Any:
            with under(self._settings), jax.default_device(self._device), within("tuning"):
                return function(*args, **kwargs)

        return super().submit(work)


def in_own_thread(work: Callable[[threading.Event], Any], device: Any = None) -> Any:
    """What `work` gives, in a thread of its own. An interrupt, or whatever else a signal's handler raises meanwhile,
    sets the event that it is handed, and goes on when the work has come to its end."""
    stop = threading.Event()
    with Workers(1, device) as workers:
        working = workers.submit(work, stop)
        try:
            return working.result()
        except BaseException:
            stop.set()
            raise


@cache
def one_device() -> bool:
    """Whether there is no other device that an array might be on, or have pieces on."""
    return jax.device_count() == 1


def is_real(arg: Any) -> bool:
    """Whether a worker can compute with an argument: it is neither traced, nor a mere shape, nor donated already."""
    unreal = isinstance(arg, Tracer | jax.ShapeDtypeStruct)
    return not unreal and not (isinstance(arg, jax.Array) and arg.is_deleted())


def device_of(args: Sequence[Any]) -> Any:
    """The device that a call with these arguments runs on, where they say so."""
    arrays = (x for x in args if isinstance(x, jax.Array) and not isinstance(x, Tracer))
    committed = [x for x in arrays if x.committed]
    return min(committed[0].sharding.addressable_devices, key=lambda d: d.id) if committed else None
