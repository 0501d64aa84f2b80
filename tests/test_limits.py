"""Cores and memory by the limits of control groups, read from made-up files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxlayout.runtime import limits
from jaxlayout.runtime.limits import cores, memory_left

GIB = 2**30
MACHINE = {"proc/meminfo": f"MemTotal:  {64 * 2**20} kB\nMemAvailable:  {32 * 2**20} kB\nHugePages_Total: 0\n"}
V1 = "9:name=systemd:/\n4:memory:/docker/f00d\n1:cpu,cpuacct:/docker/f00d\n0::/\n"


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMORY = [
    ("no groups", {}, 32 * GIB),
    ("no limit, version 2", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 32 * GIB),
    (
        "a container, version 2",
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 77\ninactive_file {2 * GIB}\n",
        },
        3 * GIB,
    ),
    (
        "nested, the outer one is tighter",
        {
            "proc/self/cgroup": "0::/batch/job\n",
            "sys/fs/cgroup/batch/job/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/batch/job/memory.current": "0\n",
            "sys/fs/cgroup/batch/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/batch/memory.current": f"{6 * GIB}\n",
        },
        2 * GIB,
    ),
    (
        "nested, the inner one is tighter",
        {
            "proc/self/cgroup": "0::/batch/job\n",
            "sys/fs/cgroup/batch/job/memory.max": f"{1 * GIB}\n",
            "sys/fs/cgroup/batch/job/memory.current": "0\n",
            "sys/fs/cgroup/batch/memory.max": "max\n",
        },
        1 * GIB,
    ),
    (
        "throttled before the limit",
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory.high": f"{5 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{1 * GIB}\n",
        },
        4 * GIB,
    ),
    (
        "nothing is left",
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{1 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
        },
        0,
    ),
    (
        "version 1, where the container sees itself as the outermost",
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{1 * GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
        },
        3 * GIB // 2,
    ),
    (
        "version 1, seen from outside",
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{1 * GIB}\n",
            "sys/fs/cgroup/memory/docker/f00d/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/docker/f00d/memory.usage_in_bytes": "0\n",
        },
        2 * GIB,
    ),
    ("a path out of what is seen", {"proc/self/cgroup": "0::/../../other\n"}, 32 * GIB),
    ("what makes no sense", {"proc/self/cgroup": "what\n\n", "sys/fs/cgroup/memory.max": "much"}, 32 * GIB),
]


@pytest.mark.parametrize(("contents", "left"), [case[1:] for case in MEMORY], ids=[case[0] for case in MEMORY])
def test_memory_left(tmp_path, contents, left):
    assert memory_left(files(tmp_path, MACHINE | contents)) == left


def test_where_nothing_is_told_it_is_what_the_machine_has(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.get, raising=False)
    assert memory_left(tmp_path) == 4096000
    monkeypatch.delattr(os, "sysconf")
    assert memory_left(tmp_path) is None


CORES = [
    ("no groups", {}, 8),
    ("no quota", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
    ("a container", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
    ("less than one", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
    ("more than there are", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
    (
        "nested",
        {
            "proc/self/cgroup": "0::/batch/job\n",
            "sys/fs/cgroup/batch/job/cpu.max": "max 100000\n",
            "sys/fs/cgroup/batch/cpu.max": "300000 100000\n",
        },
        3,
    ),
    (
        "version 1",
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/docker/f00d/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/docker/f00d/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
]


@pytest.mark.parametrize(("contents", "count"), [case[1:] for case in CORES], ids=[case[0] for case in CORES])
def test_cores(tmp_path, monkeypatch, contents, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert cores(files(tmp_path, contents)) == count


def test_a_candidate_may_take_half_of_what_is_left(monkeypatch):
    from jaxlayout.measure import trials

    class Device:
        platform = "cpu"

    monkeypatch.setattr(trials, "memory_left", lambda: 1000)
    assert trials.available_memory(Device) == 500
    monkeypatch.setattr(trials, "memory_left", lambda: None)
    assert trials.available_memory(Device) is None


def test_here():
    assert cores() >= 1 and (limits.memory_left() or 1) > 0
