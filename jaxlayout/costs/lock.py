"""Locks between processes: one process of a machine times at a time, one repairs the table at a time."""

import contextlib
import errno
import logging
import math
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("jaxlayout")

POLL_SECONDS = 0.1
"""How often a waiting process looks again. Polling keeps Ctrl-C and timeouts working everywhere."""

_threads = threading.RLock()
_holder: int | None = None  # the id of this process while one of its threads holds the timing lock


def timing_lock_path() -> pathlib.Path:
    """The file that the processes of this user, on this machine, lock while timing."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return pathlib.Path(tempfile.gettempdir()) / f"jaxlayout-timing-{user}.lock"


@contextlib.contextmanager
def timing_lock(timeout: float | None = None, notify: Callable[[str], object] | None = None) -> Iterator[None]:
    """Holds the right to time on this machine: parallel timing on few cores poisons the table.

    Exclusive among processes of the user and among threads of the process, re-entrant within a thread.
    `timeout`: seconds to wait, None for as long as it takes; TimeoutError after that. `notify` is called
    once, with a sentence, when it has to wait. Where files cannot be locked it only excludes threads, and
    logs so. The system frees the lock of a process that dies.
    """
    global _holder
    deadline = None if timeout is None else time.monotonic() + timeout
    threads = _threads  # a forked child gets a new one; what was acquired is what is released
    if not threads.acquire(blocking=False):
        _tell(notify, "another thread of this process is timing: waiting for it")
        # In steps, since a lock acquired without a timeout cannot be interrupted on Windows.
        while not threads.acquire(timeout=min(_left(deadline), POLL_SECONDS)):
            if _left(deadline) == 0:
                raise TimeoutError(f"another thread was still timing after {timeout} s")
    try:
        if _holder == os.getpid():  # re-entered; a forked child of the holder is not the holder
            yield
            return
        with file_lock(timing_lock_path(), None if timeout is None else _left(deadline), notify, "timing"):
            _holder = os.getpid()
            try:
                yield
            finally:
                _holder = None
    finally:
        threads.release()


@contextlib.contextmanager
def file_lock(
    path: str | os.PathLike[str],
    timeout: float | None = None,
    notify: Callable[[str], object] | None = None,
    what: str = "writing",
) -> Iterator[None]:
    """Holds an exclusive lock on `path`, a file made for this; see `timing_lock` for the arguments.

    Not re-entrant. The file is left behind: removing it would let two processes lock two files of one name.
    """
    descriptor = _open(path)
    if descriptor is None or fcntl is None:
        yield
        return
    owner = os.getpid()
    deadline = None if timeout is None else time.monotonic() + timeout
    locked = False
    try:
        told = False
        while not (locked := _try_lock(descriptor)):
            if not told:
                told = True
                _tell(notify, f"process {_read_holder(descriptor)} is {what} ({path}): waiting for it")
            if _left(deadline) == 0:
                holder = _read_holder(descriptor)
                raise TimeoutError(f"process {holder} was still {what} after {timeout} s ({path})")
            time.sleep(min(_left(deadline), POLL_SECONDS))
        with contextlib.suppress(OSError):  # only for the message of those who wait; the disk may be full
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(owner).encode(), 0)
        yield
    finally:
        # A child forked inside shares the lock. Unlocking, not closing, frees it for everyone, so that is
        # for the owner to do, and it must: the child may live long.
        if locked and os.getpid() == owner:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def locks_work(path: str | os.PathLike[str]) -> bool:
    """Whether the file system of `path`, a file made for this, has the locks that SQLite wants; True if not known."""
    if (descriptor := _open(path)) is None or fcntl is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    finally:
        os.close(descriptor)
    return True


def _open(path: str | os.PathLike[str]) -> int | None:
    """A descriptor to lock, or None (logged) where that cannot be."""
    if fcntl is None:
        logger.info("this platform has no fcntl: %s is not locked against other processes", path)
        return None
    try:
        # O_NOFOLLOW: the folder may be shared, and another user's link must not lead us to some other file.
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        logger.warning("%s cannot be opened (%s): not locked against other processes", path, error)
        return None


def _try_lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        logger.warning("cannot lock (%s): going on without", error)
    return True


def _read_holder(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        text = os.pread(descriptor, 20, 0).decode("ascii", "replace")
        if text.isdigit():
            return text
    return "(unknown)"


def _left(deadline: float | None) -> float:
    """Seconds until the deadline, on the monotonic clock; infinite where there is none."""
    return math.inf if deadline is None else max(0.0, deadline - time.monotonic())


def _tell(notify: Callable[[str], object] | None, message: str) -> None:
    logger.info(message)
    if notify is not None:
        notify(message)


def _reset_in_child() -> None:
    """A forked child holds nothing: the threads that did are not there any more."""
    global _threads, _holder
    _threads, _holder = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)
