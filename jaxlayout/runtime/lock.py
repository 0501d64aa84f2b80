"""A lock between processes: one repairs the table at a time. (Who times stands in line: see `turns`.)"""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("jaxlayout")

POLL_SECONDS = 0.1
"""How often a waiting process looks again. Polling keeps Ctrl-C and timeouts working everywhere."""


@contextlib.contextmanager
def file_lock(path: str | os.PathLike[str], timeout: float, what: str) -> Iterator[None]:
    """Holds an exclusive lock on `path`, a file made for this.

    `timeout`: seconds to wait; TimeoutError after that. `what`: is being done, for the message. Where files cannot be
    locked it does nothing, and logs so. The system frees the lock of a process that dies. Not re-entrant. The file is
    left behind: removing it would let two processes lock two files of one name.
    """
    descriptor = opened(path)
    if descriptor is None or fcntl is None:
        yield
        return
    owner = os.getpid()
    deadline = time.monotonic() + timeout
    locked = False
    try:
        reported = False
        while not (locked := _try_lock(descriptor)):
            if not reported:
                reported = True
                logger.info("process %s is %s (%s): waiting for it", _read_holder(descriptor), what, path)
            left = deadline - time.monotonic()
            if left <= 0:
                holder = _read_holder(descriptor)
                raise TimeoutError(f"process {holder} was still {what} after {timeout} s ({path})")
            time.sleep(min(left, POLL_SECONDS))
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
    if (descriptor := opened(path)) is None or fcntl is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    finally:
        os.close(descriptor)
    return True


def opened(path: str | os.PathLike[str] | Callable[[], str | os.PathLike[str]]) -> int | None:
    """A descriptor to lock, of the file at a path (or at what a function gives, which may find no place for it), or
    None where that cannot be, which is told once."""
    if fcntl is None:
        logger.info("this platform has no fcntl: not locked against other processes")
        return None
    try:
        # O_NOFOLLOW: the folder may be shared, and another user's link must not lead us to some other file.
        found = path() if callable(path) else path
        return os.open(found, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        tell_once(f"not locked against other processes: {error}")
        return None


told: set[str] = set()
"""What this process has been told once."""


def tell_once(message: str) -> None:
    """A warning in the log, the first time that it is given in this process."""
    if message not in told:
        told.add(message)
        logger.warning(message)


def _try_lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        tell_once(f"cannot lock ({error}): going on without")
    return True


def _read_holder(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        text = os.pread(descriptor, 20, 0).decode("ascii", "replace")
        if text.isdigit():
            return text
    return "(unknown)"
