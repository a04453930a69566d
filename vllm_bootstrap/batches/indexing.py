"""A program of its own: judges every line of a batch's input and writes the database of its lines.

``python -m vllm_bootstrap.batches.indexing`` reads a ``Task`` as one JSON object from standard input, tells how far it
is in JSON lines on standard output, and says with the last of them what came out. It runs beside the daemon so that a
gigabyte of input delays nobody's request, with low priority, and dies with the daemon.

Invariants: the database stands under its name only when it is whole and on disk, and only when no line has a fault.
Memory: one line, and about 250 bytes for each line (its custom id's hash, its place in the order). Imports the standard
library only, and little of it, since it is started for every batch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_bootstrap.batches.lines import Cut, Cutter, Good, Rules, is_blank, judge
from vllm_bootstrap.batches.ordering import Order
from vllm_bootstrap.batches.types import LineError
from vllm_bootstrap.launches.shim import syscalls
from vllm_bootstrap.schema import MIGRATIONS, migrate

PIECE_BYTES = 1024**2
ROWS_AT_ONCE = 1000
TELL_EVERY_S = 0.2
NICENESS = 10
MAX_MODELS = 100
"""Different models in one batch: each has a queue of its own."""
CACHE_KIB = 16 * 1024

_STAGES = """CREATE TABLE stage.lines (
  key BLOB, model_no INTEGER, line INTEGER, start INTEGER, length INTEGER, custom_id TEXT)"""
_STAGE = "INSERT INTO stage.lines (key, model_no, line, start, length, custom_id) VALUES (?, ?, ?, ?, ?, ?)"
_SORT = """INSERT INTO main.lines (model_no, pos, line, start, length, custom_id)
  SELECT model_no, row_number() OVER (PARTITION BY model_no ORDER BY key), line, start, length, custom_id
  FROM stage.lines ORDER BY model_no, key"""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be done. ``models``: globs of those that may be used, None: all. ``prefixes``: bring lines together
    that begin alike, instead of keeping the order of the file. ``parent``: the process to die with."""

    input: str
    database: str
    endpoint: str
    max_lines: int
    max_line_bytes: int
    max_errors: int = 100
    models: list[str] | None = None
    model_optional: bool = False
    prefixes: bool = True
    parent: int | None = None


@dataclass(slots=True)
class Outcome:
    """``lines`` that ask for something, and how many for each model. ``errors``: the first ones; ``error_count``: all.
    With an error there is no database."""

    lines: int = 0
    models: Counter[str] = field(default_factory=Counter)
    errors: list[LineError] = field(default_factory=list)
    error_count: int = 0


Tell = Callable[[dict[str, Any]], None]


