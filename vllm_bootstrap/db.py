"""SQLite behind one writer thread: durable writes in groups, reads beside them.

Invariants: a write that returned is on disk (committed and, with ``synchronous=FULL``, synced). A write that raised
has changed nothing. After the disk failed once (an I/O error, a failed sync, a damaged file) nothing is written any
more, because nobody can know what of the earlier writes the disk still holds.

Nothing here knows what is stored. Migrations and named queries are ``schema``'s, locks between daemons ``statedir``'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

from vllm_bootstrap.errors import StorageFailed, StorageFull, Unavailable
from vllm_bootstrap.schema import (
    MIGRATIONS,
    CannotOpen,
    Damaged,
    NewerSchema,
    load_queries,
    migrate,
    pending_migrations,
)
from vllm_bootstrap.statedir import AlreadyRunning, StateLock, filesystem_type, is_network_type

__all__ = ["AlreadyRunning", "CannotOpen", "Damaged", "Database", "NewerSchema", "StateLock", "load_queries"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

GROUP_MAX = 128
READERS = 1
BUSY_TIMEOUT_S = 5.0
CHECKPOINT_ROWS = 1000
CHECKED_AT_OPEN_MAX_BYTES = 32 * 1024**2

_IO_ERROR, _FULL = 10, 13
_IO_ERROR_SHM_SIZE = _IO_ERROR | 19 << 8
_DAMAGED = frozenset({11, 26})  # damaged, not a database
_BROKEN = _DAMAGED | {_IO_ERROR}
_PASSING = frozenset({5, 6, 8, 14})  # busy, locked, read-only, cannot open (no file descriptor left)


@dataclass(slots=True)
class _Job:
    work: Work[Any]
    done: Future[Any]
    reads_only: bool = False


class _Regroup(Exception):
    """The transaction of a group is gone; each of its writes is to be tried alone."""


class Database:
    """One open database file. Use ``open``; ``write`` and ``read`` from the event loop; ``close`` once at the end."""

    def __init__(self, path: Path, conn: sqlite3.Connection, *, local: bool, busy_timeout_s: float) -> None:
        self.path = path
        self._writer = conn
        self._local = local
        self._failed: StorageFailed | None = None
        self._closing = False
        self._close_lock = threading.Lock()
        self._rows_at_checkpoint = 0
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"write {path.name}", daemon=True)
        self._thread.start()
        self._readers = _Readers(path, busy_timeout_s) if local else None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        migrations: Path = MIGRATIONS,
        network: bool | None = None,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> Database:
        """Open or make the database and bring its schema up to date. Blocks.

        On a network file system (``network`` None: found out) it uses a rollback journal and keeps the file locked,
        because WAL needs memory shared between processes. ``busy_timeout_s`` is how long another program's lock is
        waited for. Raises ``NewerSchema``, ``Damaged``, and ``CannotOpen`` for what may pass (a full disk, a lock).
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if network is None:
            network = is_network_type(filesystem_type(path))
        if network:
            log.warning("%s lies on a network file system: slower journal, exclusive lock", path)
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            conn = connect(path, busy_timeout_s)
        except (OSError, sqlite3.Error) as exc:
            raise _cannot("open", path, exc) from exc
        try:
            if network:  # before the first look, which would otherwise want shared memory
                conn.execute("PRAGMA locking_mode=EXCLUSIVE")
            pending_migrations(conn, path, migrations)  # a newer database is left as it is
            _prepare(conn, path, synchronous, local=not network)
            migrate(conn, path, migrations)
        except sqlite3.Error as exc:
            conn.close()
            raise _cannot("use", path, exc) from exc
        except BaseException:
            conn.close()
            raise
        return cls(path, conn, local=not network, busy_timeout_s=busy_timeout_s)

    @property
    def failed(self) -> StorageFailed | None:
        """Why nothing is written any more, None while all is well."""
        return self._failed

    async def write(self, work: Work[T]) -> T:
        """Run ``work(connection)`` in a transaction on the writer thread; returns after the commit.

        Several waiting writes share one commit, each in a savepoint of its own, so that one that raises takes back
        only itself. ``work`` may be run more than once and must touch nothing but the connection; it neither begins
        nor commits. Cancelling the caller drops a write that has not begun, and leaves one that has to its end.

        Raises what ``work`` raises; ``StorageFull`` when the disk is full (nothing changed, works again once there
        is room); ``StorageFailed`` when the disk failed, from then on always; ``Unavailable`` when another program
        holds the file.
        """
        if self._failed is not None:
            raise self._again()
        return await asyncio.wrap_future(self._submit(work))

    async def read(self, work: Work[T]) -> T:
        """Run ``work(connection)`` in a read transaction that sees one consistent state. It cannot write.

        Not held up by writes, except on a network file system, where the writer's connection is the only one.
        """
        if self._readers is None:
            return await asyncio.wrap_future(self._submit(work, reads_only=True))
        return await asyncio.wrap_future(self._readers.submit(work))

    def close(self) -> None:
        """Finish what was asked for, then close. Blocks; idempotent. Later calls of ``write`` raise RuntimeError."""
        with self._close_lock:
            if self._closing:
                return
            self._closing = True
            self._queue.put(None)
        self._thread.join()
        if self._readers is not None:
            self._readers.close()
        self._writer.close()

    def _submit(self, work: Work[T], *, reads_only: bool = False) -> Future[T]:
        done: Future[T] = Future()
        with self._close_lock:
            if self._closing:
                raise RuntimeError(f"{self.path} is closed")
            self._queue.put(_Job(work, done, reads_only))
        return done

    def _again(self) -> StorageFailed:
        return StorageFailed(str(self._failed))

    # The writer thread

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            group, last = self._gather(job)
            writes = [j for j in group if not j.reads_only]
            if writes:
                self._write_group(writes)
            for reader in (j for j in group if j.reads_only):
                _settle(reader.done, partial(_read, self._writer, reader.work))
            if last:
                return

    def _gather(self, first: _Job) -> tuple[list[_Job], bool]:
        """Everything that waits now, up to a bound, and whether the end was asked for."""
        group: list[_Job] = []
        job: _Job | None = first
        try:
            while job is not None and len(group) < GROUP_MAX:
                if job.done.set_running_or_notify_cancel():
                    group.append(job)
                if len(group) < GROUP_MAX:
                    job = self._queue.get_nowait()
        except Empty:
            return group, False
        return group, job is None

    def _write_group(self, jobs: list[_Job]) -> None:
        if len(jobs) == 1 or self._failed is not None or not self._together(jobs):
            for job in jobs:
                _settle(job.done, partial(self._alone, job.work))
        self._checkpoint()

    def _together(self, jobs: list[_Job]) -> bool:
        """All writes in one transaction. False when nothing came of it, and each is to be tried alone."""
        conn = self._writer
        try:
            conn.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as exc:
            for job in jobs:  # one wait for the lock is enough for all of them
                _resolve(job.done, None, exc)
            return True
        try:
            outcomes = [self._one_of_many(job.work) for job in jobs]
            conn.execute("COMMIT")
        except (_Regroup, sqlite3.Error) as exc:
            self._rollback()
            self._note(exc.__cause__ if isinstance(exc, _Regroup) else exc)
            return False
        for job, (value, failure) in zip(jobs, outcomes, strict=True):
            _resolve(job.done, value, failure)
        return True

    def _one_of_many(self, work: Work[T]) -> tuple[T | None, Exception | None]:
        conn = self._writer
        conn.execute("SAVEPOINT one")
        try:
            value = work(conn)
        except Exception as exc:
            # Full disks and I/O errors roll the whole transaction back, the others' writes with it.
            if not conn.in_transaction or isinstance(_translated(exc), StorageFull | StorageFailed):
                raise _Regroup from exc
            conn.execute("ROLLBACK TO one")
            conn.execute("RELEASE one")
            return None, exc
        conn.execute("RELEASE one")
        return value, None

    def _alone(self, work: Work[T]) -> T:
        if self._failed is not None:
            raise self._again()
        conn = self._writer
        try:
            conn.execute("BEGIN IMMEDIATE")
            value = work(conn)
            conn.execute("COMMIT")
        except BaseException as exc:
            self._rollback()
            self._note(exc)
            raise
        return value

    def _rollback(self) -> None:
        try:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        except sqlite3.Error as exc:
            self._note(exc)

    def _note(self, exc: BaseException | None) -> None:
        """Remember the first sign of a failed disk."""
        translated = _translated(exc)
        if isinstance(translated, StorageFailed) and self._failed is None:
            self._failed = translated
            log.critical("%s: %s", self.path, translated)

    def _checkpoint(self) -> None:
        """Move the log into the database now and then. SQLite's own way of doing that hides failed syncs."""
        changed = self._writer.total_changes
        if not self._local or self._failed is not None or changed - self._rows_at_checkpoint < CHECKPOINT_ROWS:
            return
        self._rows_at_checkpoint = changed
        try:
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as exc:
            # A full disk is no harm here: the log keeps everything and is moved later.
            self._note(exc)


