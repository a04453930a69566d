"""Single items in ``state.db``: stored before they are answered for, and their records.

Invariant: an item has ended exactly when it has a record, and it gets one only. What a method returned is on disk.
Must not know: lanes, engines, clocks.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from sys import intern
from typing import Any, NamedTuple

from vllm_bootstrap.batches.store import SQL, Created, Creation, recall, remember
from vllm_bootstrap.batches.types import ItemView
from vllm_bootstrap.db import Database

_STEP = 500

Views = list[ItemView]


@dataclass(frozen=True, slots=True)
class Waiting:
    """An item that has not ended, without its body."""

    id: str
    owner: str
    path: str
    model: str | None
    launch_id: str | None
    priority: int
    attempts: int
    deaths: int
    expires_at: float


class Ended(NamedTuple):
    """``state``: completed, failed, cancelled or expired. ``data``: what an output line has, as JSON."""

    id: str
    state: str
    attempts: int
    data: bytes


class ItemStore:
    """All methods raise ``StorageFull`` or ``StorageFailed`` as ``Database.write``."""

    def __init__(self, db: Database, node_id: str = "local") -> None:
        self._db = db
        self._node_id = node_id

    async def create(self, item: Waiting, body: str, created_at: float, creation: Creation | None) -> Created:
        """Raises ``BadRequest`` when the Idempotency-Key was used for another request."""

        def work(conn: sqlite3.Connection) -> Created:
            before = recall(conn, creation)
            if before is not None:
                return before
            values = {
                "id": item.id,
                "node_id": self._node_id,
                "owner_id": item.owner,
                "path": item.path,
                "model": item.model,
                "launch_id": item.launch_id,
                "body": body,
                "priority": item.priority,
                "created_at": created_at,
                "expires_at": item.expires_at,
            }
            conn.execute(SQL["insert_item"], values)
            remember(conn, creation, item.id, created_at)
            return Created(item.id)

        return await self._db.write(work)

    async def recalled(self, creation: Creation | None) -> Created | None:
        """What was created with this Idempotency-Key. Raises ``BadRequest`` as ``create``."""
        return await self._db.read(lambda conn: recall(conn, creation))

    async def waiting(self) -> list[Waiting]:
        """Oldest first."""
        rows = await self._db.read(lambda conn: conn.execute(SQL["items_waiting"]).fetchall())
        return [_waiting(row) for row in rows]

    async def body(self, item_id: str) -> bytes | None:
        """None: it has ended."""
        row = await self._db.read(lambda conn: conn.execute(SQL["item_body"], {"id": item_id}).fetchone())
        return None if row is None or row["body"] is None else str(row["body"]).encode()

    async def get(self, item_id: str) -> ItemView | None:
        row = await self._db.read(lambda conn: conn.execute(SQL["item"], {"id": item_id}).fetchone())
        return None if row is None else _view(row)

    async def list(self, owner: str | None, state: str | None, after: str | None, limit: int) -> Views:
        """Newest first; ``owner`` None: everybody's. ``state`` as stored: what is in progress is queued here."""
        query = SQL["items_newest_first"] if owner is None else SQL["items_of_owner"]
        values = {"owner_id": owner, "state": state, "after": after, "limit": limit}
        return [_view(row) for row in await self._db.read(lambda conn: conn.execute(query, values).fetchall())]

    async def end(self, items: Sequence[Ended], now: float) -> None:
        """Items that have ended already stay as they are."""

        def work(conn: sqlite3.Connection) -> None:
            for item_id, state, attempts, data in items:
                values = {"id": item_id, "state": state, "attempts": attempts, "record": data.decode()}
                conn.execute(SQL["end_item"], {**values, "ended_at": now})

        await self._db.write(work)

    async def note(self, troubles: Sequence[tuple[str, int, int]]) -> None:
        """Remember (id, attempts, deaths) of items that go on."""

        def work(conn: sqlite3.Connection) -> None:
            for item_id, attempts, deaths in troubles:
                conn.execute(SQL["note_item"], {"id": item_id, "attempts": attempts, "deaths": deaths})

        await self._db.write(work)

    async def sweep(self, before: float) -> None:
        """Forget some items that ended before a time."""

        def work(conn: sqlite3.Connection) -> None:
            conn.execute(SQL["delete_old_items"], {"before": before, "limit": _STEP})

        await self._db.write(work)


def _waiting(row: sqlite3.Row) -> Waiting:
    item_id, owner, path, model, launch_id, *rest = row
    # There may be very many, and they name the same few things.
    model, launch_id = (None if name is None else intern(name) for name in (model, launch_id))
    return Waiting(item_id, intern(owner), intern(path), model, launch_id, *rest)


def _view(row: sqlite3.Row) -> ItemView:
    record: dict[str, Any] = {} if row["record"] is None else json.loads(row["record"])
    return ItemView(
        id=row["id"],
        owner=row["owner_id"],
        path=row["path"],
        model=row["model"],
        launch_id=row["launch_id"],
        priority=row["priority"],
        state=row["state"],
        attempts=row["attempts"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        ended_at=row["ended_at"],
        response=record.get("response"),
        error=record.get("error"),
    )
