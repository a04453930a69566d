from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.aio import eventually, run
from vllm_bootstrap import db as db_module
from vllm_bootstrap.db import GROUP_MAX, CannotOpen, Database, NewerSchema, connect, load_queries
from vllm_bootstrap.errors import Unavailable
from vllm_bootstrap.schema import migrate, pending_migrations

FIRST = "CREATE TABLE kept (n INTEGER PRIMARY KEY, text TEXT NOT NULL DEFAULT 'x');"
SECOND = "ALTER TABLE kept ADD COLUMN more TEXT;\nUPDATE kept SET more = 'old';"


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    return scripts(tmp_path / "migrations", FIRST)


def scripts(folder: Path, *texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts, 1):
        (folder / f"{number:04d}_step.sql").write_text(text)
    return folder


@pytest.fixture
def db(tmp_path: Path, migrations: Path) -> Iterator[Database]:
    database = Database.open(tmp_path / "state.db", migrations=migrations)
    yield database
    database.close()


def insert(number: int) -> Callable[[sqlite3.Connection], int]:
    return lambda conn: conn.execute("INSERT INTO kept (n) VALUES (?)", (number,)).rowcount


def numbers(conn: sqlite3.Connection) -> list[int]:
    return [row["n"] for row in conn.execute("SELECT n FROM kept ORDER BY n")]


class Door:
    """Keeps the writer thread busy until opened, so that what is asked for meanwhile forms one group."""

    def __init__(self) -> None:
        self._entered, self._open = threading.Event(), threading.Event()

    def __call__(self, _: sqlite3.Connection) -> None:
        self._entered.set()
        assert self._open.wait(10)

    async def entered(self) -> None:
        await eventually(self._entered.is_set)

    def open(self) -> None:
        self._open.set()


# Writing and reading


def test_a_write_is_read_back(db: Database) -> None:
    async def main() -> None:
        assert await db.write(insert(1)) == 1
        assert await db.read(numbers) == [1]

    run(main())


def test_a_write_that_raises_changes_nothing(db: Database) -> None:
    def half(conn: sqlite3.Connection) -> None:
        conn.execute("INSERT INTO kept (n) VALUES (1)")
        raise LookupError("halfway")

    async def main() -> None:
        with pytest.raises(LookupError, match="halfway"):
            await db.write(half)
        assert await db.read(numbers) == []

    run(main())


def test_in_a_group_one_failure_takes_back_only_itself(db: Database) -> None:
    async def main() -> None:
        door = Door()
        first = asyncio.create_task(db.write(door))
        await door.entered()
        works = [insert(1), insert(2), insert(1), insert(3)]
        tasks = [asyncio.create_task(db.write(work)) for work in works]
        await asyncio.sleep(0)
        door.open()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [type(r) for r in results] == [type(None), int, int, sqlite3.IntegrityError, int]
        assert await db.read(numbers) == [1, 2, 3]

    run(main())


def test_a_write_that_ends_the_transaction_does_not_take_others_with_it(db: Database) -> None:
    def abandon(conn: sqlite3.Connection) -> None:
        conn.execute("INSERT OR ROLLBACK INTO kept (n) VALUES (1)")

    async def main() -> None:
        door = Door()
        first = asyncio.create_task(db.write(door))
        await door.entered()
        tasks = [asyncio.create_task(db.write(work)) for work in (insert(1), abandon, insert(2))]
        await asyncio.sleep(0)
        door.open()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [type(r) for r in results[1:]] == [int, sqlite3.IntegrityError, int]
        assert await db.read(numbers) == [1, 2]

    run(main())


def test_many_writers_at_once(db: Database) -> None:
    count = 3 * GROUP_MAX + 1

    async def main() -> None:
        door = Door()
        first = asyncio.create_task(db.write(door))
        await door.entered()
        tasks = [asyncio.create_task(db.write(insert(n))) for n in range(count)]
        await asyncio.sleep(0)
        door.open()
        assert await asyncio.gather(first, *tasks) == [None] + [1] * count
        assert await db.read(numbers) == list(range(count))

    run(main())


def test_a_cancelled_write_that_has_not_begun_is_dropped(db: Database) -> None:
    async def main() -> None:
        door = Door()
        first = asyncio.create_task(db.write(door))
        await door.entered()
        late = asyncio.create_task(db.write(insert(1)))
        other = asyncio.create_task(db.write(insert(2)))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.sleep(0)
        door.open()
        await asyncio.gather(first, other)
        assert late.cancelled()
        assert await db.read(numbers) == [2]

    run(main())


def test_a_cancelled_write_that_has_begun_goes_on_to_its_end(db: Database) -> None:
    async def main() -> None:
        door = Door()

        def slow(conn: sqlite3.Connection) -> None:
            door(conn)
            insert(1)(conn)

        begun = asyncio.create_task(db.write(slow))
        await door.entered()
        begun.cancel()
        await asyncio.wait({begun})
        assert begun.cancelled()
        door.open()
        await db.write(insert(2))
        assert await db.read(numbers) == [1, 2]

    run(main())


