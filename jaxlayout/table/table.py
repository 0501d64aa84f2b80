"""`CostTable`: the measurements and plans of all processes of a user, in one SQLite file.

Nothing that happens to the file reaches the user's program: what cannot be read is measured again, what
cannot be written is kept for this process, and one `TableWarning` says so.

- Every record carries a checksum over its keys and its value. A record that fails it is no record.
- A file that is damaged, or not ours, is renamed to `<name>.damaged-<time>`; what is valid in it is copied
  into a new one.
- A file of another schema is another version's, and left alone: this one's is beside it (`sqlite.file_at`).
- Many processes may write at once: each call of `record...` is one transaction. Where shared memory does not
  work (network file systems) the journal is an ordinary file.
"""

import contextlib
import itertools
import logging
import os
import pathlib
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from jaxlayout.runtime.lock import file_lock, locks_work
from jaxlayout.table import sqlite
from jaxlayout.table.measurement import Measurement
from jaxlayout.table.records import (
    ENVIRONMENT,
    ENVIRONMENT_FORMAT,
    FORMAT,
    compact,
    exported,
    measurement_of,
    mismatch_of,
    problem_of,
    stored_in,
    valid_rows,
)
from jaxlayout.table.sqlite import COLUMNS, KEYS, SCHEMA_VERSION, Record, Row

MAX_LIKE = 32
"""Most plans that `plans_like` returns."""
REPAIR_SECONDS = 30.0
"""How long to wait for another process that is setting the file aside."""
UNREADABLE = "cannot be read; what it holds will be measured again"

NOWHERE: Mapping[str, str] = {}

T = TypeVar("T")

logger = logging.getLogger("jaxlayout")


class TableWarning(UserWarning):
    """The cost table's file is not as it should be. The program is right all the same, if slow to start."""


def default_path() -> pathlib.Path:
    """`table.sqlite` in the user's cache folder."""
    import platformdirs

    return platformdirs.user_cache_path("jaxlayout") / "table.sqlite"


def describe(env: str, description: Mapping[str, Any]) -> None:
    """Tells the tables of this process what an environment is: they keep it beside the first record in it."""
    _descriptions[env] = description


_descriptions: dict[str, Mapping[str, Any]] = {}


