"""Batches, their history, and what is remembered of their creation, in ``state.db``.

Invariants: a state and its history row change in one transaction; what a method returned is on disk. It decides
nothing: states come from ``jobs``. It knows no lines, no files and no clock.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from vllm_bootstrap.batches.jobs import TERMINAL, Phase, State, Why
from vllm_bootstrap.batches.types import BatchEvent, BatchRow, Counts, LineError, TokenUsage, Webhook
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.schema import load_queries

SQL = load_queries(Path(__file__).with_name("queries.sql"))
NO_DETAIL: Mapping[str, Any] = {}
LARGEST_SEQ = 2**63 - 1  # callers may ask for more than SQLite can count
_STEP = 200

# Named here because the class has a method called list.
Rows = list[BatchRow]
Events = list[BatchEvent]


class Creation(NamedTuple):
    """The Idempotency-Key of a request that creates something. ``request_hash`` tells one request from another."""

    owner: str
    key: str
    request_hash: str


class Created(NamedTuple):
    """``result_id`` names what was created; ``again``: by an earlier request with the same key."""

    result_id: str
    again: bool = False


class BatchStore:
    """All methods raise ``StorageFull`` or ``StorageFailed`` as ``Database.write``."""

    def __init__(self, db: Database, node_id: str = "local") -> None:
        self._db = db
        self._node_id = node_id

    async def create(self, row: BatchRow, creation: Creation | None) -> Created:
        """Store a batch with its first history row. Raises ``BadRequest`` when the key was used for another request."""

        def work(conn: sqlite3.Connection) -> Created:
            before = recall(conn, creation)
            if before is not None:
                return before
            conn.execute(SQL["insert_batch"], {**_values(row), "node_id": self._node_id})
            _append(conn, row, row.created_at, "created", None, NO_DETAIL)
            remember(conn, creation, row.id, row.created_at)
            return Created(row.id)

        return await self._db.write(work)

    async def recalled(self, creation: Creation | None) -> Created | None:
        """What was created with this Idempotency-Key. Raises ``BadRequest`` as ``create``."""
        return await self._db.read(lambda conn: recall(conn, creation))

    async def change(
        self,
        row: BatchRow,
        at: float,
        event: str,
        before: Phase,
        detail: Mapping[str, Any] = NO_DETAIL,
        also: Callable[[sqlite3.Connection], None] | None = None,
    ) -> None:
        """Store ``row`` as it is after ``event``, with a history row. ``also`` is done in the same transaction."""

        def work(conn: sqlite3.Connection) -> None:
            conn.execute(SQL["update_batch"], _values(row))
            _append(conn, row, at, event, before, detail)
            if also is not None:
                also(conn)

        await self._db.write(work)

    async def note(self, batch_id: str, counts: Counts, usage: TokenUsage) -> None:
        """Store how far a batch has come that has not ended."""
        values = {"id": batch_id, "counts": json.dumps(counts), "usage": json.dumps(usage)}

        def work(conn: sqlite3.Connection) -> None:
            conn.execute(SQL["note_batch"], values)

        await self._db.write(work)

    async def get(self, batch_id: str) -> BatchRow | None:
        found = await self._rows("batch", id=batch_id)
        return found[0] if found else None

    async def list(self, owner: str | None, after: str | None, limit: int) -> Rows:
        """Newest first; ``owner`` None: everybody's."""
        if owner is None:
            return await self._rows("batches_newest_first", after=after, limit=limit)
        return await self._rows("batches_of_owner", owner_id=owner, after=after, limit=limit)

    async def unfinished(self) -> Rows:
        """Oldest first."""
        return await self._rows("unfinished_batches")

    async def ended_before(self, before: float) -> Sequence[str]:
        """Ids of some batches that ended before a time."""
        query = {"before": before, "limit": _STEP}
        return [
            str(row["id"])
            for row in await self._db.read(lambda c: c.execute(SQL["batches_ended_before"], query).fetchall())
        ]

    async def delete(self, batch_id: str) -> None:
        """Forget an ended batch and its history. Idempotent."""

        def work(conn: sqlite3.Connection) -> None:
            conn.execute(SQL["delete_batch"], {"id": batch_id})

        await self._db.write(work)

    async def forget_keys(self, before: float) -> None:
        """Forget Idempotency-Keys that were used before a time."""

        def work(conn: sqlite3.Connection) -> None:
            conn.execute(SQL["forget_old_keys"], {"before": before})

        await self._db.write(work)

    async def events(self, batch_id: str, after: int, limit: int) -> Events:
        """History, oldest first."""
        query = {"batch_id": batch_id, "after": min(after, LARGEST_SEQ), "limit": limit}
        rows = await self._db.read(lambda conn: conn.execute(SQL["events"], query).fetchall())
        return [
            BatchEvent(
                row["seq"],
                row["batch_id"],
                row["at"],
                row["event"],
                row["from_state"],
                row["to_state"],
                json.loads(row["detail"]),
            )
            for row in rows
        ]

    async def _rows(self, query: str, **values: Any) -> Rows:
        rows = await self._db.read(lambda conn: conn.execute(SQL[query], values).fetchall())
        return [_row(row) for row in rows]


