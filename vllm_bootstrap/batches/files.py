"""Stored files: a folder of blobs and a row for each in the state database.

Invariants: a file that has a row is on disk, whole. Its blob is there before its row and goes after it, so that a crash
leaves at most a blob without a row, which nobody can ask for and ``sweep`` removes. A file never changes. Nothing here
blocks the loop: the disk is written in threads of its own, and whoever writes waits for it.

Must not know: HTTP, forms, what is in a file.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vllm_bootstrap import ids
from vllm_bootstrap.batches.blobs import PART, Blob, Folder, id_of
from vllm_bootstrap.batches.types import FileRow
from vllm_bootstrap.db import Database, load_queries
from vllm_bootstrap.errors import NotFound, PayloadTooLarge, StorageFailed, Unavailable

SQL = load_queries(Path(__file__).with_name("files.sql"))

INPUT, OUTPUT, USER_DATA = "batch", "batch_output", "user_data"
"""What files are for: lines of a batch, what became of them, and whatever somebody wants to keep here."""

WRITE_BYTES = 256 * 1024
THREADS = 4
MOST_INCOMING = 64
"""Uploads at one time; each may hold about half a megabyte of memory."""

SWEEP_ROWS = 500
T = TypeVar("T")

Rows = list[FileRow]  # named here because the class has a method called list


class FileStore:
    """``expires_after_s`` is how long files of batches are kept when nothing else is said; other files stay until they
    are deleted. ``max_bytes`` and ``reserve_bytes`` (to be left free on the disk) hold for what comes from outside;
    output of batches may be of any size and use the reserve, because it was promised. Times are unix seconds."""

    def __init__(
        self,
        db: Database,
        folder: Path,
        *,
        node_id: str = "local",
        max_bytes: int,
        expires_after_s: float,
        reserve_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._db, self._node_id = db, node_id
        self._folder = Folder(folder, reserve_bytes=reserve_bytes)
        self._max_bytes, self._expires_after_s = max_bytes, expires_after_s
        self._clock = clock
        self._coming: set[str] = set()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="files")

    @property
    def failed(self) -> StorageFailed | None:
        """Why no file is written any more, None while all is well."""
        return self._folder.failed

    @property
    def arriving(self) -> int:
        """How many files are being written at this moment."""
        return len(self._coming)

    def receive(
        self,
        owner: str,
        purpose: str,
        filename: str,
        expires_after_s: float | None,
        *,
        file_id: str | None = None,
        expected_bytes: int = 0,
    ) -> Incoming:
        """Begin to take a file in. ``file_id``: write it under this id, over what a crash has left of it (its row, if
        there is one already, keeps all but the size). ``expected_bytes``: refuse now what is too large anyway.

        Raises ``StorageFull``, ``StorageFailed``, ``PayloadTooLarge``, and ``Unavailable`` when too many come at once.
        """
        self._folder.check()
        bounded = purpose != OUTPUT
        if bounded:
            if len(self._coming) >= MOST_INCOMING:
                raise Unavailable(f"{MOST_INCOMING} files are being uploaded already: try again soon.", retry_after=5)
            self.check_size(expected_bytes)
            self._folder.check_room(expected_bytes)
        now = self._clock()
        if file_id is None:
            file_id = ids.new_id(ids.FILE_PREFIX, int(now * 1000), os.urandom(ids.RANDOM_BYTES))
        elif not ids.is_file_id(file_id) or file_id in self._coming:
            raise ValueError(f"{file_id!r} cannot be written now")
        row = FileRow(file_id, owner, purpose, filename, 0, now, None)
        self._coming.add(file_id)
        return Incoming(self, row, expires_after_s, bounded=bounded)

    def check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise PayloadTooLarge(f"The file is larger than {self._max_bytes} bytes.", param="file")

    async def get(self, file_id: str, owner: str | None) -> FileRow:
        found = None
        if ids.is_file_id(file_id):
            now = self._clock()
            found = await self._db.read(lambda conn: conn.execute(SQL["file"], {"id": file_id, "now": now}).fetchone())
        if found is None or owner not in {None, found["owner_id"]}:
            raise NotFound(f"There is no file {file_id!r}.", param="file_id")
        return _row(found)

    async def list(
        self, owner: str | None, *, purpose: str | None, after: str | None, limit: int, ascending: bool
    ) -> tuple[Rows, bool]:
        query = f"{'own_' if owner is not None else ''}files_{'oldest' if ascending else 'newest'}_first"
        wanted = {"owner": owner, "purpose": purpose, "after": after, "limit": limit + 1, "now": self._clock()}

        def work(conn: sqlite3.Connection) -> Rows:
            return [_row(found) for found in conn.execute(SQL[query], wanted)]

        rows = await self._db.read(work)
        return rows[:limit], len(rows) > limit

    async def open(self, file_id: str, owner: str | None) -> tuple[FileRow, Path]:
        return await self.get(file_id, owner), self._folder.path / file_id

    async def delete(self, file_id: str, owner: str | None) -> None:
        await self.get(file_id, owner)
        if not await self._db.write(lambda conn: conn.execute(SQL["delete_file"], {"id": file_id}).rowcount):
            raise NotFound(f"There is no file {file_id!r}.", param="file_id")
        await self.in_thread(self._folder.remove, [file_id])

    async def sweep(self, now: float | None = None) -> int:
        """Delete what has expired, and blobs that have no row: unfinished ones at once when nobody writes them (they
        are of an earlier run), finished ones when they are an hour old. Returns how many files went."""
        now = self._clock() if now is None else now
        gone = 0
        while expired := await self._db.write(partial(_delete_expired, now)):
            await self.in_thread(self._folder.remove, expired)
            gone += len(expired)
        names = await self.in_thread(self._folder.names)
        # Asked after the folder was read: what was finished in between has its row by now or is still coming.
        strays = [name for name in names if id_of(name) not in self._coming]
        unfinished = [name for name in strays if name.endswith(PART)]
        nameless = await self._db.read(partial(_without_row, [name for name in strays if not name.endswith(PART)]))
        await self.in_thread(self._folder.remove, unfinished)
        gone += await self.in_thread(
            self._folder.remove_strays, [name for name in nameless if name not in self._coming], now
        )
        return gone + len(unfinished)

    def close(self) -> None:
        """Wait for what threads still do. Blocks; idempotent."""
        self._pool.shutdown(wait=True)
        self._folder.close()

    # For ``Incoming``

    def blob(self, file_id: str, *, bounded: bool) -> Blob:
        return Blob(self._folder, file_id, bounded=bounded)

    async def in_thread(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run it in one of our threads. It runs to its end also when the caller is cancelled."""
        return await asyncio.shield(asyncio.wrap_future(self._pool.submit(work, *args, **kwargs)))

    async def keep(self, row: FileRow) -> None:
        values = {
            "id": row.id,
            "node_id": self._node_id,
            "owner": row.owner,
            "purpose": row.purpose,
            "filename": row.filename,
            "bytes": row.bytes,
            "status": row.status,
            "created_at": row.created_at,
            "expires_at": row.expires_at,
        }
        await self._db.write(lambda conn: conn.execute(SQL["insert_file"], values).rowcount)

    def expiry(self, row: FileRow, expires_after_s: float | None) -> float | None:
        if expires_after_s is None and row.purpose in {INPUT, OUTPUT}:
            expires_after_s = self._expires_after_s
        return None if expires_after_s is None else row.created_at + expires_after_s

    def forget(self, file_id: str) -> None:
        self._coming.discard(file_id)


