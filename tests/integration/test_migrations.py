"""Databases of every released schema version open with this program and mean what they meant.

``tests/fixtures/state_v<N>.sql`` is added when version N is released and never edited afterwards.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.support.aio import run
from tests.support.launches import launch_id
from vllm_bootstrap.db import MIGRATIONS, Database
from vllm_bootstrap.gpus.ledger import Claim, Ledger
from vllm_bootstrap.launches.lifecycle import BOOTSTRAPPING, FAILED, READY, STOPPED, STOPPING, Why
from vllm_bootstrap.launches.store import LaunchStore
from vllm_bootstrap.models.entries import EntryStore
from vllm_bootstrap.models.types import AdapterEntry, GpuNeed, ModelEntry, Rewrite

FIXTURES = Path(__file__).parent.parent / "fixtures"
OLD = sorted(FIXTURES.glob("state_v*.sql"))
ONE, TWO, THREE, FOUR, FIVE = (launch_id(n) for n in range(1, 6))


def restored(dump: Path, into: Path) -> Path:
    conn = sqlite3.connect(into)
    conn.executescript(dump.read_text())
    conn.close()
    return into


def schema(path: Path) -> set[tuple[str, ...]]:
    conn = sqlite3.connect(path)
    rows = set(conn.execute("SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'"))
    conn.close()
    return rows


def test_there_is_a_stored_database_for_every_version() -> None:
    assert len(OLD) == len(list(MIGRATIONS.glob("*.sql")))


@pytest.mark.parametrize("dump", OLD, ids=lambda dump: dump.stem)
def test_an_old_database_becomes_what_a_new_one_is(dump: Path, tmp_path: Path) -> None:
    Database.open(restored(dump, tmp_path / "old.db")).close()
    Database.open(tmp_path / "new.db").close()
    assert schema(tmp_path / "old.db") == schema(tmp_path / "new.db")
    conn = sqlite3.connect(tmp_path / "old.db")
    assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
    assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    conn.close()


@pytest.mark.parametrize("dump", OLD, ids=lambda dump: dump.stem)
def test_an_old_database_keeps_its_meaning(dump: Path, tmp_path: Path) -> None:
    database = Database.open(restored(dump, tmp_path / "old.db"))
    try:
        run(look(LaunchStore(database)))
    finally:
        database.close()


async def look(store: LaunchStore) -> None:
    """What a version 1 daemon had stored; later versions' fixtures tell the same story."""
    rows = {row.id: row for row in await store.list(active_only=False)}
    assert {name: row.phase for name, row in rows.items()} == {
        ONE: READY, TWO: BOOTSTRAPPING, THREE: STOPPING[Why.OPERATOR], FOUR: STOPPED, FIVE: FAILED,
    }  # fmt: skip
    assert rows[ONE].placement is not None
    assert rows[ONE].placement["gpus"][0]["uuid"] == "GPU-a"
    assert rows[TWO].attempt == 2
    assert rows[TWO].failure is not None
    assert rows[TWO].failure["lines"] == ["últimas"]
    assert rows[FOUR].ended_at == 64.0
    assert rows[FIVE].failure is not None
    assert rows[FIVE].failure["permanent"] is True
    assert {row.owner_id for row in rows.values()} == {"alice", "bob"}
    await look_behind(store)


async def look_behind(store: LaunchStore) -> None:
    ready = (await store.attempts(ONE))[0]
    assert ready.handle is not None
    assert (ready.handle["identity"]["pid"], ready.baseline, ready.ready_at) == (4711, {"GPU-a": 536870912}, 40.0)
    assert [row.id for row, _ in await store.unfinished()] == [ONE, TWO, THREE]
    claims = await store.claims()
    assert claims == {
        ONE: (Claim("GPU-a", 1000, False),), TWO: (Claim("GPU-b", 500, True),), THREE: (Claim("GPU-b", 500, True),),
    }  # fmt: skip
    Ledger().restore(claims)
    assert [event.event for event in await store.events(ONE)] == ["created", "became_ready", "unresponsive"]
    assert await store.unsettled() == {"GPU-c": (0, "memory of an ended launch is not back")}
    assert await store.idempotent("alice", "key-1") == ("hash-1", ONE)
    assert await store.estimate("org/model", "vllm", "1 x NVIDIA H200", "abc") == 39.5
    note = await store.note(ONE, 1, "still_writable", 100.0)
    assert note.seq > max(event.seq for event in await store.events(TWO))


@pytest.mark.parametrize("dump", [dump for dump in OLD if dump.stem >= "state_v3"], ids=lambda dump: dump.stem)
def test_models_that_were_added_are_still_there(dump: Path, tmp_path: Path) -> None:
    database = Database.open(restored(dump, tmp_path / "old.db"))
    qwen = ModelEntry(
        "qwen", "org/qwen", origin="runtime", aliases=("chat",), args={"dtype": "half"}, ttl_s=900.0,
        gpus=GpuNeed(2, (0, "GPU-b"), 1024, 0.5), rewrite=Rewrite({"temperature": 0}, frozenset({"seed"})),
        adapters=(AdapterEntry("support", "/adapters/support", ("help",)),), description="été",
    )  # fmt: skip
    try:
        assert run(EntryStore(database).all()) == [qwen, ModelEntry("tiny", "/models/tiny", origin="runtime")]
    finally:
        database.close()
