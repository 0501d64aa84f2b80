"""Turns at timing: one thread of one process of a machine times at a time, first come, first served.

Parallel timing on few cores poisons the table. So who times holds the one turn there is, for as long as one race of
candidates takes, and who compiles, or runs something to look at its numbers, pauses meanwhile.

Among the threads of a process the line is a queue. Among processes it is a file of one byte for each ticket: who comes
takes the next number, locks its byte, and has its turn when no lower one is locked by another process (a ticket lock:
Mellor-Crummey and Scott 1991, "Algorithms for scalable synchronization on shared-memory multiprocessors"). The system
frees the bytes of a process that dies. Waiting is polling, which Ctrl-C and deadlines can end everywhere.

Nobody waits for himself: the turn is held only while compiled programs run that call nothing of Python, so whoever has
it comes to an end; and every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import pathlib
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from jaxlayout.runtime.lock import opened, tell_once
from jaxlayout.runtime.process import OfProcess

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("jaxlayout")

POLL_SECONDS = 0.02
TELL_SECONDS = 5.0
"""Seconds. Who waits longer is told for whom."""
DRAWING, TIMING, TICKETS = 0, 1, 64
"""Bytes to lock: to draw a ticket, while timing, and the first ticket."""
HOLDER = 8
"""Where the file says what process is timing. Before that it has the number of the next ticket."""


def timing_lock_path() -> pathlib.Path:
    """The file in which the processes of this user, on this machine, stand in line."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return pathlib.Path(tempfile.gettempdir()) / f"jaxlayout-turns-{user}.lock"


class NoTurn(TimeoutError):
    """There was no turn to be had in the time given, or the waiting was interrupted."""


@dataclass(slots=True)
class Turns:
    """How somebody stands in line, turn after turn."""

    timeout: float = math.inf
    """Seconds to wait, for all turns together; NoTurn after that, and for as long again at once: who comes next would
    wait in vain, too."""
    stop: threading.Event = field(default_factory=threading.Event)
    """NoTurn while waiting once it is set."""
    tell: Callable[[str], object] = logger.warning
    """Called with a sentence, once, where the waiting is long."""
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered for as long as a wait takes."""
    waited: float = 0.0
    """Seconds, up to now."""
    reported: bool = field(default=False, init=False)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Holds the turn. Re-entrant within a thread. Where files cannot be locked it only excludes the other threads,
        and the log says so."""
        line = process_line.value  # a forked child gets a new one, and what was entered is what is left
        if line.owner == threading.get_ident():
            yield
            return
        with line.file() as file, contextlib.ExitStack() as turn:
            with self.waiting():
                wait = _Wait(self)
                turn.enter_context(line.place(wait))
                turn.enter_context(line.ticket(file, wait))
            yield

    def pause(self) -> None:
        """Returns when nobody else is timing: to be called before whatever keeps the machine busy."""
        line = process_line.value
        if line.owner == threading.get_ident():
            return
        with line.file() as file:
            if line.is_quiet(file):
                return
            wait = _Wait(self)
            with self.waiting():
                while not line.is_quiet(file):
                    wait.go_on(lambda: line.who(file))


class _Wait:
    """One wait."""

    def __init__(self, turns: Turns):
        self._turns, self._start = turns, time.monotonic() - turns.waited

    def go_on(self, who: Callable[[], str]) -> None:
        """Wait a little. Raises where the waiting has to end. `who`: is waited for."""
        turns, line = self._turns, process_line.value
        turns.waited = time.monotonic() - self._start
        if turns.stop.is_set():
            raise NoTurn("interrupted while waiting for a turn to time")
        if turns.waited >= turns.timeout:
            line.given_up(turns.timeout)
            raise NoTurn(f"{who()} was still timing after {turns.timeout:g} s of waiting")
        if line.in_vain(turns.timeout):
            raise NoTurn(f"{who()} is timing, and a call has just waited for {turns.timeout:g} s in vain")
        if turns.waited >= TELL_SECONDS and not turns.reported:
            turns.reported = True
            turns.tell(f"{who()} is timing: waiting for a turn, to not disturb its measurements or one's own")
        time.sleep(min(POLL_SECONDS, turns.timeout - turns.waited))


