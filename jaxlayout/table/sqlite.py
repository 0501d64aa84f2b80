"""The file of the cost table: opening it, reading what can be read, telling what is wrong with it.

What a record means is the concern of `table`; here it is a row of texts. Errors are those of `sqlite3`.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import sqlite3
import time
from collections.abc import Collection, Generator, Iterator, Mapping
from typing import Any

SCHEMA_VERSION = 1
APPLICATION_ID = 0x6A6C6179  # "jlay", in the file's header: tells our tables from other people's databases

MEMORY = "file::memory:"
CHECKED_BYTES = 64 * 2**20
"""Largest file that is checked as a whole when it is opened."""

COLUMNS = {
    "measurements": ("env", "signature", "candidate", "record"),
    "plans": ("env", "function", "skeleton", "sizes", "payload"),
}
KEYS = {"measurements": 3, "plans": 2}
"""How many of a table's columns, from the left, are its key."""

SCHEMA = f"""
CREATE TABLE measurements(env TEXT NOT NULL, signature TEXT NOT NULL, candidate TEXT NOT NULL,
    record TEXT NOT NULL, checksum TEXT NOT NULL, PRIMARY KEY(env, signature, candidate));
CREATE TABLE plans(env TEXT NOT NULL, function TEXT NOT NULL, skeleton TEXT NOT NULL,
    sizes TEXT NOT NULL, payload TEXT NOT NULL, checksum TEXT NOT NULL, PRIMARY KEY(env, function));
CREATE INDEX plans_by_skeleton ON plans(env, skeleton);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""

NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse.sshfs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "smb3",
    "virtiofs",
}
"""File systems that several machines may mount: SQLite's shared memory seems to work there, and does not."""

BATCH = 1000
"""Records read, checked or written at a time: what bounds the memory that a large table takes."""
MAX_ROWID = 2**63 - 1

Row = tuple[str, ...]
"""The values of one record in the order of COLUMNS, without its checksum."""
Record = tuple[str, str, Row, object]
"""A record from elsewhere, not yet validated: what to call it, its table, its values, its checksum."""

logger = logging.getLogger("jaxlayout")


def file_at(path: pathlib.Path) -> pathlib.Path:
    """The file of a table that is asked for by a path: of that name, or where a table of another schema has the name,
    `<stem>-<schema>` beside it. So versions of different schemas that are used in turn keep a table each."""
    own = path.parent / f"{path.stem}-{SCHEMA_VERSION}{path.suffix}"
    return own if os.path.exists(own) or schema_of(path) not in (None, SCHEMA_VERSION) else path


def schema_of(path: pathlib.Path) -> int | None:
    """The schema of a cost table's file, as its header says; None for a file that is none, or cannot be read."""
    header = b""
    with contextlib.suppress(OSError):
        if os.path.isfile(path):  # to open a pipe might wait
            with path.open("rb") as file:
                header = file.read(72)
    ours = header.startswith(b"SQLite format 3\0") and int.from_bytes(header[68:72]) == APPLICATION_ID
    return int.from_bytes(header[60:64]) if ours else None


class UnusableError(sqlite3.DatabaseError):
    """Not a cost table of this schema, or one whose parts contradict each other."""


ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises. The second: an error message that quotes damaged text."""


def connect(
    uri: str, timeout: float = 0.0, path: pathlib.Path | None = None, salvage: bool = False
) -> sqlite3.Connection:
    """A connection to a cost table. `path`: its file, if it may be written; an empty one gets the schema."""
    connection = sqlite3.connect(uri, timeout=timeout, uri=True, isolation_level=None, check_same_thread=False)
    try:
        # A flipped byte may leave no UTF-8. The checksum refuses that record; an error would stop them all.
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        connection.execute("PRAGMA trusted_schema = OFF")  # merge() opens files from elsewhere
        if salvage:
            connection.execute("PRAGMA writable_schema = ON")  # or SQLite refuses to read a file cut short
        if path is not None or uri == MEMORY:
            _create(connection)
        _check(connection, whole=not salvage)
        if path is not None:
            _choose_journal(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_to_read(path: pathlib.Path, timeout: float, salvage: bool = False) -> sqlite3.Connection:
    """A connection that does not write. Raises DatabaseError where the file is no sound cost table.

    `salvage`: it may be cut short.
    """
    try:
        return connect(f"{path.as_uri()}?mode=ro", timeout, salvage=salvage)
    except sqlite3.OperationalError:
        # Even a reader of a write-ahead log writes beside the file, which a read-only folder forbids.
        return connect(f"{path.as_uri()}?immutable=1", timeout, salvage=salvage)


def _create(connection: sqlite3.Connection) -> None:
    """Makes the tables in an empty database."""

    def is_empty() -> bool:
        return _pragma(connection, "schema_version") == 0

    if is_empty():
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if is_empty():  # still: another process may have been quicker
                for statement in SCHEMA.split(";"):
                    connection.execute(statement)


def _check(connection: sqlite3.Connection, whole: bool) -> None:
    """Raises DatabaseError where this is not a cost table of this schema. `whole`: or not a sound one."""
    if _pragma(connection, "application_id") != APPLICATION_ID:
        raise UnusableError("the file is not a cost table")
    if (version := _pragma(connection, "user_version")) != SCHEMA_VERSION:
        raise UnusableError(f"its schema is version {version}, not {SCHEMA_VERSION}")
    # A damaged index takes records and does not find them: they would be measured again in every process.
    # A few milliseconds for each megabyte.
    if whole and _pragma(connection, "page_count") * _pragma(connection, "page_size") <= CHECKED_BYTES:
        problem = _pragma(connection, "integrity_check(1)")
        if problem != "ok":
            raise UnusableError(problem)


def _choose_journal(connection: sqlite3.Connection, path: pathlib.Path) -> None:
    """A write-ahead log, with which readers never wait, where that works; else a plain journal."""
    wanted = "delete" if on_network(path) else "wal"
    try:
        mode = _pragma(connection, "journal_mode")
        if mode != wanted:
            mode = connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()[0]
    except sqlite3.OperationalError as error:
        logger.info("%s: no write-ahead log: %s", path, error)
        if not is_busy(error):  # else whoever is writing chooses: the mode is the file's, not ours
            connection.execute("PRAGMA journal_mode = DELETE")
        return
    if mode == "wal":
        connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last records, not the file


def _pragma(connection: sqlite3.Connection, name: str) -> Any:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def on_network(path: pathlib.Path) -> bool:
    """Whether the file is on a file system of several machines. Known on Linux only; elsewhere False."""
    try:
        lines = pathlib.Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    real, kind, longest = os.path.realpath(path), "", 0
    for mount, this in (line.split()[1:3] for line in lines):
        folder = mount.replace("\\040", " ").rstrip("/") + "/"
        if real.startswith(folder) and len(folder) >= longest:  # the later of two mounts hides the earlier
            kind, longest = this, len(folder)
    return kind in NETWORK


def insert(connection: sqlite3.Connection, rows: Mapping[str, list[Row]], clash: str = "REPLACE") -> bool:
    """Writes rows in one transaction. `clash`: what to do with keys that are there, REPLACE or IGNORE."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for table, these in rows.items():
            names = (*COLUMNS[table], "checksum")
            query = f"INSERT OR {clash} INTO {table}({', '.join(names)}) VALUES({', '.join('?' * len(names))})"
            connection.executemany(query, ((*row, checksum(table, row)) for row in these))
    return True