class CostTable:
    """Measurements by (environment, signature, candidate) and plans by (environment, function).

    `path`: the file, made when first needed; None for `default_path()`; ":memory:" for none. Where a table of another
    schema has it, it is another file (`sqlite.file_at`). `timeout`: seconds to wait for another process that is
    writing. Threads may share a table, forked children too.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, timeout: float = 5.0):
        self._in_memory = path == ":memory:"  # also once the file has proved to be out of reach
        path = pathlib.Path(default_path() if path is None else path)
        self.asked = self.path = path if self._in_memory else path.absolute()
        self._timeout = self._patience = timeout
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # (device, inode) of the open file
        # Rows that the file refused, by key: written with the next ones that it takes.
        self._unsaved: dict[str, dict[Row, Row]] = {table: {} for table in COLUMNS}
        self._warned: set[str] = set()
        self._described: set[str] = set()
        _tables.add(self)  # see the end of this file

    def __repr__(self) -> str:
        return f"CostTable({str(self.path)!r})"

    def __enter__(self) -> "CostTable":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self):
        if (connection := getattr(self, "_connection", None)) is not None:
            connection.close()

    # Measurements

    def measurements(self, env: str, signature: str) -> dict[str, Measurement]:
        """What is known of a signature's candidates in an environment: candidate id -> Measurement."""
        rows = self._select("measurements", {"env": env, "signature": signature})
        return {row[2]: measurement_of(row[3]) for row in rows}

    def record(self, env: str, signature: str, candidate: str, measurement: Measurement) -> None:
        """Keeps one measurement, in place of an earlier one."""
        self.record_many(env, signature, {candidate: measurement})

    def record_many(self, env: str, signature: str, measurements: Mapping[str, Measurement]) -> None:
        """Keeps measurements of one signature, all or (when the process is killed) none of them."""
        rows = [(env, signature, candidate, compact(m.to_json())) for candidate, m in measurements.items()]
        self._write({"measurements": rows, "plans": self._description(env)})

    # Plans

    def load_plan(self, env: str, function: str) -> str | None:
        """The payload stored for a function in an environment, or None."""
        rows = self._select("plans", {"env": env, "function": function})
        return rows[0][4] if rows else None

    def store_plan(self, env: str, function: str, skeleton: str, sizes: str, payload: str) -> None:
        """Keeps a plan (`payload`, JSON text), in place of an earlier one of the same function.

        `skeleton`: what functions that differ in sizes alone have in common; `sizes`: a JSON list of numbers.
        """
        self._write({"plans": [*self._description(env), (env, function, skeleton, sizes, payload)]})

    def plans_like(self, env: str, skeleton: str) -> list[tuple[str, str, str]]:
        """(function, sizes, payload) of the plans of one skeleton, newest first, at most MAX_LIKE."""
        rows = self._select("plans", {"env": env, "skeleton": skeleton}, MAX_LIKE)
        return [(function, sizes, payload) for _, function, _, sizes, payload in rows]

    # The whole table

    def counts(self) -> dict[str, int]:
        """How many valid records there are: "measurements", "plans"; and "unsaved", those not in the file."""
        found: dict[str, int] = {}

        def count(connection: sqlite3.Connection) -> None:
            for table in COLUMNS:
                found[table] = sum(_function(row) != ENVIRONMENT for row in self._rows(connection, table))

        with self._lock:
            self._run(count, None, UNREADABLE)
            unsaved = {table: list(rows.values()) for table, rows in self._unsaved.items()}
        for table, rows in unsaved.items():
            found[table] = found.get(table, 0) + sum(_function(row) != ENVIRONMENT for row in rows)
        return found | {"unsaved": sum(map(len, unsaved.values()))}

    def export_json(self, path: str | os.PathLike[str]) -> None:
        """Writes every valid record to a file of JSON values, one a line, whole or not at all. Raises OSError where it
        cannot."""
        target = pathlib.Path(path)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        failed: list[OSError] = []

        def write(connection: sqlite3.Connection) -> bool:
            try:
                with temporary.open("w", encoding="utf-8") as file:
                    for line in self._lines(connection):
                        file.write(compact(line) + "\n")
            except OSError as error:  # the file's, not the table's
                failed.append(error)
            return True

        try:
            with self._lock:
                if not self._run(write, False, UNREADABLE):
                    with contextlib.closing(sqlite.connect(sqlite.MEMORY)) as none:
                        write(none)  # what this process has
            if failed:
                raise failed[0]
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _lines(self, connection: sqlite3.Connection) -> Iterator[dict[str, Any]]:
        """What an exported file has in its lines: what it is, and the records, oldest first, so that an import keeps
        the order."""
        yield {"format": FORMAT, "schema": SCHEMA_VERSION}
        for table, columns in COLUMNS.items():
            names = ("table", *columns, "checksum")
            for row in itertools.chain(self._rows(connection, table, order="ASC"), self._unsaved[table].values()):
                yield dict(zip(names, (table, *row, sqlite.checksum(table, row)), strict=True))

    def import_json(self, path: str | os.PathLike[str]) -> tuple[int, list[str]]:
        """Adds the records of an exported file; they replace what is here under the same keys.

        Returns (how many were accepted, why each of the others was refused). Raises OSError for no such file.
        """
        refused: list[str] = []
        return self._add(exported(pathlib.Path(path), refused), refused), refused

    def merge(self, other: str | os.PathLike[str]) -> tuple[int, list[str]]:
        """Adds the records of another table's file, as `import_json` does. What it does to that file: see
        `records.look`."""
        refused: list[str] = []
        return self._add(stored_in(other, self._timeout, refused), refused), refused

    def forget(self, environments: Collection[str]) -> int:
        """Removes all records of some environments, and gives their room back to the file system where nobody else has
        the file open. How many there were."""
        with self._lock:
            for table, rows in self._unsaved.items():
                self._unsaved[table] = {key: row for key, row in rows.items() if key[0] not in environments}
            self._described -= set(environments)
            failure = "cannot be pruned; its records stay"
            return self._run(lambda connection: sqlite.remove(connection, environments), 0, failure)

    def clear(self) -> None:
        """Forgets every record."""
        with self._lock:
            self._described = set()
            self._unsaved = {table: {} for table in COLUMNS}
            self._run(sqlite.clear, None, "cannot be cleared; its records stay")

    def close(self) -> None:
        """Lets go of the file. The table can still be used, and opens it again."""
        with self._lock:
            if any(self._unsaved.values()):
                self._write({})  # another chance: who held the file may have let go of it
            self._disconnect()

    # Reading and writing

    def _description(self, env: str) -> list[Row]:
        """The row that says what an environment is, once a process."""
        description = _descriptions.get(env.partition("-")[0])  # "-relaxed" may follow
        if description is None or env in self._described:
            return []
        self._described.add(env)
        payload = compact({"format": ENVIRONMENT_FORMAT, "environment": description, "written": time.time()})
        return [(env, ENVIRONMENT, ENVIRONMENT, "[]", payload)]

    def _select(self, table: str, where: Mapping[str, str] = NOWHERE, limit: int | None = None) -> list[Row]:
        """The valid rows that have the values of `where` in the columns it names, newest first."""
        keys = KEYS[table]
        found: dict[Row, Row] = {}

        def read(connection: sqlite3.Connection) -> None:
            for row in self._rows(connection, table, where):
                if len(found) == limit:
                    return
                found.setdefault(row[:keys], row)

        with self._lock:
            found |= {key: row for key, row in reversed(self._unsaved[table].items()) if _matches(table, row, where)}
            self._run(read, None, UNREADABLE)
            return list(found.values())[:limit]

    def _rows(
        self, connection: sqlite3.Connection, table: str, where: Mapping[str, str] = NOWHERE, order: str = "DESC"
    ) -> Iterator[Row]:
        """The valid rows in the file, but for those that an unsaved one replaces. Needs the lock held."""
        condition = " AND ".join(f"{name} = ?" for name in where) or "1"
        names = ", ".join((*COLUMNS[table], "checksum"))
        query = f"SELECT {names} FROM {table} WHERE {condition} ORDER BY rowid {order}"
        with contextlib.closing(connection.execute(query, tuple(where.values()))) as cursor:
            for *values, checksum in cursor:
                row = tuple(values)
                if problem := problem_of(table, row, deep=False) or mismatch_of(table, row, checksum):
                    logger.warning("%s: skipped a record of %s: %s", self.path, table, problem)
                elif row[: KEYS[table]] not in self._unsaved[table] and _matches(table, row, where):
                    yield row

    def _write(self, rows: Mapping[str, Iterable[Row]]) -> None:
        """Keeps rows that make sense; see `_keep`."""
        sound: dict[str, list[Row]] = {table: [] for table in rows}
        for table, row in [(table, row) for table, those in rows.items() for row in those]:
            if problem := problem_of(table, row):
                logger.warning("%s: did not keep a record of %s: %s", self.path, table, problem)
            else:
                sound[table].append(row)
        self._keep(sound)

    def _keep(self, rows: Mapping[str, Iterable[Row]]) -> None:
        """Keeps valid rows, in one transaction: in the file, or else, with a warning, for this process."""
        with self._lock:
            for table, row in [(table, row) for table, those in rows.items() for row in those]:
                key = row[: KEYS[table]]
                self._unsaved[table].pop(key, None)  # the newest come last
                self._unsaved[table][key] = row
            pending = {table: list(unsaved.values()) for table, unsaved in self._unsaved.items()}
            if not any(pending.values()):
                return
            failure = "cannot be written; new records are kept for this process, and written when that works"
            written = self._run(lambda connection: sqlite.insert(connection, pending), False, failure)
            if written and self._is_current():  # else another process set it aside meanwhile: write them again
                self._unsaved = {table: {} for table in COLUMNS}
                self._patience = self._timeout

    def _add(self, records: Iterable[Record], refused: list[str]) -> int:
        """Keeps the valid ones of `records`, adds to `refused` why not the others; how many were kept."""
        count = 0
        for found in valid_rows(records, refused):
            self._keep(found)
            count += sum(map(len, found.values()))
        return count

    def _run(self, operation: Callable[[sqlite3.Connection], T], default: T, failure: str) -> T:
        """`operation` on the open table; `default`, and a warning, where that fails. Needs the lock held."""
        try:
            try:
                return operation(self._open())
            except sqlite.ERRORS as error:
                if self._in_memory or not sqlite.is_damage(error):
                    raise
                self._set_aside(error)
                return operation(self._open())
        except (*sqlite.ERRORS, OSError) as error:
            if sqlite.is_busy(error):
                self._patience = min(0.1, self._timeout)  # waited once: not again for every record
            self._warn(f"{failure} ({error})", failure)
            return default

    # The file

    def _open(self) -> sqlite3.Connection:
        """The open connection; opened again when the file is not the one it was, but set aside or deleted."""
        if self._connection is None or not self._is_current():
            self._disconnect()
            self._connect()
        if self._connection is None:
            self._connection = sqlite.connect(sqlite.MEMORY)
        self._connection.execute(f"PRAGMA busy_timeout = {int(self._patience * 1000)}")
        return self._connection

    @property
    def _lock_path(self) -> str:
        return f"{self.path}.lock"

    def _is_current(self) -> bool:
        """Whether the open file is still the one of that name."""
        return self._in_memory or self._file == sqlite.identity(self.path)

    def _connect(self) -> None:
        """Opens the file to write, or else to read, or else not at all. Raises where damaged or locked.

        Only this, and `_set_aside`, send the table to memory for good.
        """
        if self._in_memory:
            return
        self.path = sqlite.file_at(self.asked)
        if self.path != self.asked:
            logger.info("%s is of another schema, or was: records are in %s", self.asked, self.path)
        # Looked at before it is opened: if it is replaced in between, the next call opens it again.
        self._file = sqlite.identity(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite.connect(f"{self.path.as_uri()}?mode=rwc", self._patience, self.path)
            self._file = self._file or sqlite.identity(self.path)
        except (sqlite3.OperationalError, OSError) as error:
            if sqlite.is_busy(error) and not locks_work(self._lock_path):  # all that SQLite says of ENOLCK is "locked"
                self._in_memory = True
                self._warn("is where files cannot be locked; records are kept for this process only")
                return
            if sqlite.is_busy(error) or sqlite.is_damage(error):
                raise
            with contextlib.suppress(sqlite3.OperationalError, OSError):
                if self.path.stat().st_size:  # else the disk was full when it was made: nothing to read, or damaged
                    self._connection = sqlite.connect_to_read(self.path, self._patience)
            if self._connection is not None:  # enough for a program that finds here all it needs
                logger.info("%s is only read: %s", self.path, error)
                return
            self._in_memory = True
            self._warn(f"cannot be opened; records are kept for this process only ({error})")

    def _set_aside(self, error: Exception) -> None:
        """Renames the unusable file; copies what is valid in it to a new one, in memory where that fails."""
        self._disconnect()
        with file_lock(self._lock_path, REPAIR_SECONDS, what="repairing the cost table"):
            if self._file != sqlite.identity(self.path):
                return  # another process was quicker
            if self.path != sqlite.file_at(self.asked):
                return  # a process of another schema has just made this file, and it is not damaged
            try:
                aside = sqlite.rename(self.path)
            except OSError as failure:
                logger.warning("%s cannot be renamed: %s", self.path, failure)
                self._in_memory, aside = True, self.path
            lost: list[str] = []
            count = 0
            for kept in valid_rows(sqlite.stored(aside, self._timeout, lost), lost):
                # Not in place of what other processes have written to the new file by now.
                sqlite.insert(self._open(), kept, "IGNORE")
                count += sum(map(len, kept.values()))
        for reason in lost:
            logger.info("%s: %s", aside, reason)
        what = "cannot be renamed, so it is not used" if self._in_memory else f"set aside as {aside.name}"
        self._warn(f"not usable ({error}): {what}; {count} valid records were saved from it")

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _warn(self, message: str, once: str = "") -> None:
        """Warns, once of each kind. Comes last wherever it is called: a warning may be an exception."""
        message = f"jaxlayout's cost table {self.path}: {' '.join(message.split())}"
        if (once or message) in self._warned:
            logger.info(message)
        else:
            self._warned.add(once or message)
            warnings.warn(message, TableWarning, stacklevel=2)


def _matches(table: str, row: Row, where: Mapping[str, str]) -> bool:
    return all(row[COLUMNS[table].index(name)] == value for name, value in where.items())


def _function(row: Row) -> str:
    return row[1]  # a measurement's signature is never ENVIRONMENT


# A connection must not be carried into a forked child (https://sqlite.org/howtocorrupt.html). So it is
# closed before, with the lock held (no other thread is inside SQLite then), and opened again by whoever needs
# it. One in memory is just memory.

_tables: "weakref.WeakSet[CostTable]" = weakref.WeakSet()
_forking = threading.local()


def _before_fork() -> None:
    _forking.tables = sorted(_tables, key=id)  # in one order, or two threads that fork could block each other
    for table in _forking.tables:
        table._lock.acquire()
        if not table._in_memory:
            table._disconnect()


def _after_fork() -> None:
    for table in _forking.__dict__.pop("tables", ()):
        table._lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