class Line:
    """The line that this process's threads stand in, and the process's place in the line of processes."""

    def __init__(self) -> None:
        self.owner: int | None = None
        """The thread that is timing."""
        self._vain = 0.0, 0.0
        """Until when who has no more than so many seconds need not wait: that has just been tried."""
        self.queue: deque[object] = deque()
        """Its threads, the first of them timing or waiting for other processes."""
        self._lock = threading.Lock()
        self._file: int | None = None
        self._users = 0

    @contextmanager
    def file(self) -> Iterator[int | None]:
        """The file, open; None where there is none. To close any descriptor of it would give up all locks that the
        process has in it, so there is one for all threads, closed by the last."""
        with self._lock:
            if self._users == 0:
                self._file = opened(timing_lock_path)
            self._users += 1
            file = self._file
        try:
            yield file
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0 and self._file is not None:
                    os.close(self._file)
                    self._file = None

    @contextmanager
    def place(self, wait: _Wait) -> Iterator[None]:
        """The first place among this process's threads."""
        me = object()
        self.queue.append(me)
        try:
            while self.queue[0] is not me:
                wait.go_on(lambda: "another thread of this process")
            yield
        finally:
            self.queue.remove(me)

    @contextmanager
    def ticket(self, file: int | None, wait: _Wait) -> Iterator[None]:
        """The turn, for the thread in the first place."""
        try:
            mine = 0 if file is None else self._drawn(file, wait)
            while not self._begun(file, mine):
                wait.go_on(lambda: self.who(file))
            yield
        finally:
            with self._lock:
                self.owner = None
                if file is not None:
                    _unlock(file, TIMING)

    def _drawn(self, file: int, wait: _Wait) -> int:
        """How many tickets there have been, with the one that is drawn and now locked."""
        while not _locked(file, DRAWING):
            wait.go_on(lambda: self.who(file))
        try:
            mine = int.from_bytes(os.pread(file, HOLDER, 0), "little") % 2**48
            _locked(file, TICKETS + mine)
            with contextlib.suppress(OSError):  # the disk is full: two of one number, who are served by chance
                os.pwrite(file, (mine + 1).to_bytes(HOLDER, "little"), 0)
            return mine + 1
        finally:
            _unlock(file, DRAWING, 1)

    def _begun(self, file: int | None, mine: int) -> bool:
        """Whether timing can begin, with the last of so many tickets: no earlier one is there, and nobody is just
        looking whether it has."""
        with self._lock:
            if file is not None and not (_locked(file, TICKETS, mine) and _locked(file, TIMING)):
                return False
            self.owner = threading.get_ident()
        self._vain = 0.0, 0.0
        if file is not None:
            with contextlib.suppress(OSError):
                os.pwrite(file, f"{os.getpid():<20}".encode(), HOLDER)
        return True

    def given_up(self, seconds: float) -> None:
        """Somebody has waited for so long in vain."""
        if not self.in_vain(seconds):  # else somebody with more patience has
            self._vain = time.monotonic() + seconds, seconds

    def in_vain(self, seconds: float) -> bool:
        """Whether that is as good as known of a wait that may last so long."""
        until, tried = self._vain
        return seconds <= tried and time.monotonic() < until

    def is_quiet(self, file: int | None) -> bool:
        """Whether nobody is timing."""
        with self._lock:  # a lock of this process's own is no obstacle, and would be given up here
            if self.owner is not None:
                return False
            if file is None or not _locked(file, TIMING, shared=True):
                return file is None
            _unlock(file, TIMING, 1)
            return True

    def who(self, file: int | None) -> str:
        """Who is timing."""
        if self.owner is not None or file is None:
            return "another thread of this process"
        with contextlib.suppress(OSError):
            text = os.pread(file, 20, HOLDER).decode("ascii", "replace").strip()
            if text.isdigit():
                return f"process {text}"
        return "another process"


process_line = OfProcess(Line)


def _locked(file: int, start: int, count: int = 1, *, shared: bool = False) -> bool:
    """Whether no other process has any of these bytes locked; they are now."""
    assert fcntl is not None
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, count, start)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        tell_once(f"cannot lock ({error}): going on without")
    return True


def _unlock(file: int, start: int, count: int = 0) -> None:
    """Bytes from one on; all that follow where no count is given."""
    assert fcntl is not None
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.lockf(file, fcntl.LOCK_UN, count, start)