def recall(conn: sqlite3.Connection, creation: Creation | None) -> Created | None:
    """What an earlier request with this Idempotency-Key created. Raises ``BadRequest`` when that was another one."""
    if creation is None:
        return None
    found = conn.execute(SQL["remembered"], {"owner_id": creation.owner, "key": creation.key}).fetchone()
    if found is None:
        return None
    if found["request_hash"] != creation.request_hash:
        raise BadRequest(
            "This Idempotency-Key was used for another request before: use a new one.", param="idempotency-key"
        )
    return Created(str(found["result_id"]), again=True)


def remember(conn: sqlite3.Connection, creation: Creation | None, result_id: str, at: float) -> None:
    """Note what a request with an Idempotency-Key has created."""
    if creation is not None:
        values = {"owner_id": creation.owner, "key": creation.key, "request_hash": creation.request_hash}
        conn.execute(SQL["remember"], {**values, "result_id": result_id, "created_at": at})


def _append(
    conn: sqlite3.Connection, row: BatchRow, at: float, event: str, before: Phase | None, detail: Mapping[str, Any]
) -> None:
    values = {
        "batch_id": row.id,
        "at": at,
        "event": event,
        "from_state": before.state.value if before is not None else None,
        "to_state": row.phase.state.value,
        "detail": json.dumps(dict(detail)),
    }
    conn.execute(SQL["append_event"], values)


def _values(row: BatchRow) -> dict[str, Any]:
    state = row.phase.state
    return {
        "id": row.id,
        "owner_id": row.owner,
        "endpoint": row.endpoint,
        "input_file_id": row.input_file_id,
        "completion_window": row.completion_window,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "state": state.value,
        "why": row.phase.why.value if row.phase.why is not None else None,
        "paused": int(row.paused),
        "priority": row.priority,
        "launch_id": row.launch_id,
        "metadata": None if row.metadata is None else json.dumps(dict(row.metadata)),
        "webhook": None if row.webhook is None else json.dumps(asdict(row.webhook)),
        "output_expires_after_s": row.output_expires_after_s,
        "output_file_id": row.output_file_id,
        "error_file_id": row.error_file_id,
        "counts": json.dumps(row.counts),
        "usage": json.dumps(row.usage),
        "errors": json.dumps(list(row.errors)),
        "models": json.dumps(dict(row.models)),
        "stamps": json.dumps(dict(row.stamps)),
        "ended_at": row.stamps[state.value] if state in TERMINAL else None,
    }


def _row(row: sqlite3.Row) -> BatchRow:
    why = row["why"]
    webhook = row["webhook"]
    return BatchRow(
        id=row["id"],
        owner=row["owner_id"],
        endpoint=row["endpoint"],
        input_file_id=row["input_file_id"],
        completion_window=row["completion_window"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        phase=Phase(State(row["state"]), None if why is None else Why(why)),
        paused=bool(row["paused"]),
        priority=row["priority"],
        launch_id=row["launch_id"],
        metadata=None if row["metadata"] is None else json.loads(row["metadata"]),
        webhook=None if webhook is None else Webhook(**json.loads(webhook)),
        output_expires_after_s=row["output_expires_after_s"],
        output_file_id=row["output_file_id"],
        error_file_id=row["error_file_id"],
        counts=Counts(*json.loads(row["counts"])),
        usage=TokenUsage(*json.loads(row["usage"])),
        errors=tuple(LineError(*error) for error in json.loads(row["errors"])),
        models=json.loads(row["models"]),
        stamps=json.loads(row["stamps"]),
    )
