"""`Holding`: what a cost table has of one environment, for people who ask what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlayout.runtime.plain_data import check_format
from jaxlayout.table.records import ENVIRONMENT, ENVIRONMENT_FORMAT
from jaxlayout.table.sqlite import Row

KEY_ONLY = ("versions",)
"""Fields of an `Environment` that say how something was compiled or chosen, and not where."""
SETTINGS = ("allocator", "variables", "config")
"""Those that can be set otherwise at any time, and back."""

MAX_TIME = 2.0**33
"""Unix seconds, some 250 years from now: later is no time that was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """The records under one environment's fingerprint, counted."""

    env: str
    environment: Mapping[str, Any] | None
    """What `Environment.to_json` gave; None where the table does not say."""
    written: float | None
    """When a process last began to write to it, in Unix seconds."""
    signatures: int
    measurements: int
    plans: int

    @property
    def place(self) -> dict[str, Any] | None:
        """Versions, device, processor, settings: equal for all fingerprints of one set of them on one machine."""
        return None if self.environment is None else place_of(self.environment)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        counted = {"signatures": self.signatures, "measurements": self.measurements, "plans": self.plans}
        return {"env": self.env, "environment": self.environment, "written": self.written, **counted}


def place_of(environment: Mapping[str, Any], *, settings: bool = True) -> dict[str, Any]:
    """An `Environment.to_json` without what is in it for the key alone, and with settings or without."""
    without = KEY_ONLY if settings else (*KEY_ONLY, *SETTINGS)
    return {name: value for name, value in environment.items() if name not in without}


def holdings(rows: Mapping[str, Iterable[Row]]) -> list[Holding]:
    """What the rows that `look` found hold of each environment, the last written first."""
    signatures: dict[str, list[str]] = {}
    plans: dict[str, int] = {}
    described: dict[str, tuple[Mapping[str, Any] | None, float | None]] = {}
    for env, signature, *_ in rows["measurements"]:
        signatures.setdefault(env, []).append(signature)
    for env, function, _, _, payload in rows["plans"]:
        if function == ENVIRONMENT:
            described[env] = _described(payload)
        else:
            plans[env] = plans.get(env, 0) + 1
    found = [
        Holding(
            env=env,
            environment=described.get(env, (None, None))[0],
            written=described.get(env, (None, None))[1],
            signatures=len(set(signatures.get(env, ()))),
            measurements=len(signatures.get(env, ())),
            plans=plans.get(env, 0),
        )
        for env in dict.fromkeys((*signatures, *plans, *described))
    ]
    return sorted(found, key=lambda holding: holding.written or 0.0, reverse=True)


def places(found: Sequence[Holding]) -> list[list[Holding]]:
    """Holdings that are of one place together; those of which nothing is told are the last."""
    together: dict[str, list[Holding]] = {}
    for holding in sorted(found, key=lambda holding: holding.environment is None):
        together.setdefault(json.dumps(holding.place, sort_keys=True), []).append(holding)
    return list(together.values())


def _described(payload: str) -> tuple[Mapping[str, Any] | None, float | None]:
    """What a table says of an environment, which may come from anywhere."""
    value = json.loads(payload)
    try:
        check_format("an environment", value, ENVIRONMENT_FORMAT)
    except ValueError:  # as good as not told
        return None, None
    environment, written = value.get("environment"), value.get("written")
    return (
        environment if isinstance(environment, dict) else None,
        float(written) if isinstance(written, int | float) and 0 <= written <= MAX_TIME else None,
    )
