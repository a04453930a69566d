"""Stored files on a real disk: what was answered is there, whole; what failed left nothing; nobody waits for the disk
who does not have to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import small_disk
from tests.support.aio import eventually, run
from tests.support.faulty_disk import FULL, IO_ERROR_FSYNC, faulty_disk
from vllm_bootstrap.batches import blobs, files
from vllm_bootstrap.batches.files import FileStore
from vllm_bootstrap.batches.types import FileRow
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import (
    ApiError,
    NotFound,
    PayloadTooLarge,
    StorageFailed,
    StorageFull,
    Unavailable,
)

KIB, MIB = 1024, 1024**2
NOW = 1_800_000_000.0
DAY = 86400.0
LIMIT = 4 * MIB
GIVEN = "file-" + "0" * 20


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Shelf:
    """A store in a folder of its own, its clock, and what lies in the folder."""

    def __init__(
        self, folder: Path, *, reserve_bytes: int = 0, max_bytes: int = LIMIT, files_in: str = "files"
    ) -> None:
        self.clock = Clock()
        self.db = Database.open(folder / "state.db", network=False)
        self.folder = folder / files_in
        self.store = FileStore(
            self.db, self.folder, max_bytes=max_bytes, expires_after_s=30 * DAY, reserve_bytes=reserve_bytes,
            clock=self.clock,
        )  # fmt: skip

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name != "ballast")

    async def put(
        self,
        data: bytes = b"x\n",
        owner: str = "ann",
        purpose: str = "batch",
        expires: float | None = None,
        **options: Any,
    ) -> FileRow:
        incoming = self.store.receive(owner, purpose, "in.jsonl", expires, **options)
        try:
            for start in range(0, len(data), 100 * KIB):
                await incoming.write(data[start : start + 100 * KIB])
            return await incoming.commit()
        finally:
            await incoming.abort()

    async def content(self, row: FileRow) -> bytes:
        return (await self.store.open(row.id, row.owner))[1].read_bytes()

    def close(self) -> None:
        self.store.close()
        self.db.close()


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    made = Shelf(tmp_path)
    yield made
    made.close()


def refused(coroutine: Coroutine[Any, Any, Any], kind: type[ApiError]) -> ApiError:
    with pytest.raises(kind) as caught:
        run(coroutine)
    return caught.value


def test_what_was_taken_is_there_whole_and_for_us_alone(shelf: Shelf) -> None:
    async def main() -> None:
        data = os.urandom(3 * MIB + 7)
        row = await shelf.put(data)
        assert (row.owner, row.purpose, row.filename, row.bytes) == ("ann", "batch", "in.jsonl", len(data))
        assert (row.created_at, row.expires_at, row.status) == (NOW, NOW + 30 * DAY, "processed")
        assert await shelf.content(row) == data
        assert await shelf.store.get(row.id, "ann") == await shelf.store.get(row.id, None) == row
        assert shelf.names() == [row.id]
        assert stat.S_IMODE((shelf.folder / row.id).stat().st_mode) == 0o600
        assert stat.S_IMODE(shelf.folder.stat().st_mode) == 0o700

    run(main())


def test_it_outlives_the_process(shelf: Shelf, tmp_path: Path) -> None:
    row = run(shelf.put(b"kept"))
    shelf.close()
    again = Shelf(tmp_path)
    try:
        assert run(again.store.sweep()) == 0
        assert run(again.content(run(again.store.get(row.id, "ann")))) == b"kept"
    finally:
        again.close()


def test_an_empty_file(shelf: Shelf) -> None:
    assert run(shelf.content(run(shelf.put(b"")))) == b""


@pytest.mark.parametrize(
    ("purpose", "asked", "expires"),
    [("batch", None, 30 * DAY), ("batch", 3600, 3600), ("batch_output", None, 30 * DAY), ("user_data", None, None),
     ("user_data", 7200, 7200)],
)  # fmt: skip
def test_when_files_expire(shelf: Shelf, purpose: str, asked: float | None, expires: float | None) -> None:
    row = run(shelf.put(purpose=purpose, expires=asked))
    assert row.expires_at == (None if expires is None else NOW + expires)


def test_purpose_and_expiry_may_come_after_the_file(shelf: Shelf) -> None:
    async def main() -> FileRow:
        incoming = shelf.store.receive("ann", "batch", "x", None)
        await incoming.write(b"data")
        incoming.purpose, incoming.expires_after_s = "user_data", 3600
        return await incoming.commit()

    row = run(main())
    assert (row.purpose, row.expires_at) == ("user_data", NOW + 3600)
    assert run(shelf.store.get(row.id, "ann")) == row


def test_others_do_not_see_it(shelf: Shelf) -> None:
    row = run(shelf.put())
    for call in (shelf.store.get, shelf.store.open, shelf.store.delete):
        for file_id, owner in ((row.id, "bob"), (GIVEN, "ann"), ("../state.db", None), ("", None)):
            assert refused(call(file_id, owner), NotFound).message == f"There is no file {file_id!r}."
    assert run(shelf.content(row)) == b"x\n"


def test_lists_are_pages_in_either_order(shelf: Shelf) -> None:
    async def main() -> None:
        rows = []
        for number in range(6):
            shelf.clock.now += 1
            rows.append(
                await shelf.put(owner="ann" if number % 2 else "bob", purpose="batch" if number < 4 else "user_data")
            )

        async def ids(owner: str | None, **wanted: Any) -> tuple[list[int], bool]:
            asked = {"purpose": None, "after": None, "limit": 100, "ascending": False, **wanted}
            page, more = await shelf.store.list(owner, **asked)
            return [rows.index(row) for row in page], more

        assert await ids(None) == ([5, 4, 3, 2, 1, 0], False)
        assert await ids("ann") == ([5, 3, 1], False)
        assert await ids("ann", ascending=True, limit=2) == ([1, 3], True)
        assert await ids("ann", ascending=True, limit=2, after=rows[3].id) == ([5], False)
        assert await ids(None, after=rows[4].id, limit=2) == ([3, 2], True)
        assert await ids(None, purpose="user_data") == ([5, 4], False)
        assert await ids("eve") == ([], False)
        shelf.clock.now += 31 * DAY
        assert await ids(None) == ([5, 4], False), "what has expired is not shown any more, swept or not"

    run(main())


# What is too much


def test_a_file_may_be_as_long_as_the_limit_and_no_longer(shelf: Shelf) -> None:
    assert run(shelf.put(b"x" * LIMIT)).bytes == LIMIT
    before = shelf.names()
    assert refused(shelf.put(b"x" * (LIMIT + 1)), PayloadTooLarge).param == "file"
    refused(shelf.put(b"", expected_bytes=LIMIT + 1), PayloadTooLarge)
    assert shelf.names() == before
    assert run(shelf.put(b"x" * (LIMIT + 1), purpose="batch_output")).bytes == LIMIT + 1


def test_so_many_at_once(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_INCOMING", 2)

    async def main() -> None:
        first, second = (shelf.store.receive("ann", "batch", "x", None) for _ in range(2))
        with pytest.raises(Unavailable) as caught:
            shelf.store.receive("ann", "batch", "x", None)
        assert caught.value.retry_after is not None
        assert (await shelf.put(purpose="batch_output")).bytes == 2
        await first.abort()
        assert (await shelf.put()).bytes == 2
        await second.abort()

    run(main())


def test_what_is_kept_in_reserve_is_for_output_only(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "disk", "16m"):
        shelf = Shelf(tmp_path, reserve_bytes=8 * MIB, max_bytes=100 * MIB, files_in="disk/files")
        try:
            assert run(shelf.put(b"x" * 4 * MIB)).bytes == 4 * MIB
            told = refused(shelf.put(b"x" * 6 * MIB), StorageFull)
            assert "VLLM_BOOTSTRAP_DISK_RESERVE_BYTES" in told.message
            assert told.should_retry is False
            refused(shelf.put(b"", expected_bytes=6 * MIB), StorageFull)
            assert len(shelf.names()) == 1
            output = run(shelf.put(b"y" * 10 * MIB, purpose="batch_output"))
            refused(shelf.put(b"x"), StorageFull)
            run(shelf.store.delete(output.id, None))
            assert run(shelf.put(b"x" * 3 * MIB)).bytes == 3 * MIB
        finally:
            shelf.close()


def test_a_full_disk_refuses_what_comes_and_takes_it_when_there_is_room(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "disk", "4m"):
        shelf = Shelf(tmp_path, max_bytes=100 * MIB, files_in="disk/files")
        try:
            refused(shelf.put(b"x" * 6 * MIB, purpose="batch_output"), StorageFull)
            assert shelf.names() == []
            ballast = small_disk.fill(shelf.folder)
            refused(shelf.put(b"x" * MIB, purpose="batch_output"), StorageFull)
            assert shelf.names() == []
            ballast.unlink()
            assert run(shelf.put(b"x" * MIB)).bytes == MIB
            assert shelf.store.failed is None
        finally:
            shelf.close()


# Disks that fail


def test_the_order_in_which_things_reach_the_disk(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    sync, rename, keep = os.fsync, Path.rename, FileStore.keep

    def noted_sync(fd: int) -> None:
        sync(fd)
        seen.append("sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"sync {os.fstat(fd).st_size}")

    def noted_rename(self: Path, target: Path) -> Path:
        seen.append("rename")
        return rename(self, target)

    async def noted_keep(self: FileStore, row: FileRow) -> None:
        seen.append("row")
        await keep(self, row)
        seen.append("row is there")

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    monkeypatch.setattr(FileStore, "keep", noted_keep)
    monkeypatch.setattr(blobs, "SYNC_BYTES", MIB)
    run(shelf.put(b"x" * (2 * MIB + 600 * KIB)))
    assert seen[-5:] == [f"sync {2 * MIB + 600 * KIB}", "rename", "sync folder", "row", "row is there"]
    assert len(seen) == 7, "a long file is synced as it comes"


def failing(times: list[int], number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A system call that fails for the first time when ``times`` says so, counted from 0, and ever after."""

    def call(*args: Any, **kwargs: Any) -> Any:
        times[0] -= 1
        if times[0] < 0:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("at", [0, 1])