class Incoming:
    """A file on its way in. ``purpose`` and ``expires_after_s`` may be set until ``commit``: a form may name them after
    the file itself."""

    def __init__(self, store: FileStore, row: FileRow, expires_after_s: float | None, *, bounded: bool) -> None:
        self.purpose, self.expires_after_s = row.purpose, expires_after_s
        self._store, self._row, self._bounded = store, row, bounded
        self._blob = store.blob(row.id, bounded=bounded)
        self._pieces: list[bytes] = []
        self._waiting = self._size = 0
        self._named = self._over = False

    @property
    def id(self) -> str:
        return self._row.id

    async def write(self, piece: bytes) -> None:
        """Take the next piece; returns when not too much waits for the disk."""
        self._size += len(piece)
        if self._bounded:
            self._store.check_size(self._size)
        self._pieces.append(piece)
        self._waiting += len(piece)
        if self._waiting >= WRITE_BYTES:
            await self._flush()

    async def commit(self) -> FileRow:
        """File and row are on disk when this returns."""
        if self._over:
            raise RuntimeError(f"{self.id} is over")
        await self._flush()
        row = replace(self._row, purpose=self.purpose, bytes=self._size)
        row = replace(row, expires_at=self._store.expiry(row, self.expires_after_s))
        self._named = True  # from now on it may have its name, whenever this ends
        await self._store.in_thread(self._blob.finish)
        try:
            await self._store.keep(row)
        except (StorageFailed, asyncio.CancelledError):
            self._end()  # nobody knows whether the row is there: the sweep looks for it before it takes the blob away
            raise
        self._end()
        return row

    async def abort(self) -> None:
        """Leave nothing behind."""
        if self._over:
            return
        try:
            # What was written over an earlier file of this id may have that one's row.
            await self._store.in_thread(self._blob.discard, named=self._named and self._bounded)
        finally:
            self._end()

    async def _flush(self) -> None:
        pieces, self._pieces, self._waiting = self._pieces, [], 0
        if pieces:
            await self._store.in_thread(self._blob.write, pieces)

    def _end(self) -> None:
        self._over = True
        self._pieces = []
        self._store.forget(self.id)


def _row(found: sqlite3.Row) -> FileRow:
    return FileRow(
        found["id"],
        found["owner_id"],
        found["purpose"],
        found["filename"],
        found["bytes"],
        found["created_at"],
        found["expires_at"],
        found["status"],
    )


def _delete_expired(now: float, conn: sqlite3.Connection) -> Sequence[str]:
    return [found["id"] for found in conn.execute(SQL["delete_expired"], {"now": now, "limit": SWEEP_ROWS}).fetchall()]


def _without_row(names: Sequence[str], conn: sqlite3.Connection) -> Sequence[str]:
    return [found["value"] for found in conn.execute(SQL["without_row"], {"names": json.dumps(names)})]
