"""`Marker`: a small file that is there while something runs that may take the process down, and stays where it did."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxlayout.measure.contained import this_machine
from jaxlayout.runtime.plain_data import check_format

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("jaxlayout")

FORMAT = 1
"""The number of the form of what is in it."""
MAX_TEXT = 1000


@dataclass(frozen=True, slots=True)
class Marker:
    """Of one program on this machine. The process that has put it there holds a lock on it, which the system frees when
    the process is gone. Where that cannot be (no table's file, no locks), there is no marker."""

    path: Path | None

    @classmethod
    def of(cls, table: Path, *key: str) -> Marker:
        """Beside a table's file."""
        name = hashlib.sha256("\0".join((this_machine(), *key)).encode()).hexdigest()[:16]
        memory = fcntl is None or str(table) == ":memory:"
        return cls(None if memory else table.with_name(f"{table.name}.running-{name}"))

    @contextlib.contextmanager
    def on(self, doing: str) -> Iterator[None]:
        """There for the length of a `with` block: "it was ..."."""
        descriptor = self._put({"format": FORMAT, "doing": doing, "process": os.getpid(), "time": time.time()})
        try:
            yield
        finally:
            if descriptor is not None:
                self.clear()
                os.close(descriptor)

    def left(self) -> str:
        """What a process that is gone was doing when it went; '' where nothing says so."""
        if self.path is None or fcntl is None:
            return ""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            record = json.loads(os.read(descriptor, MAX_TEXT))
            check_format("a marker", record, FORMAT)
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["time"]))
            return f"process {record['process']} ended on {when} while the rewritten function was {record['doing']}"
        except OSError:  # its process is at it
            return ""
        except (ValueError, TypeError, KeyError):
            return "a process ended while the rewritten function was tried"
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Take it away."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _put(self, record: dict[str, object]) -> int | None:
        """The descriptor that holds the lock. None where it cannot be put there, or another process has."""
        if self.path is None or fcntl is None:
            return None
        draft = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:8]}")  # a killed process's may lie there
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            logger.info("no marker at %s: %s", self.path, error)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, json.dumps(record).encode())
            os.link(draft, self.path)  # whole and locked, and not in another's place
        except OSError as error:
            logger.info("no marker at %s: %s", self.path, error)
            os.close(descriptor)
            return None
        finally:
            draft.unlink(missing_ok=True)
        return descriptor
