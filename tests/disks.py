"""A disk that is full, cannot be written, or knows no locks, imitated where SQLite meets the system: its table of
system calls is given ones that refuse."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class _Vfs(ctypes.Structure):
    """SQLite's `sqlite3_vfs`, as far as it is needed."""

    _fields_ = (
        ("iVersion", ctypes.c_int),
        ("szOsFile", ctypes.c_int),
        ("mxPathname", ctypes.c_int),
        ("pNext", ctypes.c_void_p),
        ("zName", ctypes.c_char_p),
        ("pAppData", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 13),
        ("xSetSystemCall", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)),
    )


@contextlib.contextmanager
def system_calls(**calls: Callable[..., int]) -> Iterator[None]:
    """SQLite makes these system calls instead of the system's; OSError in one is what it is told."""
    import _sqlite3

    library = ctypes.CDLL(_sqlite3.__file__)
    find = ctypes.CFUNCTYPE(ctypes.POINTER(_Vfs), ctypes.c_char_p)(("sqlite3_vfs_find", library))
    vfs = find(None)
    integer, pointer = ctypes.c_long, ctypes.c_void_p

    def made(call: Callable[..., int]) -> Any:
        def told(*args: Any) -> int:
            try:
                return call(*args)
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1

        kinds = (pointer, integer, integer) if call is no_writing else (integer, pointer, integer, integer)
        return ctypes.CFUNCTYPE(ctypes.c_int, *kinds, use_errno=True)(told)

    held = {name: made(call) for name, call in calls.items()}
    try:
        for name, function in held.items():
            done = vfs.contents.xSetSystemCall(vfs, name.encode(), ctypes.cast(function, ctypes.c_void_p))
            assert done == sqlite3.SQLITE_OK
        yield
    finally:
        vfs.contents.xSetSystemCall(vfs, None, None)  # all as they were


def no_room(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "no space left")


def no_locks(*_: Any) -> int:
    raise OSError(errno.ENOLCK, "no locks available")


def no_writing(path: int, flags: int, mode: int) -> int:
    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise OSError(errno.EROFS, "read-only file system")
    return os.open(ctypes.string_at(path), flags, mode)


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    with system_calls(pwrite=no_room, pwrite64=no_room, write=no_room, fallocate=no_room):
        yield


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    with system_calls(open=no_writing):
        yield


@contextlib.contextmanager
def without_locks(path: Path) -> Iterator[None]:
    def lockf(*_: Any) -> None:
        no_locks()

    with pytest.MonkeyPatch.context() as patch, system_calls(fcntl=no_locks):
        patch.setattr(fcntl, "lockf", lockf)
        patch.setattr(fcntl, "flock", lockf)
        yield
