"""Disks that are full, fail or come back damaged under batches: work waits and says so, nothing is lost or claimed."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from tests.support import small_disk
from tests.support.aio import run
from tests.support.batch_office import LINES, OWNER, InstantEngine, Office, index_here, input_lines, office
from tests.support.faulty_disk import FULL, IO_ERROR_FSYNC, IO_ERROR_WRITE, faulty_disk
from vllm_bootstrap.batches import working
from vllm_bootstrap.batches.indexer import OnProgress
from vllm_bootstrap.batches.indexing import Outcome, Task
from vllm_bootstrap.batches.jobs import State
from vllm_bootstrap.batches.types import BatchView
from vllm_bootstrap.errors import StorageFailed, StorageFull

ANSWERED = 40
WHOLE = (LINES, LINES - LINES // 10, LINES // 10)


async def half_done(one: Office) -> str:
    """A batch with ``ANSWERED`` lines recorded, whose engine holds the rest."""
    view = await one.create(await one.upload(input_lines()))
    await until(one, view.row.id, lambda view: view.row.counts.left == LINES - ANSWERED)
    return view.row.id


async def until(one: Office, batch_id: str, holds: Callable[[BatchView], object], timeout_s: float = 15) -> BatchView:
    async with asyncio.timeout(timeout_s):
        while not holds(view := await one.batches.get(batch_id, OWNER)):
            await asyncio.sleep(0.002)
    found: BatchView = view
    return found


async def whole(one: Office, batch_id: str) -> None:
    """It ends well, with one record of each line."""
    view = await one.ended(batch_id)
    assert view.row.phase.state is State.COMPLETED
    assert view.row.counts == WHOLE
    records = [
        *await one.content(view.row.output_file_id or ""),
        *await one.content(view.row.error_file_id or ""),
    ]
    assert sorted(r["custom_id"] for r in records) == sorted(f"id-{n}" for n in range(1, LINES + 1))


def sound(folder: Path) -> None:
    for path in folder.rglob("*.db"):
        with closing(sqlite3.connect(path)) as conn:
            assert conn.execute("PRAGMA quick_check").fetchall() == [("ok",)]


def recorded(folder: Path, batch_id: str) -> set[tuple[str, int]]:
    with closing(sqlite3.connect(folder / "batches" / f"{batch_id}.db")) as conn:
        return {(batch_id, row[0]) for row in conn.execute("SELECT line FROM records")}


def test_a_disk_that_fills_while_lines_are_recorded(tmp_path: Path) -> None:
    async def main() -> None:
        async with office(folder, InstantEngine(pace_s=0.02, holds_after=ANSWERED)) as one:
            batch_id = await half_done(one)
            spare = await one.upload(input_lines(5))
            ballast = small_disk.fill(folder)
            one.engine.release()
            view = await until(one, batch_id, lambda view: "full" in (view.progress.waits_for or ""))
            assert view.row.phase.state is State.IN_PROGRESS
            begun = len(one.engine.executed)
            with pytest.raises(StorageFull):
                await one.upload(input_lines(500))
            with pytest.raises(StorageFull):
                await one.create(spare)
            assert len(one.engine.executed) == begun < LINES
            ballast.unlink()
            await whole(one, batch_id)
            assert [key for key in one.engine.executed if key[0] == batch_id].count((batch_id, 1)) == 1
            await one.upload(input_lines(5))

    folder = tmp_path / "small"
    with small_disk.mounted(folder, "2m"):
        run(main())
        sound(folder)


@pytest.mark.parametrize("part", ["records", "rows", "output"])
def test_a_disk_without_room_for_a_moment_loses_nothing(tmp_path: Path, part: str) -> None:
    async def main(folder: Path) -> None:
        async with office(folder, InstantEngine(holds_after=ANSWERED)) as one:
            batch_id = await half_done(one)
            if part == "output":
                fails = mock.patch.object(os, "write", side_effect=OSError(errno.ENOSPC, "No space left on device"))
                with fails:
                    one.engine.release()
                    view = await until(one, batch_id, lambda view: "full" in (view.progress.waits_for or ""))
                assert view.row.phase.state is State.FINALIZING
            else:
                disk.failing_file = "state.db-wal" if part == "rows" else f"{batch_id}.db-wal"
                disk.write_error = FULL
                one.engine.release()
                view = await until(one, batch_id, lambda view: "full" in (view.progress.waits_for or ""))
                assert view.row.phase.state is State.IN_PROGRESS
                disk.write_error = None
            await whole(one, batch_id)
            assert len(one.engine.executed) == LINES

    with faulty_disk(tmp_path / "state") as disk:
        run(main(tmp_path / "state"))
    sound(tmp_path)


@pytest.mark.parametrize(("field", "code"), [("sync_error", IO_ERROR_FSYNC), ("write_error", IO_ERROR_WRITE)])
def test_a_disk_that_fails_under_the_records_stops_that_batch_and_nothing_is_claimed(
    tmp_path: Path, field: str, code: int
) -> None:
    folder = tmp_path / "state"

    async def first_life() -> str:
        async with office(folder, InstantEngine(holds_after=ANSWERED)) as one:
            batch_id = await half_done(one)
            disk.failing_file = f"{batch_id}.db-wal"
            setattr(disk, field, code)
            one.engine.release()
            view = await until(one, batch_id, lambda view: "cannot be relied on" in (view.progress.waits_for or ""))
            assert view.row.phase.state is State.IN_PROGRESS
            assert view.row.counts.left == LINES - ANSWERED
            begun = len(one.engine.executed)
            setattr(disk, field, None)
            other = await one.create(await one.upload(input_lines()))
            await whole(one, other.row.id)
            assert len(one.engine.executed) == begun + LINES
            view = await one.batches.get(batch_id, OWNER)
            assert "restart" in (view.progress.waits_for or "")
            assert view.row.counts.left == LINES - ANSWERED
            return batch_id

    async def second_life(batch_id: str) -> None:
        before = recorded(folder, batch_id)
        assert len(before) >= ANSWERED
        async with office(folder, InstantEngine()) as two:
            await whole(two, batch_id)
            assert before.isdisjoint(two.engine.executed)

    with faulty_disk(folder) as disk:
        batch_id = run(first_life())
    run(second_life(batch_id))
    sound(folder)


def test_a_disk_that_fails_under_the_rows_stops_all_and_a_restart_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "state"

    async def first_life() -> str:
        async with office(folder, InstantEngine(holds_after=ANSWERED)) as one:
            batch_id = await half_done(one)
            spare = await one.upload(input_lines(5))
            disk.failing_file, disk.sync_error = "state.db-wal", IO_ERROR_FSYNC
            with pytest.raises(StorageFailed):
                await one.create(spare)
            with pytest.raises(StorageFailed):
                await one.upload(input_lines(5))
            with pytest.raises(StorageFailed):
                await one.batches.cancel(batch_id, OWNER)
            one.engine.release()
            view = await until(one, batch_id, lambda view: "cannot be relied on" in (view.progress.waits_for or ""))
            assert view.row.phase.state is State.IN_PROGRESS
            disk.sync_error = None
            return batch_id

    async def second_life(batch_id: str) -> None:
        async with office(folder, InstantEngine()) as two:
            await whole(two, batch_id)
            assert [key for key in two.engine.executed if key[0] == batch_id] == []
            for view in (await two.batches.list(OWNER, after=None, limit=10))[0]:
                assert (await two.ended(view.row.id)).row.phase.state is State.COMPLETED

    with faulty_disk(folder) as disk:
        batch_id = run(first_life())
    run(second_life(batch_id))
    sound(folder)


def test_a_disk_that_fails_under_the_output_keeps_the_batch_from_ending(tmp_path: Path) -> None:
    async def first_life() -> str:
        async with office(tmp_path, InstantEngine(holds_after=ANSWERED)) as one:
            batch_id = await half_done(one)
            with mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "Input/output error")):
                one.engine.release()
                view = await until(one, batch_id, lambda view: "relied on" in (view.progress.waits_for or ""))
            assert view.row.phase.state is State.FINALIZING
            with pytest.raises(StorageFailed):
                await one.upload(input_lines(5))
            return batch_id

    async def second_life(batch_id: str) -> None:
        async with office(tmp_path, InstantEngine()) as two:
            await whole(two, batch_id)
            assert two.engine.executed == []

    batch_id = run(first_life())
    run(second_life(batch_id))


def test_lines_that_cannot_be_opened_for_lack_of_room_are_waited_for(tmp_path: Path) -> None:
    """A full disk at a bad moment is no lost storage."""
    folder = tmp_path / "state"

    async def no_room_afterwards(task: Task, on_progress: OnProgress | None = None) -> Outcome:
        found = await index_here(task, on_progress)
        disk.failing_file, disk.write_error = f"{Path(task.database).name}-journal", FULL
        return found

    async def main() -> None:
        async with office(folder, InstantEngine(), index=no_room_afterwards) as one:
            view = await one.create(await one.upload(input_lines()))
            view = await until(one, view.row.id, lambda view: "full" in (view.progress.waits_for or ""))
            assert view.row.phase.state is State.IN_PROGRESS
            disk.write_error = None
            await whole(one, view.row.id)

    with faulty_disk(folder) as disk:
        run(main())


def torn(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2 + 100)


def gone(path: Path) -> None:
    path.unlink()


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)


@pytest.mark.parametrize("spoil", [torn, gone, garbage])
def test_lines_that_came_back_damaged_fail_their_batch_saying_so(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    async def first_life() -> tuple[str, str]:
        async with office(tmp_path, InstantEngine(holds_after=ANSWERED)) as one:
            first = await half_done(one)
            other = await one.create(await one.upload(input_lines()))
            await until(one, other.row.id, lambda view: view.row.counts.total)
            return first, other.row.id

    async def second_life(first: str, other: str) -> None:
        async with office(tmp_path, InstantEngine()) as two:
            view = await two.ended(first)
            assert view.row.phase.state is State.FAILED
            assert [error.code for error in view.row.errors] == ["storage_lost"]
            assert first in view.row.errors[0].message
            await whole(two, other)

    first, other = run(first_life())
    spoil(tmp_path / "batches" / f"{first}.db")
    run(second_life(first, other))


def test_lines_that_a_newer_program_wrote_are_left_alone(tmp_path: Path) -> None:
    async def life(*, newer: bool) -> str:
        async with office(tmp_path, InstantEngine(holds_after=ANSWERED)) as one:
            rows, _ = await one.batches.list(OWNER, after=None, limit=1)
            if not rows:
                return await half_done(one)
            batch_id: str = rows[0].row.id
            if newer:
                view = await until(one, batch_id, lambda view: view.progress.waits_for)
                assert "newer program" in (view.progress.waits_for or "")
                assert view.row.phase.state is State.IN_PROGRESS
                assert one.engine.executed == []
            else:
                one.engine.release()
                await whole(one, batch_id)
            return batch_id

    batch_id = run(life(newer=False))
    path = tmp_path / "batches" / f"{batch_id}.db"
    for version in (99, 1):
        with closing(sqlite3.connect(path)) as conn:
            conn.execute(f"PRAGMA user_version={version}")
        before = path.read_bytes()
        run(life(newer=version == 99))
        if version == 99:
            assert path.read_bytes() == before


def test_a_log_that_was_cut_off_anywhere_is_recovered_to_its_last_whole_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state directory is copied while lines are being recorded, and its log cut off at some odd places."""
    copies = [tmp_path / f"copy{number}" for number in range(6)]
    monkeypatch.setattr(working, "GATHER_S", 0.0)  # many small writes

    async def first_life() -> str:
        async with office(tmp_path / "state", InstantEngine(pace_s=0.001, holds_after=LINES - 40)) as one:
            view = await one.create(await one.upload(input_lines()))
            await until(one, view.row.id, lambda view: view.row.counts.left == 40)
            for number, copy in enumerate(copies):
                shutil.copytree(tmp_path / "state", copy)
                log = copy / "batches" / f"{view.row.id}.db-wal"
                with log.open("r+b") as file:
                    file.truncate(log.stat().st_size * (number + 1) // 7 + 13)
            batch_id: str = view.row.id
            return batch_id

    async def second_life(folder: Path, batch_id: str) -> int:
        before = recorded(folder, batch_id)
        async with office(folder, InstantEngine()) as two:
            await whole(two, batch_id)
            assert before.isdisjoint(two.engine.executed)
            return len(before)

    batch_id = run(first_life())
    found = [run(second_life(copy, batch_id)) for copy in copies]
    assert found == sorted(found)
    assert len(set(found)) > 3
    for copy in copies:
        sound(copy)
