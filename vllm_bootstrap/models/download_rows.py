"""Rows of downloads in the state database."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_bootstrap.db import Database, load_queries
from vllm_bootstrap.models.types import DownloadState

SQL: Mapping[str, str] = load_queries(Path(__file__).with_name("weights.sql"))
KEPT = 200
"""So many downloads that have ended are remembered."""


@dataclass(frozen=True, slots=True)
class Row:
    """One download as stored. ``files``: path, bytes and checksum of each file of ``commit``."""

    id: str
    owner: str
    model: str
    repo: str
    revision: str
    load_format: str | None = None
    state: DownloadState = "queued"
    commit: str | None = None
    files: tuple[tuple[str, int, str | None], ...] = ()
    bytes_done: int = 0
    files_done: int = 0
    error: str | None = None
    hint: str | None = None
    created_at: float = 0.0
    ended_at: float | None = None

    @property
    def bytes_total(self) -> int:
        return sum(size for _, size, _ in self.files)


class DownloadRows:
    """Reading and writing them. Raises what ``Database`` raises."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def all(self) -> list[Row]:
        """The oldest first."""
        return await self._db.read(lambda conn: [_row(found) for found in conn.execute(SQL["downloads"])])

    async def insert(self, row: Row, node_id: str) -> list[str]:
        """Returns the ids of those that are forgotten for it."""

        def work(conn: sqlite3.Connection) -> list[str]:
            conn.execute(SQL["insert_download"], {**_columns(row), "node_id": node_id})
            return [gone["id"] for gone in conn.execute(SQL["forget_downloads"], {"kept": KEPT})]

        return await self._db.write(work)

    async def update(self, row: Row) -> None:
        await self._db.write(lambda conn: conn.execute(SQL["update_download"], _columns(row)).rowcount)

    async def forget(self, repo: str, commit: str | None) -> list[str]:
        """Forget what has ended of a repository, or of one commit of it. Returns the ids."""
        wanted = {"repo": repo, "commit_id": commit}
        return await self._db.write(lambda conn: [gone["id"] for gone in conn.execute(SQL["forget_repo"], wanted)])


def _columns(row: Row) -> dict[str, Any]:
    return {
        "id": row.id, "owner": row.owner, "model": row.model, "repo": row.repo, "revision": row.revision,
        "load_format": row.load_format, "state": row.state, "commit_id": row.commit, "files": json.dumps(row.files),
        "bytes_done": row.bytes_done, "files_done": row.files_done, "error": row.error, "hint": row.hint,
        "created_at": row.created_at, "ended_at": row.ended_at,
    }  # fmt: skip


def _row(found: sqlite3.Row) -> Row:
    return Row(
        id=found["id"],
        owner=found["owner_id"],
        model=found["model"],
        repo=found["repo"],
        revision=found["revision"],
        load_format=found["load_format"],
        state=found["state"],
        commit=found["commit_id"],
        files=tuple((path, size, blob) for path, size, blob in json.loads(found["files"])),
        bytes_done=found["bytes_done"],
        files_done=found["files_done"],
        error=found["error"],
        hint=found["hint"],
        created_at=found["created_at"],
        ended_at=found["ended_at"],
    )