class Indexing:
    """One run."""

    def __init__(self, task: Task, tell: Tell) -> None:
        self._task, self._tell = task, tell
        self._rules = Rules(task.endpoint, None if task.models is None else tuple(task.models), task.model_optional)
        self._order = Order(task.endpoint) if task.prefixes else None
        self._outcome = Outcome()
        self._model_no: dict[str, int] = {}
        # 128 bits under a key that nobody knows: two ids of one hash are not to be met with.
        self._seen: dict[bytes, int] = {}
        self._hash = hashlib.blake2b(key=os.urandom(32), digest_size=16)
        self._rows: list[tuple[object, ...]] = []

    def run(self) -> Outcome:
        """Judge the input; write the database if all of it is good. Raises ``OSError`` and ``sqlite3.Error``."""
        database = Path(self._task.database)
        part, stage = leftovers(database)
        _remove(part, stage)
        try:
            conn = _make(part, stage)
            try:
                self._judge_all(conn)
                self._finish(conn)
            finally:
                conn.close()
            if not self._outcome.errors:
                _remove(stage)  # before the folder is synced, so that it does not come back
                _keep(part, database)
        finally:
            _remove(part, stage)
        return self._outcome

    def _judge_all(self, conn: sqlite3.Connection) -> None:
        cutter, told_at, done = Cutter(self._task.max_line_bytes), 0.0, 0
        with Path(self._task.input).open("rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                if not self._judge(conn, cutter.feed(piece)):
                    return
                done += len(piece)
                if (now := time.monotonic()) - told_at >= TELL_EVERY_S:
                    told_at = now
                    self._tell({"bytes": done, "lines": self._outcome.lines})
        if self._judge(conn, cutter.end()) and not (self._outcome.lines or self._outcome.errors):
            self._fault(LineError("empty_file", "The input has no lines: each line must be one request."))

    def _judge(self, conn: sqlite3.Connection, cuts: Iterator[Cut]) -> bool:
        """False: there is no use in going on."""
        for number, start, raw in cuts:
            if raw is None:
                allowed = f"{self._task.max_line_bytes} bytes"
                self._fault(LineError("line_too_long", f"This line is longer than {allowed}: shorten it.", number))
            elif not is_blank(raw):
                if self._outcome.lines == self._task.max_lines:
                    message = f"The input has more than {self._task.max_lines} lines: split it into several batches."
                    self._fault(LineError("too_many_lines", message))
                    return False
                verdict = judge(raw, number, self._rules)
                self._outcome.lines += 1
                if isinstance(verdict, Good):
                    self._good(conn, verdict, number, start)
                else:
                    self._fault(verdict)
        return True

    def _good(self, conn: sqlite3.Connection, good: Good, number: int, start: int) -> None:
        custom_id, model, body, offset, length = good
        digest = self._hash.copy()
        digest.update(custom_id.encode())
        first = self._seen.setdefault(digest.digest(), number)
        if first != number:
            message = f"This custom_id is that of line {first} already: each line must have its own."
            return self._fault(LineError("duplicate_custom_id", message, number, "custom_id"))
        model_no = self._model_no.get(model)
        if model_no is None:
            if len(self._model_no) == MAX_MODELS:
                message = f"This is more than the {MAX_MODELS}th model: split the input into several batches."
                return self._fault(LineError("too_many_models", message, number, "body.model"))
            model_no = self._model_no[model] = len(self._model_no) + 1
        self._outcome.models[model] += 1
        if self._outcome.errors:
            return None
        key = number.to_bytes(8, "big") if self._order is None else self._order.key(number, body)
        self._rows.append((key, model_no, number, start + offset, length, custom_id))
        if len(self._rows) == ROWS_AT_ONCE:
            self._write(conn)
        return None

    def _fault(self, error: LineError) -> None:
        self._outcome.error_count += 1
        if len(self._outcome.errors) < self._task.max_errors:
            self._outcome.errors.append(error)

    def _write(self, conn: sqlite3.Connection) -> None:
        conn.executemany(_STAGE, self._rows)
        self._rows.clear()

    def _finish(self, conn: sqlite3.Connection) -> None:
        if self._outcome.errors:
            return
        self._write(conn)
        counted = [(number, name, self._outcome.models[name]) for name, number in self._model_no.items()]
        conn.executemany("INSERT INTO models (model_no, name, lines) VALUES (?, ?, ?)", counted)
        conn.execute(_SORT)
        conn.execute("INSERT INTO totals (one, total) VALUES (1, ?)", (self._outcome.lines,))
        conn.execute("COMMIT")


def leftovers(database: Path) -> tuple[Path, Path]:
    """What a run that was killed leaves behind: the database to be, and the lines in the order of the file."""
    return database.with_name(database.name + ".part"), database.with_name(database.name + ".part.stage")


def _make(part: Path, stage: Path) -> sqlite3.Connection:
    """The database to be, and beside it what is thrown away. Nothing is synced before the end."""
    conn = sqlite3.connect(part, isolation_level=None)
    try:
        part.chmod(0o600)
        conn.execute("ATTACH ? AS stage", (str(stage),))
        for schema in ("main", "stage"):
            conn.execute(f"PRAGMA {schema}.journal_mode=OFF")
            conn.execute(f"PRAGMA {schema}.synchronous=OFF")
            conn.execute(f"PRAGMA {schema}.cache_size=-{CACHE_KIB}")
        migrate(conn, part, MIGRATIONS / "batch")
        conn.execute("BEGIN")
        conn.execute(_STAGES)
    except BaseException:
        conn.close()
        raise
    return conn


def _keep(part: Path, database: Path) -> None:
    """On disk, then under its name, then its name on disk."""
    _sync(part)
    # What an earlier run left, and above all its log, which would be taken for this database's.
    _remove(*(database.with_name(database.name + ending) for ending in ("", "-wal", "-shm")))
    part.rename(database)
    _sync(database.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _print(said: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def _is_full(exc: OSError | sqlite3.Error) -> bool:
    if isinstance(exc, OSError):
        return exc.errno in {errno.ENOSPC, errno.EDQUOT}
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def main() -> int:
    """Returns 0 when the outcome was told, whatever it is."""
    task = Task(**json.load(sys.stdin))
    if task.parent is not None:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != task.parent:
            return 1
    os.nice(NICENESS)
    os.environ["SQLITE_TMPDIR"] = str(Path(task.database).parent)  # there is room for it, unlike perhaps in /tmp
    try:
        outcome = Indexing(task, _print).run()
    except (OSError, sqlite3.Error) as exc:
        _print({"failure": str(exc), "full": _is_full(exc)})
        return 1
    models = dict(outcome.models)
    errors = [error._asdict() for error in outcome.errors]
    _print({"lines": outcome.lines, "models": models, "errors": errors, "error_count": outcome.error_count})
    return 0


if __name__ == "__main__":
    sys.exit(main())