def test_after_a_failed_sync_nothing_is_believed_any_more(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    kept = run(shelf.put(b"before"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing([at], errno.EIO, os.fsync))
        assert refused(shelf.put(b"lost"), StorageFailed).should_retry is False
    assert [name for name in shelf.names() if name.endswith(".part")] == []
    refused(shelf.put(b"later"), StorageFailed)
    assert shelf.store.failed is not None
    assert run(shelf.content(kept)) == b"before"
    assert run(shelf.store.list(None, purpose=None, after=None, limit=10, ascending=True)) == ([kept], False)


@pytest.mark.parametrize(
    ("call", "number", "kind", "stops"),
    [("write", errno.ENOSPC, StorageFull, False), ("write", errno.EDQUOT, StorageFull, False),
     ("write", errno.EIO, StorageFailed, True), ("fsync", errno.ENOSPC, StorageFull, False),
     ("open", errno.EMFILE, Unavailable, False)],
)  # fmt: skip
def test_what_the_system_says_and_what_we_make_of_it(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type[ApiError], *, stops: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(blobs.os, call, failing([0], number, getattr(os, call)))
        refused(shelf.put(b"x" * MIB), kind)
    assert shelf.names() == []
    if stops:
        refused(shelf.put(), kind)
    else:
        assert run(shelf.put()).bytes == 2


def test_a_short_write_is_gone_on_with(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(blobs.os, "write", lambda fd, data: real(fd, data[:1000]))
    data = os.urandom(300 * KIB)
    assert run(shelf.content(run(shelf.put(data)))) == data


def test_without_its_row_no_blob_stays(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    with faulty_disk(folder) as disk:
        shelf = Shelf(folder)
        try:
            disk.write_error = FULL
            refused(shelf.put(), StorageFull)
            assert shelf.names() == []
            disk.write_error = None
            kept = run(shelf.put())
            disk.sync_error = IO_ERROR_FSYNC
            refused(shelf.put(), StorageFailed)
            # Whether its row reached the disk is not known before the next start, so its blob has to stay.
            assert len(shelf.names()) == 2
            disk.sync_error = None
            assert run(shelf.content(kept)) == b"x\n"
        finally:
            shelf.close()


# Who goes away, and what happens meanwhile


def test_an_upload_that_is_given_up_leaves_nothing(shelf: Shelf) -> None:
    async def main() -> None:
        incoming = shelf.store.receive("ann", "batch", "x", None)
        await incoming.write(b"x" * MIB)
        assert len(shelf.names()) == 1
        assert shelf.names()[0].endswith(".part")
        await incoming.abort()
        await incoming.abort()
        assert shelf.names() == []
        done = shelf.store.receive("ann", "batch", "x", None)
        row = await done.commit()
        await done.abort()
        assert shelf.names() == [row.id]
        with pytest.raises(RuntimeError):
            await done.commit()

    run(main())


class Gate:
    """Holds a system call up until told."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.entered, self.open, self._real = threading.Event(), threading.Event(), real

    def __call__(self, *args: Any) -> Any:
        self.entered.set()
        assert self.open.wait(10)
        return self._real(*args)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_slow_disk_holds_up_only_who_writes(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    gate = Gate(getattr(os, call))
    monkeypatch.setattr(blobs.os, call, gate)

    async def main() -> None:
        writing = asyncio.create_task(shelf.put(b"x" * MIB))
        await eventually(gate.entered.is_set)
        assert (await shelf.store.list(None, purpose=None, after=None, limit=1, ascending=True)) == ([], False)
        assert not writing.done()
        gate.open.set()
        assert (await writing).bytes == MIB

    run(main())


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_task_that_is_ended_while_the_disk_is_slow_leaves_nothing(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    gate = Gate(getattr(os, call))
    monkeypatch.setattr(blobs.os, call, gate)

    async def main() -> None:
        writing = asyncio.create_task(shelf.put(b"x" * MIB))
        await eventually(gate.entered.is_set)
        writing.cancel()
        threading.Timer(0.05, gate.open.set).start()
        with contextlib.suppress(asyncio.CancelledError):
            await writing
        assert writing.cancelled()
        assert shelf.names() == []

    run(main())


def test_the_disk_gets_large_pieces(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = os.write
    monkeypatch.setattr(blobs.os, "write", lambda fd, data: (sizes.append(len(data)), real(fd, data))[1])

    async def main() -> None:
        incoming = shelf.store.receive("ann", "batch", "x", None)
        for _ in range(1000):
            await incoming.write(b"x" * KIB)
        await incoming.commit()

    run(main())
    assert sum(sizes) == 1000 * KIB
    assert min(sizes[:-1]) >= 256 * KIB


def test_who_reads_a_file_that_is_deleted_reads_on(shelf: Shelf) -> None:
    row = run(shelf.put(b"still here"))
    with (shelf.folder / row.id).open("rb") as reader:
        run(shelf.store.delete(row.id, "ann"))
        assert shelf.names() == []
        assert reader.read() == b"still here"
    refused(shelf.store.get(row.id, "ann"), NotFound)
    refused(shelf.store.delete(row.id, "ann"), NotFound)


def test_a_blob_that_cannot_be_removed_is_left_to_the_sweep(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        row = await shelf.put()
        os.utime(shelf.folder / row.id, (NOW, NOW))
        with monkeypatch.context() as patch:
            patch.setattr(blobs.Path, "unlink", failing([0], errno.EBUSY, Path.unlink))
            await shelf.store.delete(row.id, "ann")
        assert shelf.names() == [row.id]
        with pytest.raises(NotFound):
            await shelf.store.get(row.id, "ann")
        shelf.clock.now += 3601
        assert await shelf.store.sweep() == 1
        assert shelf.names() == []

    run(main())


def test_of_two_who_delete_a_file_one_is_told_that_it_is_gone(shelf: Shelf) -> None:
    async def main() -> None:
        row = await shelf.put()
        ends = await asyncio.gather(*(shelf.store.delete(row.id, "ann") for _ in range(2)), return_exceptions=True)
        assert [type(end) for end in ends if end is not None] == [NotFound]

    run(main())


def test_a_given_id_is_written_again_after_a_crash(shelf: Shelf) -> None:
    async def main() -> None:
        first = await shelf.put(b"half", purpose="batch_output", file_id=GIVEN)
        (shelf.folder / f"{GIVEN}.01234567.part").write_bytes(b"torn")
        shelf.clock.now += 60
        await shelf.put(b"the whole", purpose="batch_output", file_id=GIVEN)
        found = await shelf.store.get(GIVEN, "ann")
        assert (found.bytes, found.created_at) == (9, first.created_at)
        assert await shelf.content(found) == b"the whole"
        given_up = shelf.store.receive("ann", "batch_output", "x", None, file_id=GIVEN)
        with pytest.raises(ValueError, match=GIVEN):
            shelf.store.receive("ann", "batch_output", "x", None, file_id=GIVEN)
        await given_up.write(b"x" * MIB)
        await given_up.abort()
        assert await shelf.content(found) == b"the whole"
        for wrong in ("x", "../" + GIVEN, GIVEN.upper()):
            with pytest.raises(ValueError, match="cannot be written"):
                shelf.store.receive("ann", "batch_output", "x", None, file_id=wrong)

    run(main())


# Sweeping


def test_a_sweep_takes_what_has_expired_and_nothing_else(shelf: Shelf) -> None:
    async def main() -> None:
        short = await shelf.put(expires=3600)
        long = await shelf.put(expires=7200)
        forever = await shelf.put(purpose="user_data")
        shelf.clock.now += 3600
        with pytest.raises(NotFound):
            await shelf.store.get(short.id, "ann")
        assert await shelf.store.sweep() == 1
        assert shelf.names() == sorted([long.id, forever.id])
        shelf.clock.now += 365 * DAY
        assert await shelf.store.sweep() == 1
        assert await shelf.store.sweep() == 0
        assert shelf.names() == [forever.id]

    run(main())


def test_a_sweep_takes_many(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SWEEP_ROWS", 3)

    async def main() -> None:
        for _ in range(8):
            await shelf.put()
        shelf.clock.now += 31 * DAY
        assert await shelf.store.sweep() == 8
        assert shelf.names() == []

    run(main())


def test_a_sweep_takes_what_a_crash_has_left(shelf: Shelf) -> None:
    def left(name: str, age_s: float) -> None:
        path = shelf.folder / name
        path.write_bytes(b"left")
        os.utime(path, (NOW - age_s, NOW - age_s))

    async def main() -> None:
        kept = await shelf.put()
        os.utime(shelf.folder / kept.id, (NOW - DAY, NOW - DAY))
        left("file-" + "1" * 20, 3601)
        left("file-" + "2" * 20, 60)
        left("file-" + "3" * 20 + ".deadbeef.part", 0)
        left("notes.txt", DAY)
        coming = shelf.store.receive("ann", "batch", "x", None)
        await coming.write(b"x" * MIB)
        assert await shelf.store.sweep() == 2
        assert len(shelf.names()) == 4
        row = await coming.commit()
        assert shelf.names() == sorted([kept.id, row.id, "file-" + "2" * 20, "notes.txt"])

    run(main())
