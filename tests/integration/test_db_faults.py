"""Disks that are full, fail, or lose power: what was accepted stays, and nothing is pretended."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.aio import run
from tests.support.faulty_disk import (
    FULL,
    IO_ERROR_FSYNC,
    IO_ERROR_READ,
    IO_ERROR_SHARED_MEMORY_SIZE,
    IO_ERROR_WRITE,
    FaultyDisk,
    faulty_disk,
)
from vllm_bootstrap.db import CHECKPOINT_ROWS, CannotOpen, Database
from vllm_bootstrap.errors import StorageFailed, StorageFull

WAL = "state.db-wal"


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "0001_first.sql").write_text("CREATE TABLE kept (n INTEGER PRIMARY KEY, text TEXT NOT NULL);")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    folder = tmp_path / "state"
    folder.mkdir()
    with faulty_disk(folder) as layer:
        yield layer


@pytest.fixture
def db(disk: FaultyDisk, migrations: Path) -> Iterator[Database]:
    database = Database.open(disk.folder / "state.db", migrations=migrations)
    yield database
    disk.write_error = disk.sync_error = disk.read_error = None
    database.close()


def insert(number: int, text: str = "x") -> Callable[[sqlite3.Connection], int]:
    return lambda conn: conn.execute("INSERT INTO kept VALUES (?, ?)", (number, text)).rowcount


def numbers(conn: sqlite3.Connection) -> list[int]:
    return [row[0] for row in conn.execute("SELECT n FROM kept ORDER BY n")]


def after_power_cut(disk: FaultyDisk, tmp_path: Path, migrations: Path, name: str = "cut") -> list[int]:
    database = Database.open(disk.cut_power(tmp_path / name) / "state.db", migrations=migrations)
    try:
        return run(database.read(numbers))
    finally:
        database.close()


async def behind_a_closed_door(db: Database, *works: Callable[[sqlite3.Connection], object]) -> list[object]:
    """Let writes pile up behind one that is under way, so that they form one group; their results or exceptions."""
    entered, door = threading.Event(), threading.Event()

    def wait(_: sqlite3.Connection) -> None:
        entered.set()
        door.wait(10)

    first = asyncio.create_task(db.write(wait))
    await asyncio.to_thread(entered.wait, 10)
    rest = [asyncio.create_task(db.write(work)) for work in works]
    await asyncio.sleep(0)
    door.set()
    await first
    return list(await asyncio.gather(*rest, return_exceptions=True))


def test_what_a_write_returned_survives_a_power_cut(
    disk: FaultyDisk, db: Database, tmp_path: Path, migrations: Path
) -> None:
    for number in range(3):
        run(db.write(insert(number)))
        assert after_power_cut(disk, tmp_path, migrations, f"cut{number}") == list(range(number + 1))


def test_that_power_cut_would_be_noticed_if_syncs_did_nothing(
    disk: FaultyDisk, db: Database, tmp_path: Path, migrations: Path
) -> None:
    disk.lies = True
    run(db.write(insert(1)))
    assert run(db.read(numbers)) == [1]
    disk.lies = False
    assert after_power_cut(disk, tmp_path, migrations) == []


def test_normal_synchronous_gives_up_exactly_that(disk: FaultyDisk, tmp_path: Path, migrations: Path) -> None:
    database = Database.open(disk.folder / "state.db", synchronous="NORMAL", migrations=migrations)
    run(database.write(insert(1)))
    syncs = disk.syncs[WAL]
    run(database.write(insert(2)))
    assert disk.syncs[WAL] == syncs
    assert 2 not in after_power_cut(disk, tmp_path, migrations)
    database.close()


def test_each_lone_write_is_synced_and_a_group_once(disk: FaultyDisk, db: Database) -> None:
    async def main() -> None:
        await db.write(insert(0))
        before = disk.syncs[WAL]
        await db.write(insert(1))
        assert disk.syncs[WAL] == before + 1
        before = disk.syncs[WAL]
        results = await behind_a_closed_door(db, *(insert(n) for n in range(10, 60)))
        assert results == [1] * 50
        assert disk.syncs[WAL] == before + 1  # the writer that held the door changed nothing

    run(main())


def test_a_full_disk_refuses_and_recovers(disk: FaultyDisk, db: Database, tmp_path: Path, migrations: Path) -> None:
    async def main() -> None:
        await db.write(insert(1))
        disk.write_error = FULL
        for number in (2, 3):
            with pytest.raises(StorageFull) as caught:
                await db.write(insert(number))
            assert caught.value.status == 507
        assert db.failed is None
        assert await db.read(numbers) == [1]
        disk.write_error = None
        await db.write(insert(4))
        assert await db.read(numbers) == [1, 4]

    run(main())
    assert after_power_cut(disk, tmp_path, migrations) == [1, 4]


def test_a_full_disk_under_a_group_refuses_each_of_it(disk: FaultyDisk, db: Database) -> None:
    def fill(conn: sqlite3.Connection) -> None:
        disk.write_error = FULL
        conn.execute("INSERT INTO kept VALUES (50, 'x')")

    def make_room(conn: sqlite3.Connection) -> None:
        disk.write_error = None
        conn.execute("INSERT INTO kept VALUES (51, 'x')")

    async def main() -> None:
        # The commit of the group fails; then each is tried alone, and the third makes room.
        results = await behind_a_closed_door(db, insert(1), fill, make_room, insert(2), fill)
        assert [type(r) for r in results] == [StorageFull, StorageFull, type(None), int, StorageFull]
        assert await db.read(numbers) == [2, 51]

    run(main())


def test_a_real_limit_of_the_file_counts_as_full(db: Database) -> None:
    async def main() -> None:
        pages = await db.write(lambda conn: conn.execute("PRAGMA page_count").fetchone()[0])
        await db.write(lambda conn: conn.execute(f"PRAGMA max_page_count={pages + 1}").fetchone())
        with pytest.raises(StorageFull):
            await db.write(insert(1, "x" * 100_000))
        results = await behind_a_closed_door(db, insert(2), insert(3, "x" * 100_000), insert(4))
        assert [type(r) for r in results] == [int, StorageFull, int]
        await db.write(lambda conn: conn.execute("PRAGMA max_page_count=100000").fetchone())
        await db.write(insert(5, "x" * 100_000))
        assert await db.read(numbers) == [2, 4, 5]

    run(main())


@pytest.mark.parametrize(("field", "code"), [("sync_error", IO_ERROR_FSYNC), ("write_error", IO_ERROR_WRITE)])
def test_a_failed_disk_is_never_trusted_again(
    disk: FaultyDisk, db: Database, tmp_path: Path, migrations: Path, field: str, code: int
) -> None:
    async def main() -> None:
        await db.write(insert(1))
        setattr(disk, field, code)
        syncs = disk.syncs[WAL]
        with pytest.raises(StorageFailed):
            await db.write(insert(2))
        assert disk.syncs[WAL] <= syncs + 1  # a failed sync is not tried again
        setattr(disk, field, None)
        syncs = disk.syncs[WAL]
        assert isinstance(db.failed, StorageFailed)
        with pytest.raises(StorageFailed, match="cannot be relied on"):
            await db.write(insert(3))
        assert disk.syncs[WAL] == syncs

    run(main())
    assert after_power_cut(disk, tmp_path, migrations) == [1]


def test_a_failed_sync_fails_the_whole_group_and_what_waits_behind_it(disk: FaultyDisk, db: Database) -> None:
    async def main() -> None:
        def fail(conn: sqlite3.Connection) -> None:
            disk.sync_error = IO_ERROR_FSYNC
            conn.execute("INSERT INTO kept VALUES (50, 'x')")

        syncs = disk.syncs[WAL]
        results = await behind_a_closed_door(db, insert(1), fail, insert(2))
        assert [type(r) for r in results] == [StorageFailed] * 3
        assert disk.syncs[WAL] == syncs + 1

    run(main())


def test_a_read_error_is_told_to_the_reader_only(disk: FaultyDisk, db: Database) -> None:
    async def main() -> None:
        await db.write(insert(1))
        disk.read_error = IO_ERROR_READ
        with pytest.raises(StorageFailed):
            await db.read(numbers)
        disk.read_error = None
        assert await db.read(numbers) == [1]
        assert db.failed is None

    run(main())


def many(conn: sqlite3.Connection) -> None:
    conn.executemany("INSERT INTO kept VALUES (?, 'x')", [(n,) for n in range(CHECKPOINT_ROWS)])


def test_the_log_is_moved_into_the_database_now_and_then(disk: FaultyDisk, db: Database) -> None:
    async def main() -> None:
        await db.write(lambda _: None)
        moved = disk.syncs["state.db"]
        await db.write(many)
        await db.write(lambda _: None)  # the first write's answer comes before its log is moved
        assert disk.syncs["state.db"] == moved + 1

    run(main())


def test_a_sync_that_fails_while_the_log_is_moved_is_noticed(
    disk: FaultyDisk, db: Database, tmp_path: Path, migrations: Path
) -> None:
    """SQLite's own automatic checkpoint would hide it."""

    async def main() -> None:
        disk.failing_file, disk.sync_error = "state.db", IO_ERROR_FSYNC
        await db.write(many)
        with pytest.raises(StorageFailed):
            await db.write(insert(-1))

    run(main())
    disk.sync_error = None
    assert after_power_cut(disk, tmp_path, migrations) == list(range(CHECKPOINT_ROWS))


