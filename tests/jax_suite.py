"""JAX's own tests of convolutions, every convolution in them decorated: a pytest plugin, for a checkout of JAX's source
of the version that is installed, of which nothing is needed but its tests.

    PYTHONPATH=tests:. python -m pytest -p jax_suite JAX/tests/lax_test.py JAX/tests/lax_autodiff_test.py \
        JAX/tests/lax_vmap_test.py -k Conv

Each convolution is tuned by itself, by made-up costs under which it takes any lowering but the one written, and what it
gives is compared by JAX's tests alone. SEED chooses the lowerings. At the end stands how many convolutions took which.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from typing import Any

from jax import lax
from plans import at_random

from jaxlayout import auto_layout
from jaxlayout.convs import primitive
from jaxlayout.convs.lowering import evaluate
from jaxlayout.tuning import pipeline
from jaxlayout.verify.accept import Verdict

SEED = int(os.environ.get("SEED", "0"))

_used: Counter[str] = Counter()
_plain = lax.conv_general_dilated


@functools.wraps(_plain)
def decorated(lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
    def convolution(lhs: Any, rhs: Any) -> Any:
        return _plain(lhs, rhs, *args, **kwargs)

    return auto_layout(convolution, table=":memory:")(lhs, rhs)


def _counted(name: str, *rest: Any) -> Any:
    _used[name] += 1
    return evaluate(name, *rest)


def pytest_configure(config: Any) -> None:
    pipeline.measure = at_random(SEED)
    pipeline.Pipeline.judge = lambda line, plan: Verdict(kept=True, reason="unseen", cause="untried")
    primitive.evaluate = _counted
    # `lax.conv`, `conv_transpose` and others look it up where they are defined.
    lax.conv_general_dilated = lax.conv.__globals__["conv_general_dilated"] = decorated


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"lowerings: {dict(_used.most_common())}")
