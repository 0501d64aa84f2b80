"""`keep_freed_memory`, in a process of its own: what it says holds for all of one."""

from __future__ import annotations

import sys

import pytest
from helpers import python

PROGRAM = """
import resource
import sys

from jaxlayout.runtime.malloc import allocator, keep_freed_memory, keeps_freed_memory, soiled_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def fill():
    b"x" * 2**26  # and gone


fill()
before = faults()
fill()
more = faults() - before
assert keeps_freed_memory() == (more < 2**26 // resource.getpagesize() // 10), more
print(more)

# It is part of what measurements are kept under: what other arrays leave behind must not change it.
said = allocator()
b"x" * (31 * 2**20)  # from now on glibc takes what is smaller than this from its heap
held = [b"x" * (20 * 2**20) for _ in range(10)]
last = b"x" * 2**20  # above them: they stay in the heap
held.clear()
def seen_anew():
    keeps_freed_memory.cache_clear()
    return allocator()


assert seen_anew() == said
with soiled_memory():
    assert seen_anew() == said
"""


def page_faults(how: str) -> int:
    return int(python("-c", PROGRAM, how).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is about glibc")
def test_pages_are_kept():
    if (given_back := page_faults("as it is")) < 1000:
        pytest.skip("large arrays are not handed back here")
    assert page_faults("keep") < given_back / 10