def test_a_disk_that_fills_while_the_log_is_moved_harms_nothing(disk: FaultyDisk, db: Database) -> None:
    async def main() -> None:
        disk.failing_file, disk.write_error = "state.db", FULL
        await db.write(many)
        await db.write(insert(-1))
        assert db.failed is None
        assert len(await db.read(numbers)) == CHECKPOINT_ROWS + 1

    run(main())


def test_on_a_network_file_system_accepted_writes_survive_as_well(
    disk: FaultyDisk, tmp_path: Path, migrations: Path
) -> None:
    database = Database.open(disk.folder / "state.db", migrations=migrations, network=True)
    for number in range(3):
        run(database.write(insert(number)))
        assert after_power_cut(disk, tmp_path, migrations, f"cut{number}") == list(range(number + 1))
    assert disk.syncs[WAL] == 0
    database.close()


def test_on_a_network_file_system_a_failed_sync_takes_the_write_back(disk: FaultyDisk, migrations: Path) -> None:
    database = Database.open(disk.folder / "state.db", migrations=migrations, network=True)
    run(database.write(insert(1)))
    disk.sync_error = IO_ERROR_FSYNC
    with pytest.raises(StorageFailed):
        run(database.write(insert(2)))
    assert database.failed is not None
    disk.sync_error = None
    database.close()
    with sqlite3.connect(disk.folder / "state.db") as conn:
        assert numbers(conn) == [1]
    conn.close()


