"""Databases that an earlier version has left: migrated with what is in them, and refused when they are of a later one.

``tests/fixtures/batch_lines_v<N>.sql`` (and the input they belong to) are added when version N of a batch's own
database is released and never edited afterwards; ``test_migrations`` does the same for the state database.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.aio import run
from tests.support.batch_office import OWNER, InstantEngine, input_lines, office
from tests.support.batches import COMPLETIONS
from vllm_bootstrap.batches.items_store import ItemStore
from vllm_bootstrap.batches.jobs import COMPLETED, FAILED, IN_PROGRESS, State
from vllm_bootstrap.batches.linestore import BATCH_MIGRATIONS, LineStore, Totals
from vllm_bootstrap.batches.store import BatchStore, Creation
from vllm_bootstrap.batches.types import BatchRow, Counts, LineError, Record, TokenUsage, Webhook
from vllm_bootstrap.db import Database, NewerSchema

FIXTURES = Path(__file__).parents[2] / "fixtures"
OLD_LINES = sorted(FIXTURES.glob("batch_lines_v*.sql"))
STATE_WITHOUT, STATE_WITH = FIXTURES / "state_v1.sql", FIXTURES / "state_v2.sql"


def restored(dump: Path, into: Path) -> Path:
    into.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(into)) as conn:
        conn.executescript(dump.read_text())
    return into


@pytest.fixture(params=OLD_LINES, ids=lambda dump: dump.stem)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copy(request.param.with_suffix(".jsonl"), tmp_path / "batch_b1.jsonl")
    return restored(request.param, tmp_path / "batch_b1.db")


def test_there_is_a_stored_line_database_for_every_version() -> None:
    assert len(OLD_LINES) == len(list(BATCH_MIGRATIONS.glob("*.sql")))


def test_an_old_line_database_goes_on_where_it_was(stored: Path) -> None:
    lines = LineStore.open(stored, stored.with_suffix(".jsonl"))
    try:
        run(look(lines))
    finally:
        lines.close()


async def look(lines: LineStore) -> None:
    """What version 1 had stored; later versions' fixtures tell the same story."""
    assert await lines.models() == [(1, "m", 3), (2, "é", 1)]
    assert await lines.totals() == Totals(Counts(4, 1, 1), TokenUsage(3, 1, 4, 2), 1)
    left, after = await lines.next(1, 0, 10, 10_000)
    assert [(line.number, line.custom_id, line.attempts, line.deaths) for line in left] == [(4, "d", 1, 1)]
    assert b'"four"' in left[0].body
    assert after is None
    other, _ = await lines.next(2, 0, 10, 10_000)
    assert [line.custom_id for line in other] == ["b"]
    assert [chunk async for chunk in lines.records(True)] == [[(1, b'{"custom_id": "a"}')]]
    assert [chunk async for chunk in lines.records(False)] == [[(3, b'{"custom_id": "c"}')]]
    totals = await lines.finish([Record(1, False, 9, b"again"), Record(4, True, 2, b"{}")], 60.0)
    assert totals.counts == (4, 2, 1)


def test_a_newer_line_database_is_refused_and_left_as_it_is(stored: Path) -> None:
    with closing(sqlite3.connect(stored)) as conn:
        conn.execute("PRAGMA user_version=9")
    before = stored.read_bytes()
    with pytest.raises(NewerSchema):
        LineStore.open(stored, stored.with_suffix(".jsonl"))
    assert stored.read_bytes() == before


def test_a_state_database_from_before_batches_takes_them(tmp_path: Path) -> None:
    restored(STATE_WITHOUT, tmp_path / "state.db")

    async def main() -> None:
        async with office(tmp_path, InstantEngine()) as one:
            view = await one.create(await one.upload(input_lines(20)))
            view = await one.ended(view.row.id)
            assert view.row.phase.state is State.COMPLETED
            kept = await one.db.read(lambda conn: conn.execute("SELECT count(*) FROM launches").fetchone()[0])
            assert kept == 5

    run(main())


def test_batches_of_a_stored_state_database_mean_what_they_meant(tmp_path: Path) -> None:
    database = Database.open(restored(STATE_WITH, tmp_path / "state.db"))
    try:
        run(look_at_rows(BatchStore(database), ItemStore(database)))
    finally:
        database.close()


async def look_at_rows(store: BatchStore, items: ItemStore) -> None:
    rows = {row.id: row for row in await store.list(None, None, 10)}
    done, running, refused = (rows[f"batch_{number:020d}"] for number in (1, 2, 3))
    assert done == BatchRow(
        id=done.id, owner="alice", endpoint=COMPLETIONS, input_file_id="file-00000000000000000001",
        completion_window="24h", created_at=100.0, expires_at=86500.0, phase=COMPLETED, metadata={"night": "1"},
        webhook=Webhook("https://example.org/hook", "whsec_1"), output_file_id="file-00000000000000000002",
        error_file_id="file-00000000000000000003", counts=Counts(2, 1, 1), usage=TokenUsage(3, 0, 4, 0),
        models={"m": 2},
        stamps={"validating": 100.0, "in_progress": 101.0, "finalizing": 102.0, "completed": 103.0},
    )  # fmt: skip
    assert (running.phase, running.paused, running.priority) == (IN_PROGRESS, True, 7)
    assert running.models == {"m": 2, "é": 1}
    assert (refused.phase, refused.errors) == (FAILED, (LineError("invalid_json", "Not JSON.", 3),))
    assert [row.id for row in await store.unfinished()] == [running.id]
    history = [(event.event, event.from_state, event.to_state) for event in await store.events(done.id, 0, 10)]
    assert history[0] == ("created", None, "validating")
    assert history[-1] == ("files_written", "finalizing", "completed")
    assert len(history) == 4
    again = await store.recalled(Creation("alice", "key-1", "hash-1"))
    assert again is not None
    assert again.result_id == done.id
    waiting = await items.waiting()
    assert [(item.id, item.priority, item.attempts, item.deaths) for item in waiting] == [
        ("item_00000000000000000001", 5, 1, 1)
    ]
    assert await items.body(waiting[0].id) == '{"model":"m","prompt":"é"}'.encode()
    ended = await items.get("item_00000000000000000002")
    assert ended is not None
    assert (ended.state, ended.launch_id) == ("completed", "l00000000000000000001")


def test_files_of_a_stored_state_database_are_still_their_owners(tmp_path: Path) -> None:
    restored(STATE_WITH, tmp_path / "state.db")

    async def main() -> None:
        async with office(tmp_path, InstantEngine()) as one:
            rows, more = await one.files.list(OWNER, purpose=None, after=None, limit=10, ascending=True)
            assert [row.id for row in rows] == [f"file-{number:020d}" for number in (1, 2, 3)]
            assert not more

    run(main())
