"""What `malloc` does with the memory of arrays that are gone, and whose it is."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_PERTURB, _M_ARENA_MAX = -1, -4, -6, -8
_SOIL = 0x40
"""Bytes of this and of its complement are numbers of ordinary size in every floating-point format."""
_LARGEST = 2**31 - 1
_SEEN, _PAGES = 2**26, 8
"""Bytes of a large array, and how many pages of it are looked at, one in each eighth: also where a page is large."""

_AROUND, _ALIGNED = 2**16, 64
"""Bytes before and after an array that are ours to fill; what XLA:CPU aligns arrays to."""
NANS = 0xFF
"""Bytes of a NaN in every floating-point format, and of -1."""


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed arrays for the next ones, in this whole process.

    XLA:CPU allocates the results and temporary buffers of each call anew. By default glibc hands large ones back to the
    system, which gives them out again page by page, zeroed: in a network or a training step that can take a third of
    the time. The price is that the process stays as large as it has ever been. Best called before JAX computes
    anything; the environment variables MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_ARENA_MAX=1 do the
    same.

    Returns whether the C library took it: False elsewhere than on glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _LARGEST, _M_ARENA_MAX: 1}
    took = all([mallopt(option, value) for option, value in settings.items()])
    keeps_freed_memory.cache_clear()  # after it: another thread may look meanwhile
    return took


def allocator() -> str:
    """Whose `malloc` this process has, by its library's name, and what becomes of freed memory, in words."""
    kept = keeps_freed_memory()
    does = "" if kept is None else " keeps freed memory" if kept else " gives freed memory back"
    return f"{_library() or 'unknown'}{does}"


@cache
def keeps_freed_memory() -> bool | None:
    """Whether the memory of a large array that is gone serves the next one in this process, whatever has told `malloc`
    so before this is first asked, or `keep_freed_memory` since. Seen by taking memory twice and touching some pages of
    it: 64 MiB beside all that lies free, since what smaller arrays left behind serves the next one in any case. Once:
    glibc gives back what it keeps when that is more than 2 GiB. None where that cannot be seen (with glibc it can)."""
    if not _library().startswith("libc.") or not hasattr(libc := ctypes.CDLL(None), "mallinfo2"):
        return None
    import resource

    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.mallinfo2.restype = _Mallinfo
    size = _SEEN + libc.mallinfo2().free

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt

    def touch() -> int | None:
        """How many of the pages touched have to be given by the system, be it to `malloc`, where that fills them."""
        before = faults()
        if (start := libc.malloc(size)) is None:
            return None
        for n in range(_PAGES):
            ctypes.memset(start + n * (size // _PAGES), 1, 1)
        new = faults() - before
        libc.free(start)
        return new

    touch()
    new = touch()
    return None if new is None else new < _PAGES // 2


def _library() -> str:
    """The name of the file that has the `malloc` of this process (one that is loaded first replaces the C library's);
    '' where that cannot be told."""
    if os.name == "nt":
        return ""
    libc = ctypes.CDLL(None)
    found = _Found()
    if not hasattr(libc, "dladdr") or not libc.dladdr(ctypes.cast(libc.malloc, ctypes.c_void_p), ctypes.byref(found)):
        return ""
    return os.path.basename(os.fsdecode(found.file or b""))


class _Mallinfo(ctypes.Structure):
    """What `mallinfo2` counts, in bytes; of interest here is what lies free."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (*"abcdefgh", "free", "top"))


class _Found(ctypes.Structure):
    """What `dladdr` tells of an address: file, where that begins, the symbol, where that begins."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("start", ctypes.c_void_p),
    )


@contextmanager
def soiled_memory() -> Iterator[None]:
    """Have glibc fill memory with numbers when it gives it out and when it gets it back, in this whole process for the
    length of a `with` block. Elsewhere than on glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    mallopt(_M_PERTURB, _SOIL)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def amid(array: np.ndarray, fill: int = NANS) -> np.ndarray:
    """A copy with some byte before and after it, so aligned that XLA:CPU reads it where it lies: what reads past an
    array is right by luck where it finds zeros."""
    held = np.full(array.nbytes + 2 * _AROUND + _ALIGNED, fill, np.uint8)
    start = _AROUND + -(held.ctypes.data + _AROUND) % _ALIGNED
    copy = held[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
