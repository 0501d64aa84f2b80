"""What `auto_layout` takes by keyword, for editors: what `jax.jit` takes, and the fields of `Options`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict


class OptionKeywords(TypedDict, total=False):
    """The fields of `Options`; see there."""

    policy: Literal["auto", "channels_last", "off"]
    on_miss: Literal["measure", "heuristic", "error"]
    time_budget: float
    memory_limit: float
    numerics: Literal["strict", "relaxed"]
    verdict: bool
    lock_timeout: float
    table: str | None


class JitKeywords(TypedDict, total=False):
    """The keywords of `jax.jit`; see there."""

    in_shardings: Any
    out_shardings: Any
    static_argnums: int | Sequence[int] | None
    static_argnames: str | Iterable[str] | None
    donate_argnums: int | Sequence[int] | None
    donate_argnames: str | Iterable[str] | None
    keep_unused: bool
    device: Any
    backend: str | None
    inline: Any
    compiler_options: dict[str, Any] | None


class Keywords(OptionKeywords, JitKeywords, total=False):
    """All of them."""