def test_reads_do_not_wait_for_writes_and_see_one_state(db: Database) -> None:
    async def main() -> None:
        door = Door()

        def slow(conn: sqlite3.Connection) -> None:
            insert(1)(conn)
            door(conn)

        writing = asyncio.create_task(db.write(slow))
        await door.entered()
        assert await db.read(numbers) == []
        door.open()
        await writing
        assert await db.read(numbers) == [1]

    run(main())


def test_a_read_cannot_write(db: Database) -> None:
    with pytest.raises(Unavailable, match="readonly"):
        run(db.read(insert(1)))
    assert run(db.read(numbers)) == []


def test_a_program_that_holds_the_file_makes_writes_unavailable_for_all_that_wait(
    tmp_path: Path, migrations: Path
) -> None:
    database = Database.open(tmp_path / "state.db", migrations=migrations, busy_timeout_s=0.02)
    stranger = sqlite3.connect(tmp_path / "state.db", isolation_level=None)

    async def main() -> None:
        stranger.execute("BEGIN IMMEDIATE")
        results = await asyncio.gather(*(database.write(insert(n)) for n in (3, 4, 5)), return_exceptions=True)
        assert [type(r) for r in results] == [Unavailable] * 3
        stranger.execute("ROLLBACK")
        await database.write(insert(6))
        assert await database.read(numbers) == [6]

    run(main())
    stranger.close()
    database.close()


def test_close_finishes_what_was_asked_for_and_refuses_the_rest(db: Database) -> None:
    async def main() -> None:
        door = Door()
        first = asyncio.create_task(db.write(door))
        await door.entered()
        waiting = asyncio.create_task(db.write(insert(1)))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(db.close))
        await eventually(lambda: db._closing)
        door.open()
        await asyncio.gather(first, waiting, closing)
        with pytest.raises(RuntimeError, match="is closed"):
            await db.write(insert(2))

    run(main())
    db.close()
    reopened = Database.open(db.path, migrations=db.path.parent / "migrations")
    assert run(reopened.read(numbers)) == [1]
    reopened.close()


