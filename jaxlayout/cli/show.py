"""What is in a cost table, in words: `jaxlayout table show`, and what other commands say of it."""

from __future__ import annotations

import argparse
import collections
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlayout.cli.base import Failure, milliseconds, print_json, print_text
from jaxlayout.cli.settings import options_of
from jaxlayout.table.contents import Holding, holdings, places
from jaxlayout.table.measurement import Measurement
from jaxlayout.table.records import look
from jaxlayout.table.sqlite import file_at
from jaxlayout.table.table import default_path

SHOW = """\
example:

  $ jaxlayout table show
  table.sqlite: 812 measurements of 57 signatures, 9 plans; 610.3 kB
  jax 0.12.0, jaxlib 0.12.0 on cpu (AMD EPYC 9B14, 2 cores, libc.so.6 gives freed memory back)
    812 measurements of 57 signatures, 9 plans; last written 2026-05-04 11:30

  $ jaxlayout table show --signature rhs=64[3,      # what was measured of those convolutions

exit codes: 0, 1 if there is no table, or if any record in it is no valid one."""


def table_path(given: argparse.Namespace) -> str:
    """The file of the table: as told by the flag, or by the environment, or the usual one; see `file_at`."""
    from jaxlayout.tuning.options import Options

    path = Options.from_environment(**options_of(given)).table or str(default_path())
    return path if path == ":memory:" else str(file_at(Path(path)))


def looked(given: argparse.Namespace) -> tuple[str, dict[str, Any], list[str]]:
    """Where the table is, its valid rows, and why others are not; Failure where there is none."""
    path = table_path(given)
    try:
        return (path, *look(path))
    except FileNotFoundError:
        raise Failure(f"no cost table at {path} yet") from None


def show_table(given: argparse.Namespace) -> int:
    """`jaxlayout table show`."""
    path, rows, refused = looked(given)
    found = holdings(rows)
    if given.signature is not None:
        return _show_signatures(given, rows["measurements"], found)
    size = bytes_of(path)
    if given.json:
        kept = [holding.to_json() for holding in found]
        print_json({"path": path, "bytes": size, "environments": kept, "refused": refused})
        return int(bool(refused))
    from rich import filesize

    print_text(f"{path}: {counted(found)}; {filesize.decimal(size)}")
    for together in places(found):
        written = max((holding.written or 0.0 for holding in together), default=0.0)
        last = f"; last written {time.strftime('%Y-%m-%d %H:%M', time.localtime(written))}" if written else ""
        print_text(in_words(together[0]), f"  {counted(together)}{last}")
    print_refused(refused)
    return int(bool(refused))


def _show_signatures(given: argparse.Namespace, rows: Sequence[Any], found: Sequence[Holding]) -> int:
    """The candidates of some signatures, the fastest first."""
    of: dict[tuple[str, str], dict[str, Measurement]] = {}
    for env, signature, candidate, record in rows:
        if given.signature in signature:
            of.setdefault((env, signature), {})[candidate] = Measurement.from_json(json.loads(record))
    if given.json:
        print_json(
            [
                {"env": env, "signature": signature, "candidates": {name: one.to_json() for name, one in those.items()}}
                for (env, signature), those in of.items()
            ]
        )
        return 0
    if not of:
        raise Failure(f"no signature in the table has {given.signature!r} in it")
    from rich import box
    from rich.table import Table

    words = {holding.env: in_words(holding) + _how(holding) for holding in found}
    for (env, signature), those in of.items():
        shown = Table("candidate", "status", "median", "spread", "error", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, one in sorted(those.items(), key=lambda item: item[1].median_ns or float("inf")):
            error = "" if one.error is None else f"{one.error:.1g}"
            shown.add_row(name, one.status, milliseconds(one.median_ns), milliseconds(one.spread_ns), error)
        print_text(signature, f"  {words[env]}", shown)
    return 0


def in_words(holding: Holding) -> str:
    """An environment in a line."""
    if holding.environment is None:
        return "unknown: the table does not say what it is"
    e = collections.defaultdict(lambda: "?", holding.environment)  # it may come from anywhere
    device = str(e["device_kind"])
    device = "" if device == e["platform"] else f" {device}"
    flags = holding.environment.get("variables")
    under = "".join(f", {name}={value}" for name, value in flags.items()) if isinstance(flags, dict) else ""
    return (
        f"jax {e['jax']}, jaxlib {e['jaxlib']} on {e['platform']}{device} "
        f"({e['cpu']}, {e['cores']} cores, {e['allocator']}){under}"
    )


def _how(holding: Holding) -> str:
    """What tells environments of one place apart."""
    versions = (holding.environment or {}).get("versions")
    options = versions.get("compiler_options", '""') if isinstance(versions, dict) else '""'
    relaxed = ", relaxed numerics" if holding.env.endswith("-relaxed") else ""
    return relaxed + (f", compiled with {options}" if options != '""' else "")


def bytes_of(path: str) -> int:
    """The size of a table's file on disk, and of its journal."""
    files = (f"{path}{suffix}" for suffix in ("", "-wal", "-journal"))
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def counted(found: Sequence[Holding]) -> str:
    """How many records there are of some environments."""
    measurements, signatures = sum(h.measurements for h in found), sum(h.signatures for h in found)
    return f"{measurements} measurements of {signatures} signatures, {sum(h.plans for h in found)} plans"


def print_refused(refused: Sequence[str]) -> None:
    """Which records were, and why."""
    for reason in refused:
        print_text(f"refused {reason}")
