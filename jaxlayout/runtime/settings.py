"""JAX's settings: what a thread has, handed on to others, and what holds for code of ours whatever the user has set.

What a user sets is for the user's program, whose equations say it by the time we see them: their dtypes, precision and
parameters. What we put in their place is traced under settings of ours, so that it is the same wherever it is traced
and compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any

import jax

TRACED = {
    "jax_default_matmul_precision": None,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}
"""What our code is traced under, beside whether there are 64-bit dtypes."""

TUNING = {
    "jax_array_garbage_collection_guard": "allow",
    "jax_check_tracer_leaks": False,
    "jax_debug_infs": False,
    "jax_debug_key_reuse": False,
    "jax_debug_nans": False,
    "jax_disable_jit": False,
    "jax_explain_cache_misses": False,
    "jax_log_compiles": False,
    "jax_no_execution": False,
    "jax_no_tracing": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_transfer_guard": "allow",
}
"""What tuning has of its own: the others would stop it, slow it down, or report what is none of the user's."""

_NOT_HANDED_ON = {
    "jax_default_device",  # a device of this process: whoever hands on settings knows which it is to be
    "jax_thread_guard",  # of the whole process, whichever thread sets it
    "jax_transfer_guard_device_to_device",  # parts of jax_transfer_guard
    "jax_transfer_guard_device_to_host",
    "jax_transfer_guard_host_to_device",
}


@cache
def thread_local() -> Mapping[str, Any]:
    """The settings that a thread can have for itself, by name, with what sets them for a `with` block."""
    found: dict[str, Any] = {name: getattr(jax, name.removeprefix("jax_"), None) for name in jax.config.values}
    return {name: manager for name, manager in found.items() if callable(manager)}


def for_tuning() -> dict[str, Any]:
    """What this thread has set, for others to tune under, but for what would disturb that."""
    mine = {name: getattr(jax.config, name) for name in thread_local() if name not in _NOT_HANDED_ON}
    return mine | TUNING


@contextmanager
def under(settings: Mapping[str, Any]) -> Iterator[None]:
    """A `with` block under some settings; those that this JAX lacks are passed over."""
    with ExitStack() as stack:
        for name, value in settings.items():
            if name in thread_local():
                stack.enter_context(thread_local()[name](value))
        yield


def is_plain() -> bool:
    """Whether functions are left to JAX as they are: where it is told to run them step by step, and where it computes
    constants at once. Then jax 0.10 compiles some while it lowers a program, which it may not come back from."""
    config: Any = jax.config
    return config.jax_disable_jit or config.eager_constant_folding


def of_ours(*, wide: bool) -> AbstractContextManager[None]:
    """A `with` block in which code of ours is traced. `wide`: it is for 64-bit dtypes, which there are only then."""
    return under(TRACED | {"jax_enable_x64": wide})
