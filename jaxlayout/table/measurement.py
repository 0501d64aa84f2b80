"""`Measurement`: what became of one candidate when it was compiled, checked and timed."""

import dataclasses
import math
from typing import Any, Literal, get_args

from jaxlayout.runtime.plain_data import check_format, integer, number, one_of, optional, shown, text

Status = Literal["ok", "wrong", "failed", "memory", "slow", "pruned"]

MEASURING = 1
"""How times are taken, as a number: raised by hand when that changes (what is timed around a candidate, what an
equation's job does), so that earlier measurements are not found. Lowerings and rules have versions of their own."""
FORMAT = 1
"""The number of the form that `to_json` gives."""
MAX_NS = 86_400e9
"""Longest time that is believed, in nanoseconds: one application taking a day is a broken record."""
MAX_RUNS = 10**9
MAX_BYTES = 2**60
MAX_PROGRAM = 256
"""Longest program hash, in characters."""
MAX_DETAIL = 2000
"""Longest explanation kept, in characters: compiler errors can run to megabytes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One candidate, measured. A failure is a record like any other, never an exception.

    `status`: "ok"; "wrong", it computes something else; "failed", it does not trace, compile or run;
    "memory", it needs more than allowed; "slow", dropped early as a clear loser, its time still known; "pruned", never
    compiled, as it cannot be faster than what was measured in the same layouts.
    """

    status: Status
    median_ns: float | None
    """Nanoseconds of one application."""
    spread_ns: float | None
    """Half the interquartile range, in nanoseconds."""
    runs: int
    """Timed runs behind the median."""
    error: float | None
    """max |out - ref64| / rms(ref64). Infinite where the output has NaN or Inf that the reference has not."""
    temp_bytes: int | None
    """Peak temporary memory of the compiled candidate, in bytes."""
    program: str
    """Hash of the compiled program, metadata stripped; "" where none was compiled."""
    detail: str = ""
    """Why it failed, in words; cut to MAX_DETAIL characters."""

    def __post_init__(self):
        if self.error is not None and math.isnan(self.error):
            # NaN compares false with any bound, so `error > bound` would let it pass. Infinity does not.
            object.__setattr__(self, "error", math.inf)
        if len(self.detail) > MAX_DETAIL:
            object.__setattr__(self, "detail", self.detail[: MAX_DETAIL - 4] + " ...")

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values: the number of this form and every field, an infinite error as the string "inf"."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format": FORMAT} | fields | {"error": "inf" if self.error == math.inf else self.error}

    @classmethod
    def from_json(cls, value: Any) -> "Measurement":
        """The record that `to_json` wrote. Raises ValueError, saying why, for anything else."""
        check_format("a measurement", value, FORMAT)
        if missing := NAMES - value.keys() - {"detail"}:
            raise ValueError(f"missing: {', '.join(sorted(missing))}")
        if unknown := value.keys() - NAMES - {"format"}:
            raise ValueError(f"unknown fields: {', '.join(shown(name) for name in list(unknown)[:5])}")
        status: Status = one_of("status", value["status"], get_args(Status))
        error = value["error"]
        measurement = cls(
            status=status,
            median_ns=optional(number, "median_ns", value["median_ns"], MAX_NS),
            spread_ns=optional(number, "spread_ns", value["spread_ns"], MAX_NS),
            runs=integer("runs", value["runs"], MAX_RUNS),
            error=math.inf if error == "inf" else optional(number, "error", error),
            temp_bytes=optional(integer, "temp_bytes", value["temp_bytes"], MAX_BYTES),
            program=text("program", value["program"], MAX_PROGRAM),
            detail=text("detail", value.get("detail", ""), MAX_DETAIL),
        )
        if measurement.median_ns == 0:
            raise ValueError("median_ns is 0: nothing takes no time")
        if status in ("ok", "slow") and (measurement.median_ns is None or measurement.runs < 1):
            raise ValueError(f"status is {status!r} but there is no median_ns of at least one run")
        if status in ("ok", "slow") and error == "inf":
            raise ValueError(f"status is {status!r} but the error is infinite")
        return measurement


def failed(
    status: Status, detail: str, *, error: float | None = None, temp_bytes: int | None = None, program: str = ""
) -> Measurement:
    """The record of what was not timed."""
    return Measurement(
        status=status,
        median_ns=None,
        spread_ns=None,
        runs=0,
        error=error,
        temp_bytes=temp_bytes,
        program=program,
        detail=detail,
    )


NAMES = frozenset(field.name for field in dataclasses.fields(Measurement))
