"""Cost tables with something in them, and processes that use one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import ROOT

from jaxlayout.table.measurement import Measurement
from jaxlayout.table.table import CostTable
from jaxlayout.tuning import stores
from jaxlayout.tuning.stores import Stores

OK = Measurement(status="ok", median_ns=1.5e6, spread_ns=2e3, runs=9, error=1e-7, temp_bytes=4096, program="f00d")


def measured(ns: float) -> Measurement:
    return dataclasses.replace(OK, median_ns=float(ns))


def filled(path: Path, count: int = 400) -> dict[str, Measurement]:
    """Writes a table of several pages and closes it; what is in it."""
    those = {f"candidate-{number}": measured(1_000_000 + number) for number in range(count)}
    with CostTable(path) as table:
        table.record_many("env", "conv", those)
        table.store_plan("env", "function", "skeleton", "[1, 2]", '{"plan": 1}')
    return those


def damaged_files(path: Path) -> list[Path]:
    return [file for file in path.parent.glob("*.damaged-*") if not file.name.endswith(("-wal", "-shm"))]


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `script`, with warnings as errors and `table` opened on its first argument."""
    head = "import sys\n"
    head += "from jaxlayout.table.table import CostTable\nfrom jaxlayout.table.measurement import Measurement\n"
    head += f"table = CostTable(sys.argv[1])\nok = Measurement.from_json({OK.to_json()!r})\n"
    command = [sys.executable, "-W", "error", "-c", head + textwrap.dedent(script), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], line: str = "") -> str:
    out, err = process.communicate(line, timeout=120)
    assert process.returncode == 0, err
    return out


def as_another_process(patch: pytest.MonkeyPatch, *opened: CostTable) -> None:
    """What tuning finds from here on: files, and no table that this process has open but those given."""
    patch.setattr(stores, "process_stores", Stores({str(table.asked): table for table in opened}))


def close_tables() -> None:
    """Close what tuning has open: all of it is in the file then."""
    for table in stores.process_stores.tables.values():
        table.close()
