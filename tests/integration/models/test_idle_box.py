"""Idle time is counted, kept over restarts, and acted upon, against a real database."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually, run
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import StorageFull
from vllm_bootstrap.models.idle_box import DEVICES_EVERY_S, SAVE_EVERY_S, IdleBox, Seen
from vllm_bootstrap.models.idle_hook import IdleFacts
from vllm_bootstrap.models.idle_time import Spent, Use

IDLE = Seen(None, False, {"GPU-0": Use(True, False), "GPU-1": Use(False, False)})
BUSY = Seen("requests are under way", True, {"GPU-0": Use(True, True), "GPU-1": Use(False, False)})


class Deed:
    """An action that ends as it is told, or waits for ever."""

    name = "command"

    def __init__(self, *outcomes: str | None) -> None:
        self.outcomes, self.facts, self.cancelled = list(outcomes), list[IdleFacts](), False

    async def run(self, facts: IdleFacts) -> str | None:
        self.facts.append(facts)
        if self.outcomes:
            return self.outcomes.pop(0)
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled = True
        return None


class Box:
    """An idle box whose time passes when it is told to. Nothing samples but ``passes``."""

    def __init__(self, db: Database, *deeds: Deed, after_s: float = 10, start: float = 100.0) -> None:
        self.now, self.seen, self.counts = start, IDLE, list[tuple[str, str]]()
        self.devices: Mapping[str, int] = {"GPU-0": 0, "GPU-1": 1}
        self.asked = list[Sequence[str]]()
        self.box = IdleBox(
            db, self._look, self._found, deeds, after_s=after_s, node_id="n", entropy=lambda: bytes(7),
            count=lambda name, outcome: self.counts.append((name, outcome)), clock=lambda: 1e9 + self.now,
            monotonic=lambda: self.now,
        )  # fmt: skip

    def _look(self, devices: Sequence[str]) -> Seen:
        self.asked.append(devices)
        return self.seen

    async def _found(self) -> Mapping[str, int]:
        return self.devices

    async def passes(self, seconds: float, seen: Seen | None = None) -> None:
        self.seen = seen or self.seen
        for _ in range(int(seconds)):
            self.now += 1
            await self.box.tick()
            await asyncio.sleep(0)


@pytest.fixture
def db(tmp_path: Path) -> Any:
    database = Database.open(tmp_path / "state.db")
    yield database
    database.close()


def test_hours_are_kept_over_restarts_and_the_pause_counts_as_nothing(db: Database) -> None:
    async def scenario() -> None:
        first = Box(db)
        await first.box.start()
        await first.passes(1)
        await first.passes(20)
        await first.passes(10, BUSY)
        await first.box.close()
        await first.box.close()
        second = Box(db, start=100_000.0)
        await second.box.start()
        await second.passes(1)
        await second.passes(5)
        report = second.box.report()
        gpu = report.gpus[0]
        assert (gpu.device, gpu.index, gpu.since) == ("GPU-0", 0, first.box.report().gpus[0].since)
        assert gpu.this_start == Spent(5, 0, 5)
        assert gpu.total == Spent(35, 10, 25)
        assert report.gpus[1].total == Spent(0, 0, 35)
        assert report.box.total == Spent(35, 10, 25)
        await second.box.close()

    run(scenario())


def test_a_daemon_that_is_killed_loses_no_more_than_the_time_between_two_saves(db: Database) -> None:
    async def scenario() -> None:
        box = Box(db)
        await box.box.start()
        await box.passes(SAVE_EVERY_S - 1)
        assert await db.read(lambda conn: conn.execute("SELECT count(*) FROM idle_time").fetchone()[0]) == 0
        await box.passes(2)
        idle = await db.read(
            lambda conn: conn.execute("SELECT idle_s FROM idle_time WHERE device = 'GPU-0'").fetchone()
        )
        assert idle[0] == SAVE_EVERY_S - 1
        await box.box.close()

    run(scenario())


def test_it_samples_by_itself(db: Database) -> None:
    async def scenario() -> None:
        box = Box(db)
        await box.box.start()
        await eventually(lambda: box.asked)
        await box.box.close()
        assert list(box.asked[0]) == ["GPU-0", "GPU-1"]

    run(scenario())


def test_devices_are_looked_for_now_and_then_and_kept_while_nobody_knows(db: Database) -> None:
    async def scenario() -> None:
        box = Box(db)
        await box.passes(2)
        box.devices = {"GPU-0": 0}
        await box.passes(1)
        assert list(box.asked[-1]) == ["GPU-0", "GPU-1"]
        await box.passes(DEVICES_EVERY_S)
        assert list(box.asked[-1]) == ["GPU-0"]
        box.devices = {}
        await box.passes(DEVICES_EVERY_S + 1)
        assert list(box.asked[-1]) == ["GPU-0"]

    run(scenario())


def test_the_hook_fires_once_a_spell_and_never_at_once_after_a_start(db: Database) -> None:
    async def scenario() -> None:
        deed = Deed(None, None)
        box = Box(db, deed)
        await box.passes(10)
        assert (deed.facts, box.box.report().fires_in_s) == ([], 1)
        await box.passes(1)
        assert [round(f.idle_s) for f in deed.facts] == [10]
        facts = deed.facts[0]
        assert (facts.attempt, facts.node_id, facts.gpus, facts.after_s) == (1, "n", 2, 10)
        assert facts.since == 1e9 + box.now - 10
        await box.passes(100)
        report = box.box.report()
        assert (len(deed.facts), report.actions[0].state, report.fires_in_s) == (1, "completed", None)
        await box.passes(1, BUSY)
        assert box.box.report().busy_because == BUSY.busy_because
        assert box.box.report().idle_s == 0
        await box.passes(11, IDLE)
        first, second = deed.facts
        assert first.event_id != second.event_id
        assert box.counts == [("command", "completed")] * 2

    run(scenario())


def test_a_failure_is_shown_tried_again_and_given_up(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        deed = Deed(*["no rights"] * 10)
        box = Box(db, deed)
        await box.passes(11)
        await box.passes(1)
        action = box.box.report().actions[0]
        assert (action.state, action.last_error, action.attempts) == ("failed", "no rights", 1)
        assert action.last_at is not None
        await box.passes(2000)
        assert [f.attempt for f in deed.facts] == [1, 2, 3, 4]
        assert len({f.event_id for f in deed.facts}) == 1
        assert box.box.report().actions[0].state == "given_up"
        assert "the idle command has failed (attempt 4): no rights" in caplog.text

    run(scenario())


def test_nobody_waits_for_the_hook_and_the_end_of_the_daemon_ends_it(db: Database) -> None:
    async def scenario() -> None:
        deed = Deed()
        box = Box(db, deed)
        await box.box.start()
        await box.passes(60)
        assert box.box.report().actions[0].state == "running"
        assert len(deed.facts) == 1
        await box.box.close()
        assert deed.cancelled

    run(scenario())


def test_nothing_is_done_where_the_hook_is_off(db: Database) -> None:
    async def scenario() -> None:
        deed = Deed(None)
        box = Box(db, deed, after_s=0)
        await box.passes(500)
        assert deed.facts == []
        assert box.box.report().fires_in_s is None

    run(scenario())


def test_a_full_disk_costs_what_was_not_stored_and_nothing_else(
    db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def full(_work: object) -> None:
        raise StorageFull("The disk is full.")

    async def scenario() -> None:
        box = Box(db)
        await box.passes(1)
        with monkeypatch.context() as patched:
            patched.setattr(db, "write", full)
            await box.passes(SAVE_EVERY_S + 1)
        assert "idle time cannot be stored" in caplog.text
        assert box.box.report().gpus[0].total.idle_s == SAVE_EVERY_S + 1

    run(scenario())


def test_a_failure_of_the_sampling_itself_is_told(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        box = Box(db)
        box.seen = None  # type: ignore[assignment]
        await box.box.start()
        await eventually(lambda: "idle time has failed" in caplog.text)
        await box.box.close()

    run(scenario())


def test_the_database_takes_no_figures_that_cannot_be(db: Database) -> None:
    async def scenario() -> None:
        with pytest.raises(sqlite3.IntegrityError):
            await db.write(lambda conn: conn.execute("INSERT INTO idle_time VALUES ('a', 0, 1, 2, 0)"))

    run(scenario())