class _Readers:
    """Connections for reading, one for each thread of a small pool, opened when first needed."""

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self._path, self._busy_timeout_s = path, busy_timeout_s
        self._mine = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix=f"read {path.name}")

    def submit(self, work: Work[T]) -> Future[T]:
        return self._pool.submit(self._work, work)

    def _work(self, work: Work[T]) -> T:
        try:
            conn: sqlite3.Connection | None = getattr(self._mine, "conn", None)
            if conn is None:
                conn = connect(self._path, self._busy_timeout_s)
                conn.execute("PRAGMA query_only=ON")
                self._mine.conn = conn
                self._all.append(conn)
            return _read(conn, work)
        except sqlite3.Error as exc:
            raise _translated(exc) from exc

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        for conn in self._all:
            conn.close()


def connect(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """A connection with our manners: explicit transactions, rows by name, foreign keys, a small cache."""
    conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=busy_timeout_s)
    conn.row_factory = sqlite3.Row
    conn.execute("PRAGMA foreign_keys=ON")
    # Without this, INSERT OR REPLACE would remove rows past the triggers that guard them.
    conn.execute("PRAGMA recursive_triggers=ON")
    conn.execute("PRAGMA cache_size=-1024")
    return conn


def _prepare(conn: sqlite3.Connection, path: Path, synchronous: str, *, local: bool) -> None:
    journal = "WAL" if local else "TRUNCATE"
    got = conn.execute(f"PRAGMA journal_mode={journal}").fetchone()[0]
    if got.upper() != journal:
        raise CannotOpen(f"{path}: the journal mode {journal} is not possible here, SQLite offers {got}")
    conn.execute(f"PRAGMA synchronous={synchronous}")
    conn.execute("PRAGMA wal_autocheckpoint=0")
    conn.execute("PRAGMA journal_size_limit=16777216")
    # A file that cannot be written must be found out now, not at the first launch.
    conn.execute("BEGIN IMMEDIATE")
    conn.execute("ROLLBACK")
    if path.stat().st_size <= CHECKED_AT_OPEN_MAX_BYTES:
        verdict = conn.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise Damaged(f"{path} is damaged ({verdict}): restore it, or move it away to start afresh")


