"""What this process may take of the machine: cores and memory, by the limits of the control groups that it is in
(containers, batch systems) as well as by what the machine has. `root`: where the system's files are, for tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """Cores: its affinity, or fewer where a group's quota of time is lower."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([here, *(max(1, round(share)) for share in _shares(root))])


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes that may still be taken: of what the machine has available, or of what is left to a group where that is
    less. None where it is not known."""
    return min([*_machine(root), *(max(0, left) for left in _left(root))], default=None)


def _shares(root: Path) -> Iterator[float]:
    """The cores' worth of time that each group of the process has."""
    for group in _groups(root, "cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                quota, period = (int(word) for name in names for word in (group / name).read_text().split())
                if quota > 0 and period > 0:  # -1: no quota
                    yield quota / period


def _left(root: Path) -> Iterator[int]:
    """What each group of the process has left. What it has of files is given up when memory is short: that counts as
    left, as far as it is not in use."""
    for group in _groups(root, "memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):
                most, now = (int((group / name).read_text()) for name in (limit, used))
                yield most - max(0, now - _fields(group / "memory.stat").get(cached, 0))


def _machine(root: Path) -> Iterator[int]:
    """What the machine has available, or all it has where that is not told."""
    if (kilobytes := _fields(root / "proc/meminfo").get("MemAvailable:")) is not None:
        yield kilobytes * 1024
    elif hasattr(os, "sysconf"):
        with contextlib.suppress(OSError, ValueError):
            yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _fields(file: Path) -> dict[str, int]:
    """The lines of a file that are a name and a number."""
    with contextlib.suppress(OSError, ValueError):
        words = (line.split() for line in file.read_text().splitlines())
        return {some[0]: int(some[1]) for some in words if len(some) > 1 and some[1].isdigit()}
    return {}


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of a controller's groups that the process is in, the innermost first: a limit holds for all inside.
    A container sees its own folder as the outermost, and may be told of a path to it that is not there."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):  # version 2, or 1
                top = root / "sys/fs/cgroup" / (controller if controllers else "")
                names = [name for name in path.split("/") if name not in ("", "..")]
                yield from (top.joinpath(*names[:depth]) for depth in range(len(names), -1, -1))
