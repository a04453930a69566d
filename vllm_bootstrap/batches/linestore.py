"""One batch's lines and records: a database of its own beside the input file.

Invariants: a line is finished exactly when its record is committed, has one record at most, and keeps the first one it
got; the totals change in the transaction that changes the records. What a method returned is on disk. Methods hold
a bounded part of the batch in memory, whatever its size.

Must not know: the life of a batch, how lines are run, engines, HTTP. ``indexing`` makes the database.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vllm_bootstrap.batches import output
from vllm_bootstrap.batches.types import Counts, Line, Record, TokenUsage
from vllm_bootstrap.db import CannotOpen, Damaged, Database
from vllm_bootstrap.errors import StorageFailed
from vllm_bootstrap.schema import MIGRATIONS

BATCH_MIGRATIONS = MIGRATIONS / "batch"
STEP_LINES = 250
"""How many lines one transaction of the bulk operations takes."""
CHUNK_BYTES = 1024**2
CHUNK_RECORDS = 1000

_TOTALS = "SELECT total, completed, failed, retried, prompt, cached, completion, reasoning FROM totals"
_UNFINISHED = """SELECT l.pos, l.line, l.start, l.length, l.custom_id, t.attempts, t.deaths
  FROM lines l LEFT JOIN troubles t ON t.line = l.line
  WHERE l.model_no = ? AND l.pos > ? AND NOT EXISTS (SELECT 1 FROM records r WHERE r.line = l.line)
  ORDER BY l.pos LIMIT ?"""
_ADD = """INSERT INTO records (line, ok, attempts, finished_at, data) VALUES (?, ?, ?, ?, ?)
  ON CONFLICT (line) DO NOTHING"""
_COUNT = """UPDATE totals SET completed = completed + ?, failed = failed + ?, retried = retried + ?,
  prompt = prompt + ?, cached = cached + ?, completion = completion + ?, reasoning = reasoning + ?"""
_FAILED = "SELECT record, attempts FROM records WHERE ok = 0 ORDER BY line LIMIT ?"
_CHUNK = {
    True: "SELECT line, data FROM records WHERE ok = 1 AND line > ? ORDER BY line LIMIT ?",
    False: "SELECT line, data FROM records WHERE ok = 0 AND line > ? ORDER BY line LIMIT ?",
}


class Totals(NamedTuple):
    """``usage``: what the engines said of all records ever written, those that were dropped for a retry included.
    ``retried``: records that took more than one attempt."""

    counts: Counts
    usage: TokenUsage
    retried: int


class LineStore:
    """Use ``open``; everything else from one event loop; ``close`` once at the end."""

    def __init__(self, database: Database, input_fd: int, batch_id: str) -> None:
        self._database = database
        self._batch_id = batch_id
        self._input_fd = input_fd
        # By model: up to which position all lines are finished. Looked for from the start only once.
        self._finished_to: dict[int, int] = {}
        self._forgotten = 0
        self._closed = False

    @classmethod
    def open(cls, database: Path, input: Path) -> LineStore:  # noqa: A002 - it is the input
        """Open what ``indexing`` has made; the database's name without its ending is the batch's id. Blocks. Raises
        ``Damaged`` where either file is missing or not whole, ``CannotOpen`` (``NewerSchema``) where it cannot be used
        as things are."""
        if not database.is_file():
            raise Damaged(f"{database} is missing: the lines of this batch are not known any more")
        try:
            fd = os.open(input, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            gone = isinstance(exc, FileNotFoundError)
            raise (Damaged if gone else CannotOpen)(f"cannot open the input {input}: {exc.strerror}") from exc
        try:
            return cls(Database.open(database, migrations=BATCH_MIGRATIONS), fd, database.stem)
        except BaseException:
            os.close(fd)
            raise

    @property
    def failed(self) -> StorageFailed | None:
        """Why nothing is written any more, None while all is well."""
        return self._database.failed

    def close(self) -> None:
        """Finish what was asked for, then close. Blocks; idempotent."""
        self._database.close()
        if not self._closed:
            self._closed = True
            os.close(self._input_fd)

    async def models(self) -> list[tuple[int, str, int]]:
        """Number, name and lines of each model, in the order in which they first appear. The name is empty where lines
        name none."""
        rows = await self._database.read(_rows("SELECT model_no, name, lines FROM models ORDER BY model_no"))
        return [(row[0], row[1], row[2]) for row in rows]

    async def totals(self) -> Totals:
        """The sums of this moment. Takes the same time whatever the size of the batch."""
        return await self._database.read(_totals)

    async def next(self, model_no: int, after_pos: int, most: int, max_bytes: int) -> tuple[list[Line], int | None]:
        """Unfinished lines of a model behind a position in the order of work: ``most``, or as many as have bodies of
        ``max_bytes`` together (one at least). Second: the position to go on behind, None when no unfinished line is
        left there. Raises ``StorageFailed`` when the input is not what it was."""
        forgotten = self._forgotten
        finished_to = self._finished_to.get(model_no, 0)
        start = max(after_pos, finished_to)
        rows = _rows(_UNFINISHED, model_no, start, most + 1)
        lines, on, first = await self._database.read(lambda conn: self._take(rows(conn), model_no, most, max_bytes))
        if after_pos <= finished_to and forgotten == self._forgotten and first is not None:
            self._finished_to[model_no] = max(first - 1, self._finished_to.get(model_no, 0))
        return lines, on

    async def finish(self, records: Sequence[Record], now: float) -> Totals:
        """Write records, all of them or none. A line that has one already keeps it and counts nothing."""
        return await self._database.write(lambda conn: _finish(conn, records, now))

    async def note(self, troubles: Sequence[tuple[int, int, int]]) -> None:
        """Remember (line, attempts, deaths) of lines that go on without a record."""

        def work(conn: sqlite3.Connection) -> None:
            conn.executemany("INSERT OR REPLACE INTO troubles (line, attempts, deaths) VALUES (?, ?, ?)", troubles)

        await self._database.write(work)

    async def fail_rest(self, code: str, message: str, now: float) -> Totals:
        """Give each unfinished line a failed record. In bounded transactions: stopped in the middle, what is written
        stays, and another call goes on."""
        for model_no, _, _ in await self.models():
            after: int | None = 0
            while after is not None:
                rows = await self._database.read(_rows(_UNFINISHED, model_no, after, STEP_LINES))
                if rows:
                    await self.finish([self._failure(row, code, message) for row in rows], now)
                after = rows[-1][0] if rows else None
        return await self.totals()

    async def forget_failed(self) -> int:
        """Drop failed records and what was noted of troubles, so that those lines are unfinished again. Returns how
        many there were. Bounded transactions, as with ``fail_rest``."""
        dropped = 0
        while True:
            step = await self._database.write(_forget)
            self._forgotten += 1
            self._finished_to.clear()
            dropped += step
            if step < STEP_LINES:
                return dropped

    async def records(self, ok: bool, after_line: int = 0) -> AsyncGenerator[list[tuple[int, bytes]], None]:
        """(line, data) of the completed or the failed records behind a line, by line, in chunks of bounded size. Goes
        on while records are written: those that come meanwhile behind the place where it stands are seen too."""
        while True:
            chunk = await self._database.read(partial(_chunk, ok=ok, after=after_line))
            if not chunk:
                return
            yield chunk
            after_line = chunk[-1][0]

    def _failure(self, row: sqlite3.Row, code: str, message: str) -> Record:
        _, number, _, _, custom_id, attempts, _ = row
        data = output.error_line(output.record_id(self._batch_id, number), custom_id, code, message)
        return Record(number, False, attempts or 0, data)

    # On the reader's thread

    def _take(
        self, rows: list[sqlite3.Row], model_no: int, most: int, max_bytes: int
    ) -> tuple[list[Line], int | None, int | None]:
        lines: list[Line] = []
        taken = 0
        for pos, number, start, length, custom_id, attempts, deaths in rows:
            if len(lines) == most or (lines and taken + length > max_bytes):
                return lines, lines[-1].pos, rows[0][0]
            taken += length
            body = self._body(number, start, length)
            lines.append(Line(number, model_no, pos, custom_id, body, attempts or 0, deaths or 0))
        return lines, None, rows[0][0] if rows else None

    def _body(self, number: int, start: int, length: int) -> bytes:
        try:
            body = os.pread(self._input_fd, length, start)
        except OSError as exc:
            raise StorageFailed(f"Line {number} of the input cannot be read: {exc.strerror}") from exc
        if len(body) != length:
            raise StorageFailed(f"Line {number} of the input is not there any more: the file was cut off")
        return body


def _rows(statement: str, *values: object) -> Callable[[sqlite3.Connection], list[sqlite3.Row]]:
    return lambda conn: conn.execute(statement, values).fetchall()


def _totals(conn: sqlite3.Connection) -> Totals:
    row = conn.execute(_TOTALS).fetchone()
    return Totals(Counts(*row[:3]), TokenUsage(*row[4:]), row[3])


def _finish(conn: sqlite3.Connection, records: Sequence[Record], now: float) -> Totals:
    completed = failed = retried = prompt = cached = completion = reasoning = 0
    add = conn.cursor()
    for number, ok, attempts, data, usage in records:
        add.execute(_ADD, (number, ok, attempts, now, data))
        if add.rowcount != 1:
            continue
        if ok:
            completed += 1
        else:
            failed += 1
        retried += attempts > 1
        prompt += usage.prompt
        cached += usage.cached
        completion += usage.completion
        reasoning += usage.reasoning
    conn.execute(_COUNT, (completed, failed, retried, prompt, cached, completion, reasoning))
    conn.executemany("DELETE FROM troubles WHERE line = ?", [(record.number,) for record in records])
    return _totals(conn)


def _forget(conn: sqlite3.Connection) -> int:
    rows = conn.execute(_FAILED, (STEP_LINES,)).fetchall()
    conn.executemany("DELETE FROM records WHERE record = ?", [(row[0],) for row in rows])
    retried = sum(row[1] > 1 for row in rows)
    conn.execute("UPDATE totals SET failed = failed - ?, retried = retried - ?", (len(rows), retried))
    if len(rows) < STEP_LINES:
        conn.execute("DELETE FROM troubles")
    return len(rows)


def _chunk(conn: sqlite3.Connection, *, ok: bool, after: int) -> list[tuple[int, bytes]]:
    chunk: list[tuple[int, bytes]] = []
    taken = 0
    for line, data in conn.execute(_CHUNK[ok], (after, CHUNK_RECORDS)):
        chunk.append((line, data))
        taken += len(data)
        if taken >= CHUNK_BYTES:
            break
    return chunk