def test_the_settings_that_make_it_durable_are_in_force(db: Database) -> None:
    names = ["journal_mode", "synchronous", "foreign_keys", "recursive_triggers", "busy_timeout", "wal_autocheckpoint"]

    def pragmas(conn: sqlite3.Connection) -> list[object]:
        return [conn.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    assert run(db.write(pragmas)) == ["wal", 2, 1, 1, 5000, 0]


def test_files_are_for_their_owner_only(db: Database) -> None:
    run(db.write(insert(1)))
    for file in db.path.parent.glob("state.db*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_accepted_writes_survive_kill_9(tmp_path: Path, migrations: Path) -> None:
    program = """
import asyncio, sys
from pathlib import Path
from vllm_bootstrap.db import Database

async def main():
    db = Database.open(Path(sys.argv[1]), migrations=Path(sys.argv[2]))
    for n in range(100_000):
        await db.write(lambda conn: conn.execute("INSERT INTO kept (n) VALUES (?)", (n,)).rowcount)
        print(n, flush=True)

asyncio.run(main())
"""
    path = tmp_path / "state.db"
    child = subprocess.Popen([sys.executable, "-c", program, path, migrations], stdout=subprocess.PIPE)
    assert child.stdout is not None
    accepted = [int(child.stdout.readline()) for _ in range(20)]
    child.send_signal(signal.SIGKILL)
    accepted += [int(line) for line in child.stdout.read().splitlines() if line.strip()]
    child.wait(10)
    child.stdout.close()
    database = Database.open(path, migrations=migrations)
    found = run(database.read(numbers))
    database.close()
    assert found[: len(accepted)] == accepted
    assert len(found) <= len(accepted) + 1


# On a network file system


def test_a_network_file_system_gets_a_rollback_journal_and_an_exclusive_lock(tmp_path: Path, migrations: Path) -> None:
    database = Database.open(tmp_path / "state.db", migrations=migrations, network=True)

    async def main() -> None:
        await asyncio.gather(*(database.write(insert(n)) for n in range(3)))
        found = await asyncio.gather(database.read(numbers), database.write(insert(3)), database.read(numbers))
        assert found[0] == [0, 1, 2] or found[0] == [0, 1, 2, 3]
        modes = await database.read(lambda conn: [
            conn.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "locking_mode", "synchronous")
        ])  # fmt: skip
        assert modes == ["truncate", "exclusive", 2]
        with pytest.raises(LookupError):
            await database.read(_raise)
        await database.write(insert(9))

    run(main())
    assert not (tmp_path / "state.db-shm").exists()
    stranger = sqlite3.connect(tmp_path / "state.db", timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        stranger.execute("SELECT * FROM kept").fetchall()
    stranger.close()
    database.close()


def _raise(conn: sqlite3.Connection) -> None:
    insert(77)(conn)
    raise LookupError


def test_state_moves_between_local_and_network_file_systems(tmp_path: Path, migrations: Path) -> None:
    for number, network in enumerate([False, True, False]):
        database = Database.open(tmp_path / "state.db", migrations=migrations, network=network)
        run(database.write(insert(number)))
        assert run(database.read(numbers)) == list(range(number + 1))
        database.close()


# Opening


def test_migrations_run_once_each_and_in_order(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "state.db"
    database = Database.open(path, migrations=migrations)
    run(database.write(insert(1)))
    database.close()
    scripts(migrations, FIRST, SECOND)
    for _ in range(2):
        database = Database.open(path, migrations=migrations)
        rows = run(database.read(lambda conn: [tuple(r) for r in conn.execute("SELECT n, more FROM kept")]))
        assert rows == [(1, "old")]
        database.close()


def test_a_migration_that_fails_leaves_the_last_complete_version(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "state.db"
    scripts(migrations, FIRST, SECOND, "CREATE TABLE third (n); INSERT INTO nowhere VALUES (1);")
    with pytest.raises(CannotOpen, match="nowhere"):
        Database.open(path, migrations=migrations)
    with sqlite3.connect(path) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (2,)
        assert conn.execute("SELECT name FROM sqlite_schema WHERE name = 'third'").fetchall() == []
    conn.close()
    scripts(migrations, FIRST, SECOND, "CREATE TABLE third (n);")
    Database.open(path, migrations=migrations).close()


def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "state.db"
    Database.open(path, migrations=migrations).close()
    with sqlite3.connect(path) as conn:
        conn.execute("PRAGMA user_version=7")
    conn.close()
    content = path.read_bytes()
    with pytest.raises(NewerSchema, match=r"schema version 7, this program knows versions up to 1") as caught:
        Database.open(path, migrations=migrations)
    assert (caught.value.found, caught.value.known) == (7, 1)
    with pytest.raises(NewerSchema):
        Database.open(path, migrations=migrations, network=True)
    assert path.read_bytes() == content


def test_migrations_are_numbered_without_gaps(tmp_path: Path) -> None:
    folder = scripts(tmp_path / "migrations", FIRST, SECOND)
    (folder / "0001_step.sql").unlink()
    with pytest.raises(ValueError, match="without gaps"):
        Database.open(tmp_path / "state.db", migrations=folder)


def test_our_own_migrations_are_complete() -> None:
    conn = sqlite3.connect(":memory:", isolation_level=None)
    migrate(conn, Path(":memory:"))
    assert conn.execute("PRAGMA user_version").fetchone()[0] == len(list(db_module.MIGRATIONS.glob("*.sql")))
    assert pending_migrations(conn, Path(":memory:")) == []
    assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
    conn.close()


def test_what_is_no_database_is_refused(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(CannotOpen, match="not a database"):
        Database.open(path, migrations=migrations)
    assert path.read_bytes().startswith(b"not a database")


def test_a_damaged_database_is_refused(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "state.db"
    database = Database.open(path, migrations=migrations)
    run(
        database.write(
            lambda conn: conn.executemany("INSERT INTO kept VALUES (?, ?)", [(n, "x" * 500) for n in range(99)])
        )
    )
    database.close()
    content = bytearray(path.read_bytes())
    content[4096 * 2 : 4096 * 3] = b"\xff" * 4096
    path.write_bytes(content)
    with pytest.raises(CannotOpen, match=r"damaged|malformed"):
        Database.open(path, migrations=migrations)


def test_a_read_only_database_is_refused_at_start(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "state.db"
    Database.open(path, migrations=migrations).close()
    path.chmod(0o400)
    if os.geteuid() == 0:  # root may write all the same; a directory in the file's place is what root cannot open
        path.unlink()
        path.mkdir()
    with pytest.raises(CannotOpen, match="cannot open"):
        Database.open(path, migrations=migrations)


def test_a_big_database_is_not_checked_at_every_start(tmp_path: Path, migrations: Path) -> None:
    database = Database.open(tmp_path / "state.db", migrations=migrations)
    size = db_module.CHECKED_AT_OPEN_MAX_BYTES
    run(database.write(lambda conn: conn.execute("INSERT INTO kept VALUES (1, zeroblob(?))", (size,)).rowcount))
    database.close()
    asked: list[str] = []
    conn = connect(tmp_path / "state.db", 1)
    conn.set_trace_callback(asked.append)
    db_module._prepare(conn, tmp_path / "state.db", "FULL", local=True)
    conn.close()
    assert not [statement for statement in asked if "quick_check" in statement]


# Queries


def test_queries_have_names(tmp_path: Path) -> None:
    file = tmp_path / "queries.sql"
    file.write_text("-- a remark\n-- name: one\nSELECT 1;\n\n-- name: two\n-- why\nSELECT\n  2;\n")
    assert load_queries(file) == {"one": "SELECT 1", "two": "-- why\nSELECT\n  2"}
    file.write_text("-- name: one\nSELECT 1;\n-- name: one\nSELECT 2;\n")
    with pytest.raises(ValueError, match="one twice"):
        load_queries(file)