def test_where_memory_cannot_be_shared_the_database_is_not_opened_with_less_than_promised(
    disk: FaultyDisk, migrations: Path
) -> None:
    """SQLite itself would silently keep another journal mode."""
    disk.no_shared_memory = True
    with pytest.raises(CannotOpen, match="WAL is not possible here, SQLite offers delete"):
        Database.open(disk.folder / "state.db", migrations=migrations, network=False)
    database = Database.open(disk.folder / "state.db", migrations=migrations, network=True)
    run(database.write(insert(1)))
    database.close()


@pytest.mark.parametrize("code", [FULL, IO_ERROR_SHARED_MEMORY_SIZE])
def test_a_disk_that_is_full_at_start_is_called_so(disk: FaultyDisk, migrations: Path, code: int) -> None:
    disk.write_error = code
    with pytest.raises(CannotOpen, match="the disk is full: make room"):
        Database.open(disk.folder / "state.db", migrations=migrations)
    disk.write_error = None
    Database.open(disk.folder / "state.db", migrations=migrations).close()


def test_a_rollback_that_fails_is_noticed_by_the_next_write(disk: FaultyDisk, migrations: Path) -> None:
    database = Database.open(disk.folder / "state.db", migrations=migrations, network=True)

    def spill_then_fail(conn: sqlite3.Connection) -> None:
        conn.execute("PRAGMA cache_size=5")
        conn.executemany("INSERT INTO kept VALUES (?, zeroblob(4000))", [(n,) for n in range(50)])
        disk.read_error = disk.write_error = IO_ERROR_READ
        raise LookupError

    with pytest.raises(LookupError):
        run(database.write(spill_then_fail))
    with pytest.raises(StorageFailed):
        run(database.write(insert(1000)))
    assert isinstance(database.failed, StorageFailed)
    disk.read_error = disk.write_error = None
    database.close()
    reopened = Database.open(disk.folder / "state.db", migrations=migrations, network=True)
    assert run(reopened.read(numbers)) == []
    reopened.close()
