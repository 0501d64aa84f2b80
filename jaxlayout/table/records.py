"""The records of a table as they are outside of it: in a file of another table, in an exported file. They may come from
anywhere, so each is checked before it is taken."""

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

from jaxlayout.runtime.plain_data import number, shown
from jaxlayout.table import sqlite
from jaxlayout.table.measurement import Measurement
from jaxlayout.table.sqlite import COLUMNS, KEYS, SCHEMA_VERSION, Record, Row

MAX_KEY = 4096
"""Longest key, in characters."""
MAX_TEXT = 64 * 2**20
"""Longest plan, in characters."""
ENVIRONMENT = "environment"
"""Among an environment's plans, in place of a function: what the environment is, and when it was last written to."""
ENVIRONMENT_FORMAT = 1
"""The number of the form in which an environment is described."""

FORMAT = "jaxlayout cost table"
"""What the first line of an exported file says it is."""
MAX_LINE = 4 * MAX_TEXT
"""Longest line of one, in characters."""


def look(path: str | os.PathLike[str], timeout: float = 5.0) -> tuple[dict[str, list[Row]], list[str]]:
    """The valid rows of a table's file, "measurements" and "plans", oldest first; and why the others are not.

    It is only read, and may be damaged or in use; SQLite may leave two small files beside it. FileNotFoundError for
    no such file.
    """
    refused: list[str] = []
    found: dict[str, list[Row]] = {table: [] for table in COLUMNS}
    for some in valid_rows(stored_in(path, timeout, refused), refused):
        for table, rows in some.items():
            found[table] += rows
    return found, refused


def stored_in(path: str | os.PathLike[str], timeout: float, refused: list[str]) -> Iterator[Record]:
    """The records of a table's file, not checked yet; `refused` gets why some cannot be read."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no cost table at {path}")
    return sqlite.stored(pathlib.Path(path).absolute(), timeout, refused)


def exported(path: pathlib.Path, refused: list[str]) -> Iterator[Record]:
    """The records of an exported file; `refused` gets a reason for whatever does not look like one."""
    for n, value in _json_lines(path, refused):
        if n == 1:
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                refused.append(f"{path} is not an exported cost table")
                return
            if (schema := value.get("schema")) != SCHEMA_VERSION:
                refused.append(f"{path}: its schema is version {shown(schema)}, not {SCHEMA_VERSION}")
                return
            continue
        table = value.get("table") if isinstance(value, dict) else None
        columns = COLUMNS.get(table, ()) if isinstance(table, str) else ()
        if isinstance(table, str) and columns and value.keys() == {"table", *columns, "checksum"}:
            yield f"line {n}", table, tuple(value[name] for name in columns), value["checksum"]
        else:
            refused.append(f"line {n}: not a record of {' or '.join(COLUMNS)}")


def _json_lines(path: pathlib.Path, refused: list[str]) -> Iterator[tuple[int, Any]]:
    """The values of a file that has one in each line, by number from 1; `refused` gets why others are none."""
    # What is no UTF-8 costs its own record, by the checksum.
    with path.open(encoding="utf-8", errors="replace") as file:
        for n in itertools.count(1):
            line = file.readline(MAX_LINE)
            if not line and n > 1:
                break
            whole = line.endswith("\n") or len(line) < MAX_LINE
            while len(line) == MAX_LINE and not line.endswith("\n"):
                line = file.readline(MAX_LINE)
            try:
                if not whole:
                    raise ValueError(f"longer than {MAX_LINE} characters")
                yield n, json.loads(line)
            except (ValueError, RecursionError) as error:
                refused.append(f"line {n}: not JSON: {error}")
                if n == 1:
                    return


def valid_rows(records: Iterable[Record], refused: list[str]) -> Iterator[dict[str, list[Row]]]:
    """The valid ones of `records` by table, some at a time; `refused` gets why the others are not."""
    records = iter(records)
    while some := list(itertools.islice(records, sqlite.BATCH)):
        found: dict[str, list[Row]] = {table: [] for table in COLUMNS}
        for name, table, row, checksum in some:
            if why := problem_of(table, row) or mismatch_of(table, row, checksum):
                refused.append(f"{name}: {why}")
            else:
                found[table].append(row)
        yield found


def problem_of(table: str, row: tuple[object, ...], deep: bool = True) -> str:
    """Why these values are no record of `table`; "" if they are one. `deep` reads the JSON of plans too."""
    short = (*COLUMNS[table][: KEYS[table]], "skeleton")
    for name, value in zip(COLUMNS[table], row, strict=True):
        most = MAX_KEY if name in short else MAX_TEXT
        if not isinstance(value, str) or not 0 < len(value) <= most:
            return f"{name} is not a text of 1 to {most} characters"
        if name in short and not value.isprintable():  # keys are shown in terminals
            return f"{name} has characters that cannot be printed"
    texts = cast(Row, row)
    try:
        "".join(texts).encode()  # half a surrogate pair cannot be stored
        if table == "measurements":
            measurement_of(texts[3])
        else:
            sizes = json.loads(texts[3])
            if not isinstance(sizes, list):
                return "sizes is not a list of numbers"
            for size in sizes:
                number("one of sizes", size)
            if deep:
                json.loads(texts[4])
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""


@functools.lru_cache(1024)
def measurement_of(text: str) -> Measurement:
    """The measurement that a record's text is. It is checked first and made use of right after: the cache saves
    the second parsing."""
    return Measurement.from_json(json.loads(text))


def mismatch_of(table: str, row: Row, checksum: object) -> str:
    """Why a checksum is not that of a row; "" if it is."""
    return "" if checksum == sqlite.checksum(table, row) else "its checksum does not match"


def compact(value: object) -> str:
    """The JSON of a value, in its shortest form, with sorted keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
