"""LoRA adapters that were uploaded: a folder and a row for each.

Invariants: an adapter that has a row is on disk, whole and judged; its files never change. The folder is there before
its row and goes after it, so that a crash leaves at most a folder without a row, which ``start`` removes. Nothing here
blocks the loop: disk and archives are a thread's work.

Must not know: HTTP, the catalogue. Whether a name is free there is the caller's question.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sqlite3
import stat
import time
from collections.abc import AsyncIterable, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from vllm_bootstrap import ids
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import AdapterRefused, Conflict, NotFound, PayloadTooLarge, StorageFull, Unavailable
from vllm_bootstrap.models.archives import Extracted, unpack
from vllm_bootstrap.models.download_rows import SQL
from vllm_bootstrap.models.lora import NotAnAdapter
from vllm_bootstrap.models.space import free_bytes, is_lack_of_room
from vllm_bootstrap.models.types import AdapterEntry, AdapterView

PART = ".part"
ADAPTER_PREFIX = "adapter_"
AT_ONCE = 2
MOST_INCOMING = 8
WRITE_BYTES = 1024**2
T = TypeVar("T")

Needed = Callable[[str, str], str | None]
"""Who needs an adapter now: asked with its base and its name, answers with a launch's id, or None."""


class Adapters:
    """``folder`` holds them, readable by ``gid`` (the engines' group) where it is given. ``max_bytes`` holds for the
    archive and for what is in it; ``reserve_bytes`` stay free on the disk. ``start`` first."""

    def __init__(
        self,
        db: Database,
        folder: Path,
        *,
        max_bytes: int,
        reserve_bytes: int,
        node_id: str = "local",
        gid: int | None = None,
        needed: Needed = lambda _base, _name: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._db, self._folder, self._node_id, self._gid = db, folder, node_id, gid
        self._max_bytes, self._reserve = max_bytes, reserve_bytes
        self._needed, self._clock = needed, clock
        self._known: dict[str, AdapterView] = {}
        self._coming: set[str] = set()
        self._listeners: list[Callable[[], None]] = []
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="adapters")

    async def start(self) -> None:
        """Know again what was uploaded; remove what was not finished."""
        rows = await self._db.read(lambda conn: conn.execute(SQL["adapters"]).fetchall())
        kept = {row["id"] for row in rows}
        await self._on_disk(partial(_sweep, self._folder, kept))
        self._known = {row["name"]: self._view(row) for row in rows}

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called after an adapter came or went."""
        self._listeners.append(listener)

    def all(self, base: str | None = None) -> list[AdapterView]:
        return [view for view in self._known.values() if base in {None, view.base}]

    def get(self, name: str) -> AdapterView:
        """Raises ``NotFound``."""
        found = self._known.get(name)
        if found is None:
            raise NotFound(f"There is no uploaded adapter {name!r}.", param="name")
        return found

    def entries_for(self, base: str) -> tuple[AdapterEntry, ...]:
        """The adapters of a model, as the catalogue has them."""
        return tuple(AdapterEntry(view.name, view.path) for view in self.all(base))

    def max_rank(self, base: str) -> int:
        """The largest rank among the adapters of a model, 0 without any."""
        return max((view.rank or 0 for view in self.all(base)), default=0)

    async def receive(self, owner: str, base: str, name: str, pieces: AsyncIterable[bytes]) -> AdapterView:
        """Take an archive in: the adapter is on disk and known when this returns.

        Raises ``AdapterRefused`` for what cannot be served, ``PayloadTooLarge``, ``Conflict`` when the name is taken,
        ``StorageFull`` and ``Unavailable`` when too many come at once. Then nothing of it stays.
        """
        if name in self._known or name in self._coming:
            raise Conflict(f"There is an adapter {name!r} already: delete it first.", param="name", should_retry=False)
        if len(self._coming) >= MOST_INCOMING:
            raise Unavailable(f"{MOST_INCOMING} adapters are being uploaded already: try again soon.", retry_after=5)
        now = self._clock()
        number = ids.new_id(ADAPTER_PREFIX, int(now * 1000), os.urandom(ids.RANDOM_BYTES))
        part, final = self._folder / f"{number}{PART}", self._folder / number
        self._coming.add(name)
        try:
            await self._on_disk(partial(_make, part))
            await self._spool(part / "archive", pieces)
            extracted = await self._on_disk(partial(self._unpack, part, final))
            view = AdapterView(name, base, owner, extracted.bytes, extracted.rank, str(final), now)
            await _to_its_end(self._store(number, view))
        except NotAnAdapter as exc:
            raise AdapterRefused(str(exc), param="file") from exc
        finally:
            self._coming.discard(name)
            await self._on_disk(partial(_remove, part))
            if name not in self._known:
                await self._on_disk(partial(_remove, final))
        return view

    async def delete(self, name: str, owner: str | None) -> None:
        """Remove an adapter. ``owner`` None: whosever it is. Raises ``NotFound`` and, while an engine serves it,
        ``Conflict``."""
        view = self.get(name)
        if owner not in {None, view.owner}:
            raise NotFound(f"There is no uploaded adapter {name!r}.", param="name")
        launch = self._needed(view.base, name)
        if launch is not None:
            raise Conflict(
                f"The adapter {name!r} is served by {launch}: unload the model {view.base!r} first.",
                should_retry=False,
            )
        path = Path(view.path)
        await self._db.write(lambda conn: conn.execute(SQL["delete_adapter"], {"id": path.name}).rowcount)
        self._known.pop(name, None)
        self._changed()
        await self._on_disk(partial(_remove, path))

    # -- inside -------------------------------------------------------------------------------------------------

    async def _spool(self, archive: Path, pieces: AsyncIterable[bytes]) -> None:
        total, waiting, size = 0, [], 0
        async for piece in pieces:
            total += len(piece)
            if total > self._max_bytes:
                raise PayloadTooLarge(f"The archive is larger than {self._max_bytes} bytes.", param="file")
            waiting.append(piece)
            size += len(piece)
            if size >= WRITE_BYTES:
                await self._on_disk(partial(self._append, archive, b"".join(waiting)))
                waiting, size = [], 0
        await self._on_disk(partial(self._append, archive, b"".join(waiting)))

    def _append(self, archive: Path, data: bytes) -> None:
        self._room(len(data))
        with archive.open("ab") as file:
            file.write(data)

    def _room(self, size: int) -> None:
        if free_bytes(self._folder) - size < self._reserve:
            raise StorageFull(
                f"The disk of the state directory has no room for this adapter: {self._reserve} bytes of it are kept "
                "free (VLLM_BOOTSTRAP_DISK_RESERVE_BYTES).",
                should_retry=False,
            )

    def _unpack(self, part: Path, final: Path) -> Extracted:
        inside = part / "adapter"
        inside.mkdir(mode=0o700)
        extracted = unpack(part / "archive", inside, self._max_bytes, self._room)
        if self._gid is not None:
            _let_read(inside, self._gid, (self._folder, self._folder.parent))
        inside.rename(final)
        _sync(final.parent)
        return extracted

    async def _store(self, number: str, view: AdapterView) -> None:
        """Its row, and with that it is there."""
        row = {
            "id": number,
            "node_id": self._node_id,
            "owner": view.owner,
            "base": view.base,
            "name": view.name,
            "bytes": view.bytes,
            "rank": view.rank,
            "created_at": view.created_at,
        }
        await self._db.write(lambda conn: conn.execute(SQL["insert_adapter"], row).rowcount)
        self._known[view.name] = view
        self._changed()

    def _view(self, row: sqlite3.Row) -> AdapterView:
        path = str(self._folder / row["id"])
        return AdapterView(
            row["name"], row["base"], row["owner_id"], row["bytes"], row["rank"], path, row["created_at"]
        )

    def _translated(self, exc: OSError) -> StorageFull | Unavailable:
        if is_lack_of_room(exc):
            return StorageFull(
                "The disk of the state directory is full: the adapter was not taken.", should_retry=False
            )
        return Unavailable(f"The adapter cannot be stored right now: {exc.strerror}.", retry_after=5)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    async def _on_disk(self, work: Callable[[], T]) -> T:
        """Run it in a thread, to its end also when the caller is cancelled: what follows must find the disk at rest."""
        try:
            return await _to_its_end(asyncio.get_running_loop().run_in_executor(self._pool, work))
        except OSError as exc:
            raise self._translated(exc) from exc


async def _to_its_end(work: Awaitable[T]) -> T:
    """Await it; cancelled, first wait until it has ended all the same."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _make(part: Path) -> None:
    part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part.mkdir(mode=0o700)


def _remove(path: Path) -> None:
    """First out of the way under a name that a sweep knows, so that no half adapter has its own."""
    if not path.exists():
        return
    if not path.name.endswith(PART):
        gone = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
        path.rename(gone)
        path = gone
    shutil.rmtree(path, ignore_errors=True)


def _sweep(folder: Path, kept: set[str]) -> None:
    if folder.is_dir():
        for path in list(folder.iterdir()):
            if path.name.startswith(ADAPTER_PREFIX) and path.name not in kept:
                _remove(path)


def _let_read(folder: Path, gid: int, above: tuple[Path, ...]) -> None:
    """The engines' group may read the files. What lies above can be passed through, and shows nothing more."""
    for path in (folder, *folder.iterdir()):
        os.chown(path, -1, gid)
        path.chmod(0o750 if path.is_dir() else 0o640)
    for path in above:
        path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o011)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
