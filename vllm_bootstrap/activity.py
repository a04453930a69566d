"""The capped history of finished requests: who asked for what, how long it took, how it ended. No content, no keys.

Invariant: the data plane never waits for it and never fails because of it. ``record`` costs a list's append; rows are
written about once a second by the database's own thread, and what the disk cannot take is dropped and counted. A
daemon that is killed loses at most what came since the last write, a machine that loses power also what its disk had
not got yet; the file stays whole in both cases.

Must not know: HTTP, metrics, how requests come about. Everything but the writing happens on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vllm_bootstrap.db import CannotOpen, Database
from vllm_bootstrap.errors import ApiError, NotFound
from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.schema import MIGRATIONS

log = logging.getLogger(__name__)
T = TypeVar("T")

ACTIVITY_MIGRATIONS = MIGRATIONS / "activity"
FLUSH_S = 1.0
FLUSH_ROWS = 2_000
BUFFER_ROWS = 20_000
LOOKING = frozenset({"GET", "HEAD"})
PRUNE_STEP = 5_000
# Rows of one INSERT: each statement lets go of the interpreter once, so few large ones hold the event loop up least.
CHUNK = 64


class ActivityRow(NamedTuple):
    """One finished request. ``id`` counts up with the order in which requests ended. ``ttft_ms`` is from the request's
    arrival to the first byte of a streamed answer, waiting included."""

    id: int
    request_id: str
    started_at: float
    cls: str | None
    owner: str
    model: str | None
    launch_id: str | None
    method: str
    path: str
    status: int
    code: str | None
    stream: bool
    queue_ms: int
    ttft_ms: float | None
    duration_ms: float
    prompt_tokens: int | None
    completion_tokens: int | None
    bytes_in: int
    bytes_out: int


class UsageRow(NamedTuple):
    """Sums over the requests that the history still holds. ``failed``: answered with 400 or above, or broken
    off after the answer had begun."""

    owner: str
    cls: str | None
    model: str | None
    requests: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    first_at: float
    last_at: float


@dataclass(frozen=True, slots=True)
class ActivityFilter:
    """Which rows are wanted; None: all. ``statuses`` is a range, both ends included; ``since`` unix seconds."""

    model: str | None = None
    cls: str | None = None
    owner: str | None = None
    statuses: tuple[int, int] | None = None
    since: float | None = None

    def where(self) -> tuple[str, list[Any]]:
        """The condition in SQL and its values."""
        wanted: list[tuple[str, Sequence[Any]]] = []
        for column, value in (("model", self.model), ("class", self.cls), ("owner", self.owner)):
            if value is not None:
                wanted.append((f"{column} = ?", [value]))
        if self.statuses is not None:
            wanted.append(("status BETWEEN ? AND ?", self.statuses))
        if self.since is not None:
            wanted.append(("started_at >= ?", [self.since]))
        condition = " AND ".join(part for part, _ in wanted) or "1"
        return condition, [value for _, values in wanted for value in values]


_COLUMNS = (
    "node_id, request_id, started_at, class, owner, model, launch_id, method, path, status, code, stream, queue_ms, "
    "ttft_ms, duration_ms, prompt_tokens, completion_tokens, bytes_in, bytes_out"
)
_SHOWN = "id, " + _COLUMNS.removeprefix("node_id, ")
_ROW = "(" + ", ".join("?" * len(_COLUMNS.split(","))) + ")"


class Activity:
    """The history of one daemon. ``rows`` is how many requests it keeps; ``off`` says why there is none."""

    def __init__(self, database: Database | None, *, rows: int, node_id: str = "local", off: str = "") -> None:
        self._database = database
        self._rows, self._node_id = rows, node_id
        self.off = off
        self.dropped = 0
        self._pending: list[RequestRecord] = []
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._closed = database is None
        self._complained = False

    @classmethod
    def open(cls, path: Path, *, rows: int, node_id: str = "local") -> Activity:
        """Open or make the history. Blocks. A file that cannot be used is left alone and no history is kept: that is
        no reason not to serve."""
        if rows == 0:
            return cls(None, rows=0, off="No history is kept: VLLM_BOOTSTRAP_ACTIVITY_ROWS is 0.")
        try:
            database = Database.open(path, synchronous="NORMAL", migrations=ACTIVITY_MIGRATIONS)
        except CannotOpen as exc:
            log.warning("No history of requests is kept until the next start: %s", exc)
            return cls(None, rows=rows, off=f"No history is kept at the moment: {exc}")
        return cls(database, rows=rows, node_id=node_id)

    # From the data plane

    def record(self, record: RequestRecord) -> None:
        """Keep a finished request. What was turned away at the door, without a key that fits, is not kept: anybody
        could push the history out with it. Nor is what needs no slot (``/proxy/…/metrics``): a scraper would."""
        if record.owner is None or self._closed or _is_looking(record):
            return
        pending = self._pending
        if len(pending) >= FLUSH_ROWS:
            self._flush()
            if len(self._pending) >= BUFFER_ROWS:
                self.dropped += 1
                return
            pending = self._pending
        pending.append(record)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    # Writing

    def _flush(self) -> None:
        """Hand what has gathered to the writer, unless it still has its hands full."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is None:
            records, self._pending = self._pending, []
            self._writing = asyncio.get_running_loop().create_task(self._write(records), name="write activity")

    async def _write(self, records: list[RequestRecord]) -> None:
        assert self._database is not None  # noqa: S101 - without one nothing is ever recorded
        over = 0
        try:
            over = await self._database.write(partial(_store, records, self._node_id, self._rows))
            self._complained = False
        except (ApiError, RuntimeError, sqlite3.Error) as exc:
            self.dropped += len(records)
            if not self._complained:
                log.warning("Finished requests are missing from the history: %s", exc)
            self._complained = True
        finally:
            self._writing = None
        if (self._pending or over > 0) and self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    async def settle(self) -> None:
        """Return when everything recorded so far is written, or dropped."""
        for _ in range(2):  # what was under way, then what has gathered meanwhile
            if self._writing is None and self._pending:
                self._flush()
            if self._writing is not None:
                await asyncio.shield(self._writing)

    async def close(self) -> None:
        """Write what is left and close the file. Idempotent."""
        if self._closed or self._database is None:
            return
        self._closed = True
        await self.settle()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._database.close()

    # Reading

    async def page(
        self, wanted: ActivityFilter, *, after: int | None = None, limit: int = 100
    ) -> tuple[list[ActivityRow], bool]:
        """Finished requests, newest first, from the one before ``after`` on, and whether there are more. Raises
        ``NotFound`` when no history is kept."""
        rows = await self._read(partial(_page, wanted, after, limit + 1))
        return rows[:limit], len(rows) > limit

    async def usage(self, since: float | None = None) -> tuple[list[UsageRow], float | None]:
        """Sums by key, class and model, and since when the history is complete (None: it is empty). Raises
        ``NotFound`` when no history is kept."""
        return await self._read(partial(_usage, since))

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._database is None or self._closed:
            raise NotFound(self.off or "The daemon is shutting down.")
        await self.settle()
        return await self._database.read(work)


