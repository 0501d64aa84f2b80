"""The cost table with a million records: how long everything takes, and how much memory.

    python -m bench.table

The records are made up, with keys as real ones have them: 50 environments, 12 candidates for each convolution, one plan
of 20 kB to a hundred measurements. They are written as processes write them, one transaction for each convolution. A
second table has half of its records in common with the first. Every case runs in a process of its own, whose largest
memory is told; one that looks at single records takes 2000 of them at random. Files are cached by the system.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.rows import Row, write_rows
from jaxlayout.table.contents import holdings
from jaxlayout.table.measurement import Measurement
from jaxlayout.table.records import look
from jaxlayout.table.table import CostTable

ENVIRONMENTS, CANDIDATES, MEASUREMENTS_A_PLAN = 50, 12, 100
PLAN_BYTES = 20_000
LOOKUPS = 2000

MEASURED = Measurement(
    status="ok", median_ns=1.5e6, spread_ns=2e4, runs=9, error=2.4e-7, temp_bytes=2**20, program="00ff" * 4
)
LOWERINGS = ("xla@1", "dot@2", "shifted@3", "phases@2/dot@2", "im2col@2", "tap_dots@3")
ORDERS = ("NHWC,HWIO->NHWC", "NCHW,OIHW->NCHW")


class Made:
    """What a table of so many records has in it."""

    def __init__(self, records: int, first: int = 0):
        """`first`: of the environments."""
        self.environments = [f"{0x9E3779B97F4A7C15 * (first + n + 1) % 2**64:016x}" for n in range(ENVIRONMENTS)]
        self.plans = max(1, records // (MEASUREMENTS_A_PLAN * ENVIRONMENTS))
        self.signatures = max(1, records // (CANDIDATES * ENVIRONMENTS))

    def signature(self, n: int) -> str:
        """A convolution's."""
        size, features = 7 + n % 218, 8 + n // 218
        return (
            f"lhs=8x{features}[{size}, {size}]float32 rhs={2 * features}[3, 3]float32 stride=[1, 1] "
            "pad=[[1, 1], [1, 1]] dilate=[1, 1][1, 1] groups=1,1 precision=None to=None in=entry"
        )

    def function(self, n: int) -> str:
        """A program's hash."""
        return f"{0xD1B54A32D192ED03 * (n + 1) % 2**128:032x}"

    def skeleton(self, n: int) -> str:
        """Ten programs share one."""
        return self.function(-1 - n // 10)

    def measurements(self, n: int) -> dict[str, Measurement]:
        """Of one convolution."""
        names = [f"{lowering}:{orders}" for lowering in LOWERINGS for orders in ORDERS]
        return {name: replace(MEASURED, median_ns=1e5 + 1e3 * n + i) for i, name in enumerate(names)}


def build(folder: Path, records: int, name: str = "one", first: int = 0) -> Row:
    """As processes do, environment by environment."""
    made = Made(records, first)
    payload = json.dumps({"plan": "x" * PLAN_BYTES})
    start = time.perf_counter()
    with CostTable(folder / f"{name}.sqlite") as table:
        for env in made.environments:
            for n in range(made.signatures):
                table.record_many(env, made.signature(n), made.measurements(n))
            for n in range(made.plans):
                table.store_plan(env, made.function(n), made.skeleton(n), f"[8, 224, {n}, 3]", payload)
    return whole(start, written=ENVIRONMENTS * (CANDIDATES * made.signatures + made.plans), file=table.path)


def whole(start: float, written: int, file: Path | None = None) -> Row:
    """The row of something done to all records."""
    seconds = time.perf_counter() - start
    row: Row = {"seconds": seconds, "records": written, "records_per_s": written / seconds}
    return row if file is None else row | {"file_mib": file.stat().st_size / 2**20}


def single(folder: Path, records: int, look_up: Callable[[CostTable, Made, int], Any]) -> Row:
    """The row of something done to single records."""
    made, draw = Made(records), random.Random(0)
    times = []
    with CostTable(folder / "one.sqlite") as table:
        table.measurements("none", "none")  # opens it
        for _ in range(LOOKUPS):
            n = draw.randrange(10**9)
            start = time.perf_counter()
            look_up(table, made, n)
            times.append((time.perf_counter() - start) * 1e6)
    return {"median_us": statistics.median(times), "p99_us": statistics.quantiles(times, n=100)[98]}


def env_of(made: Made, n: int) -> str:
    return made.environments[n % ENVIRONMENTS]


def opened(folder: Path, records: int) -> Row:
    """In this process for the first time, until the first answer."""
    start = time.perf_counter()
    with CostTable(folder / "one.sqlite") as table:
        table.measurements("none", "none")
        return {"seconds": time.perf_counter() - start}


def known(folder: Path, records: int) -> Row:
    """`measurements` of a convolution that is there."""

    def look_up(table: CostTable, made: Made, n: int) -> None:
        assert len(table.measurements(env_of(made, n), made.signature(n % made.signatures))) == CANDIDATES

    return single(folder, records, look_up)


def unknown(folder: Path, records: int) -> Row:
    """`measurements` of one that is not."""

    def look_up(table: CostTable, made: Made, n: int) -> None:
        assert not table.measurements(env_of(made, n), made.signature(n) + "?")

    return single(folder, records, look_up)


def plan(folder: Path, records: int) -> Row:
    """`load_plan`."""

    def look_up(table: CostTable, made: Made, n: int) -> None:
        assert table.load_plan(env_of(made, n), made.function(n % made.plans))

    return single(folder, records, look_up)


def plans_like(folder: Path, records: int) -> Row:
    """`plans_like`: those of other sizes, ten or fewer of 20 kB."""

    def look_up(table: CostTable, made: Made, n: int) -> None:
        assert table.plans_like(env_of(made, n), made.skeleton(n % made.plans))

    return single(folder, records, look_up)


def record(folder: Path, records: int) -> Row:
    """`record_many` of a convolution that is there."""

    def look_up(table: CostTable, made: Made, n: int) -> None:
        table.record_many(env_of(made, n), made.signature(n % made.signatures), made.measurements(n))

    return single(folder, records, look_up)


def export(folder: Path, records: int) -> Row:
    """To a file of JSON lines."""
    with CostTable(folder / "one.sqlite") as table:
        start = time.perf_counter()
        table.export_json(folder / "one.json")
    with (folder / "one.json").open() as file:
        return whole(start, sum(1 for _ in file) - 1, folder / "one.json")


def imported(folder: Path, records: int) -> Row:
    """That file into an empty table."""
    (folder / "new.sqlite").unlink(missing_ok=True)
    with CostTable(folder / "new.sqlite") as table:
        start = time.perf_counter()
        accepted, refused = table.import_json(folder / "one.json")
        assert not refused
        return whole(start, accepted, table.path)


def merge(folder: Path, records: int) -> Row:
    """A second table of as many records, half of them under keys that the first has, into the first."""
    with CostTable(folder / "one.sqlite") as table:
        start = time.perf_counter()
        accepted, refused = table.merge(folder / "two.sqlite")
        assert not refused
        return whole(start, accepted, table.path)


def count(folder: Path, records: int) -> Row:
    """`counts`, which checks every record."""
    with CostTable(folder / "one.sqlite") as table:
        start = time.perf_counter()
        counts = table.counts()
        return whole(start, counts["measurements"] + counts["plans"])


def show(folder: Path, records: int) -> Row:
    """What `jaxlayout table show` and `doctor` do: every record checked, and counted by environment."""
    start = time.perf_counter()
    rows, refused = look(folder / "one.sqlite")
    found = holdings(rows)
    assert not refused
    return whole(start, sum(held.measurements + held.plans for held in found))


def prune(folder: Path, records: int) -> Row:
    """Half of the environments forgotten, and the file made smaller."""
    with CostTable(folder / "one.sqlite") as table:
        start = time.perf_counter()
        gone = table.forget(set(Made(records).environments[::2]))
        return whole(start, gone, table.path)


CASES: dict[str, Callable[[Path, int], Row]] = {
    "build": build,
    "open": opened,
    "measurements, known": known,
    "measurements, unknown": unknown,
    "load_plan": plan,
    "plans_like": plans_like,
    "record_many, 12 candidates": record,
    "counts": count,
    "table show": show,
    "export": export,
    "import": imported,
    "merge": merge,
    "prune": prune,
}


def in_a_process(work: Callable[..., Row], *args: Any) -> Row:
    """What `work` gives in a fresh process, and the most memory that that had."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measured, work, *args).result()


def _measured(work: Callable[..., Row], *args: Any) -> Row:
    row = work(*args)
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return row | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}


def markdown(rows: list[Row], records: int) -> str:
    """The table."""

    forms = {"seconds": ".3g", "records_per_s": ",.0f", "median_us": ".0f", "p99_us": ".0f"}
    forms |= {"file_mib": ".0f", "peak_mib": ".0f"}

    def lines() -> Iterator[str]:
        for row in rows:
            cells = (format(row[key], form) if key in row else " " for key, form in forms.items())
            yield f"| {row['case']} | {' | '.join(cells)} |"

    head = (
        "| case | seconds | records a second | median µs | 99% µs | file MiB | peak memory MiB |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    command = f"`python -m bench.table --records {records}`"
    return f"{command}, Python {sys.version.split()[0]}\n\n{head}" + "\n".join(lines()) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases, in order, and write the table after each anew."""
    parser = ArgumentParser(prog="python -m bench.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--small", action="store_true", help="2000 records: to see that it works")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    given = parser.parse_args(argv)
    records = 2000 if given.small else given.records

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def run(name: str) -> Row:
            if name == "merge":  # late: the room is needed
                os.unlink(folder / "one.json")
                os.unlink(folder / "new.sqlite")
                build(folder, records, "two", ENVIRONMENTS // 2)
            return {"case": name, **in_a_process(CASES[name], folder, records)}

        stem = given.out / f"table{'-small' * given.small}"
        write_rows(stem, (), CASES, run, lambda rows: markdown(rows, records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
