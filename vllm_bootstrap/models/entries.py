"""Models that were added while the daemon ran, in the database. Decides nothing."""

from __future__ import annotations

import json
import sqlite3

from vllm_bootstrap.db import Database
from vllm_bootstrap.models.stored import from_json, to_json
from vllm_bootstrap.models.types import ModelEntry


class EntryStore:
    """Methods are durable when they return and raise ``StorageFull`` or ``StorageFailed`` as ``Database.write``."""

    def __init__(self, db: Database, node_id: str = "local") -> None:
        self._db = db
        self._node_id = node_id

    async def all(self) -> list[ModelEntry]:
        """In the order in which they were added."""

        def work(conn: sqlite3.Connection) -> list[ModelEntry]:
            found = conn.execute(
                "SELECT entry FROM models WHERE node_id = ? ORDER BY created_at, name", (self._node_id,)
            )
            return [from_json(json.loads(row["entry"])) for row in found]

        return await self._db.read(work)

    async def put(self, entry: ModelEntry, owner_id: str, at: float) -> None:
        """Store an entry, instead of an earlier one of its name."""
        text = json.dumps(to_json(entry), ensure_ascii=False, separators=(",", ":"))

        def work(conn: sqlite3.Connection) -> None:
            conn.execute(
                "INSERT INTO models (name, node_id, owner_id, entry, created_at) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (name) DO UPDATE SET owner_id = excluded.owner_id, entry = excluded.entry",
                (entry.name, self._node_id, owner_id, text, at),
            )

        await self._db.write(work)

    async def delete(self, name: str) -> bool:
        """Whether there was one."""

        def work(conn: sqlite3.Connection) -> bool:
            return conn.execute("DELETE FROM models WHERE name = ?", (name,)).rowcount > 0

        return await self._db.write(work)