def _read(conn: sqlite3.Connection, work: Work[T]) -> T:
    conn.execute("BEGIN")
    try:
        return work(conn)
    finally:
        if conn.in_transaction:  # an I/O error has ended it already
            conn.execute("ROLLBACK")


def _settle(done: Future[Any], work: Callable[[], Any]) -> None:
    try:
        value = work()
    except BaseException as exc:  # noqa: BLE001 - it belongs to the caller, and this thread must go on
        _resolve(done, None, exc)
    else:
        _resolve(done, value, None)


def _resolve(done: Future[Any], value: Any, exc: BaseException | None) -> None:
    if exc is None:
        done.set_result(value)
    else:
        translated = _translated(exc)
        if translated is not exc:
            translated.__cause__ = exc
        done.set_exception(translated)


def _cannot(what: str, path: Path, exc: OSError | sqlite3.Error) -> CannotOpen:
    damaged = getattr(exc, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
    return (Damaged if damaged else CannotOpen)(f"cannot {what} {path}: {_plain(exc)}")


def _plain(exc: Exception) -> str:
    return "the disk is full: make room" if isinstance(_translated(exc), StorageFull) else str(exc)


def _translated(exc: BaseException | None) -> Any:
    """Our error for what SQLite says about the disk; every other exception is returned as it is."""
    code = getattr(exc, "sqlite_errorcode", None)
    if not isinstance(exc, sqlite3.Error) or code is None:
        return exc
    if code & 0xFF == _FULL or code == _IO_ERROR_SHM_SIZE:
        return StorageFull("The disk of the state directory is full: nothing was changed. Make room and try again.")
    if code & 0xFF in _BROKEN:
        return StorageFailed(f"The state database cannot be relied on any more ({exc}): check the disk, then restart.")
    if code & 0xFF in _PASSING:
        return Unavailable(f"The state database cannot be written right now: {exc}.", retry_after=5)
    return exc