def clear(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for table in COLUMNS:
            connection.execute(f"DELETE FROM {table}")


def remove(connection: sqlite3.Connection, environments: Collection[str]) -> int:
    """Deletes the rows of some environments; how many."""
    before = connection.total_changes
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for table in COLUMNS:
            connection.executemany(f"DELETE FROM {table} WHERE env = ?", ((env,) for env in environments))
    removed = connection.total_changes - before
    with contextlib.suppress(sqlite3.OperationalError):  # somebody is reading, or the disk is full: it stays as large
        connection.execute("VACUUM")
    return removed


def rename(path: pathlib.Path) -> pathlib.Path:
    """Renames a database to `<name>.damaged-<time>`, and its journals with it. Raises OSError.

    Other processes may have it open. SQLite notices that a file has moved, and leaves the new one alone.
    """
    name = f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}"
    aside, number = path.with_name(name), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{name}-{number}")
    for suffix in ("-wal", "-shm", "-journal"):  # first: they must never meet a new database
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    os.rename(path, aside)
    return aside


def identity(path: pathlib.Path) -> tuple[int, int] | None:
    """(device, inode), or None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_damage(error: Exception) -> bool:
    """Whether waiting or trying elsewhere is in vain: this file will never be a table again."""
    # SQLITE_ERROR: our statements are correct, so what they name is not there.
    codes = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
    return isinstance(error, UnusableError | UnicodeDecodeError) or _code(error) in codes


def is_busy(error: Exception) -> bool:
    """Whether another process has the file locked, and may let go of it."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def _code(error: Exception) -> int:
    """SQLite's primary result code, 0 for an error that is not SQLite's."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def stored(path: pathlib.Path, timeout: float, refused: list[str]) -> Iterator[Record]:
    """The records of a table's file, oldest first; `refused` gets a reason where they cannot be read."""
    try:
        connection = connect_to_read(path, timeout, salvage=True)
    except ERRORS as error:
        refused.append(f"{path.name}: {error}")
        return
    with contextlib.closing(connection):
        for table in COLUMNS:
            problem = yield from _readable(connection, table)
            if problem:  # a damaged page stops the reading: start from the other end too
                refused.append(f"{table}: {problem}")
                yield from reversed(list(_readable(connection, table, backwards=True)))


def _readable(connection: sqlite3.Connection, table: str, backwards: bool = False) -> Generator[Record, None, str]:
    """The records up to the first that cannot be read; returns why that cannot. Some at a time, so that a table of any
    size may be read while others, or who reads, write to it: what comes in meanwhile is not among them."""
    beyond, order = ("<", "DESC") if backwards else (">", "ASC")
    names = ", ".join(COLUMNS[table])
    query = (
        f"SELECT rowid, {names}, checksum FROM {table} WHERE rowid {beyond} ? AND rowid <= ? "
        f"ORDER BY rowid {order} LIMIT {BATCH}"
    )
    try:
        newest = connection.execute(f"SELECT max(rowid) FROM {table}").fetchone()[0]
    except ERRORS:
        newest = MAX_ROWID
    last, problem = MAX_ROWID if backwards else -MAX_ROWID, ""
    while not problem:
        rows = []
        try:
            for row in connection.execute(query, (last, newest)):
                rows.append(row)  # one by one: those before an error are kept
        except ERRORS as error:
            problem = str(error)
        for last, *values, checksum in rows:
            yield f"{table}[{last}]", table, tuple(values), checksum
        if len(rows) < BATCH:
            break
    return problem


def checksum(table: str, row: Row) -> str:
    """Over keys and values: a record under another key is not valid. Guards against accidents, not malice."""
    digest = hashlib.sha256(table.encode())
    for text in row:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]
