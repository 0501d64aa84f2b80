"""Where a decorated function is the plain one: inside what is being tuned already.

JAX is told of it, so what it traces there it does not use elsewhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import jax

_context: Any = jax.make_user_context(default_value=None)

Inside = Literal["traced", "tuning"]
"""traced: a function is traced that will be tuned as a whole, its decorated parts with it. tuning: candidates and whole
programs are compiled and compared, or a lowering is evaluated: what they call must be what they say."""


def inside() -> Inside | None:
    """What is going on in this thread, if anything."""
    return _context.value


def within(what: Inside) -> AbstractContextManager[None]:
    """Says so for a `with` block."""
    return _context(what)