def _is_looking(record: RequestRecord) -> bool:
    return record.cls is None and (record.status < 400 or record.method in LOOKING)


def _store(records: list[RequestRecord], node_id: str, cap: int, conn: sqlite3.Connection) -> int:
    """Add rows and remove some that are too many. Returns how many are still too many."""
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        values = [value for record in chunk for value in _values(record, node_id)]
        conn.execute(f"INSERT INTO requests ({_COLUMNS}) VALUES {', '.join([_ROW] * len(chunk))}", values)  # noqa: S608 - our own names
    first, last = conn.execute("SELECT min(id), max(id) FROM requests").fetchone()
    over = 0 if last is None else last - first + 1 - cap
    if over <= 0:
        return 0
    now = min(over, PRUNE_STEP + len(records))
    conn.execute("DELETE FROM requests WHERE id < ?", [first + now])
    return int(over - now)


def _values(record: RequestRecord, node_id: str) -> Iterable[Any]:
    ttft = None
    if record.stream and record.first_byte_s is not None:
        ttft = round(record.queue_ms + record.first_byte_s * 1000, 3)
    return (
        node_id, record.request_id, record.started_at, record.cls, record.owner, record.model, record.launch_id,
        record.method, record.path, record.status, record.code, bool(record.stream), record.queue_ms, ttft,
        round(record.duration_s * 1000, 3), record.prompt_tokens, record.completion_tokens, record.bytes_in,
        record.bytes_out,
    )  # fmt: skip


def _page(wanted: ActivityFilter, after: int | None, limit: int, conn: sqlite3.Connection) -> list[ActivityRow]:
    condition, values = wanted.where()
    if after is not None:
        condition, values = f"id < ? AND {condition}", [after, *values]
    query = f"SELECT {_SHOWN} FROM requests WHERE {condition} ORDER BY id DESC LIMIT ?"  # noqa: S608 - our own names
    rows = [ActivityRow(*row) for row in conn.execute(query, [*values, limit])]
    return [row._replace(stream=bool(row.stream)) for row in rows]


def _usage(since: float | None, conn: sqlite3.Connection) -> tuple[list[UsageRow], float | None]:
    rows = conn.execute(
        "SELECT owner, class, model, count(*), sum(status >= 400 OR code IS NOT NULL), "
        "coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), "
        "min(started_at), max(started_at) FROM requests WHERE started_at >= ? "
        "GROUP BY owner, class, model ORDER BY owner, class, model",
        [since or 0],
    ).fetchall()
    oldest = conn.execute("SELECT started_at FROM requests ORDER BY id LIMIT 1").fetchone()
    return [UsageRow(*row) for row in rows], None if oldest is None else oldest[0]
