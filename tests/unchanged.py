"""What is planned and computed for the corpus and for drawn programs, to hold one version of the code against another.

    python tests/unchanged.py OLD.json                      # in a checkout of the one
    python tests/unchanged.py NEW.json --against OLD.json   # in a checkout of the other, with its code on the path

Costs are made up, the same in both, so that every lowering is chosen somewhere. Of each program: the plan and the
rewritten jaxpr as text, or how it fails; of drawn ones also the verdict's reason and a digest of the values. (Those of
the corpus are not compiled: their jaxprs say what they compute.) Run from the root, `pip install jaxlayout[corpus]`
first; packages that are not there are left out. The exit status is 1 where anything differs, and it says what.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest  # noqa: F401 (compiles quickly)
import jax
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import at_random
from programs import programs

from bench import corpus
from jaxlayout import auto_layout
from jaxlayout.tuning import pipeline
from jaxlayout.verify.accept import Verdict

FOUND: dict[str, dict[str, Any]] = {}
JUDGE = pipeline.Pipeline.judge
UNSEEN = Verdict(kept=True, reason="unseen", cause="untried")


def digest(values: Any) -> str:
    """Of the bytes of all arrays, and of what they are."""
    keys = (jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in values)
    arrays = list(map(np.asarray, keys))
    told = [(str(x.dtype), x.shape, x.tobytes()) for x in arrays]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def look(name: str, fun: Callable[..., Any], args: tuple[Any, ...], seed: int, *, judged: bool) -> None:
    """Under made-up costs, and under the policy that measures nothing. `judged`: it is compiled, compared and run."""
    pipeline.measure = at_random(seed)
    pipeline.Pipeline.judge = JUDGE if judged else lambda pipeline, plan: UNSEEN
    for policy in ("auto", "channels_last"):
        tuned = auto_layout(fun, policy=policy, table=":memory:", verdict=False, memory_limit=1e3)
        try:
            outcome = tuned.outcome(*args)
            text = re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(tuned)(*args)))
            found = {"plan": outcome.plan.to_json(), "jaxpr": text, "reason": outcome.verdict.reason}
            if judged:
                found["values"] = digest(jax.tree.leaves(tuned(*args)))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        FOUND[f"{name}, {policy}"] = json.loads(json.dumps(found))
    jax.clear_caches()
    print(len(FOUND), name, flush=True)


def drawn(number: int) -> None:
    """So many programs, the same each time."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @settings(max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=quiet)
    @given(programs(), st.integers(0, 1000))
    def every(program: Any, seed: int) -> None:
        with program.config():
            name = hashlib.sha256(f"{program} {seed}".encode()).hexdigest()[:12]
            look(f"drawn {name}", program, tuple(program.arguments(seed)), seed, judged=True)

    every()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--drawn", type=int, default=300, help="how many programs are drawn")
    parser.add_argument("--no-corpus", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"], tempfile.tempdir = folder, None
        for name, case in corpus.CASES.items() if not given.no_corpus else ():
            try:
                fun, args = case.build(True)
            except ImportError:
                continue
            look(name, fun, args, 0, judged=False)
        drawn(given.drawn)
    given.file.write_text(json.dumps(FOUND, indent=1))
    if given.against is None:
        return 0
    old = json.loads(given.against.read_text())
    differing = [name for name in old | FOUND if old.get(name) != FOUND.get(name)]
    for name in differing:
        one, other = old.get(name) or {}, FOUND.get(name) or {}
        print(f"DIFFERS: {name}: {', '.join(k for k in one | other if one.get(k) != other.get(k))}")
    print(f"{len(old | FOUND) - len(differing)} of {len(old | FOUND)} are the same")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
