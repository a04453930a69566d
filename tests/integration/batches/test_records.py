"""Records on their way to the disk, and lines on their way from it: what goes wrong there is waited for or shown."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.aio import eventually, run
from vllm_bootstrap.batches import line_source, records
from vllm_bootstrap.batches.line_source import LineSource
from vllm_bootstrap.batches.linestore import Totals
from vllm_bootstrap.batches.records import Recorder
from vllm_bootstrap.batches.types import NO_COUNTS, NO_USAGE, Line, Record
from vllm_bootstrap.batches.work import Answered
from vllm_bootstrap.errors import StorageFailed, StorageFull

TOTALS = Totals(NO_COUNTS, NO_USAGE, 0)


class Ledger:
    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.notes: list[Any] = []
        self.errors: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def finish(self, found: Any, now: float) -> Totals:
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.groups.append([record.number for record in found])
        return TOTALS

    async def note(self, troubles: Any) -> None:
        self.notes += troubles


def make(ledger: Ledger) -> tuple[Recorder, list[str]]:
    told: list[str] = []
    recorder = Recorder(
        ledger, clock=lambda: 1.0, written=lambda _: told.append("written"), freed=lambda: told.append("freed")
    )
    return recorder, told


def test_what_comes_while_one_group_is_written_is_the_next_group() -> None:
    async def go() -> None:
        ledger = Ledger()
        recorder, told = make(ledger)
        await recorder.drain()
        ledger.gate.clear()
        for number in range(5):
            recorder.add(Record(number, True, 1, b"x"))
            await asyncio.sleep(0)
        recorder.note(9, 1, 1)
        recorder.note(9, 2, 1)
        ledger.gate.set()
        await recorder.drain()
        assert [len(group) for group in ledger.groups] == [1, 4]
        assert ledger.notes == [(9, 2, 1)]
        assert told == ["written", "written"]
        await recorder.close()
        await recorder.close()

    run(go())


def test_too_much_that_waits_is_told_and_so_is_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MOST_WAITING", 3)
    monkeypatch.setattr(records, "MOST_BYTES", 10)

    async def go() -> None:
        ledger = Ledger()
        recorder, told = make(ledger)
        recorder.add(Record(1, True, 1, b"x" * 10))
        assert recorder.full
        await recorder.drain()
        assert not recorder.full
        assert told == ["written", "freed"]
        await recorder.close()

    run(go())


def test_a_full_disk_is_waited_for_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "AGAIN_S", 0.01)

    async def go() -> None:
        ledger = Ledger()
        recorder, told = make(ledger)
        ledger.errors += [StorageFull("no room"), StorageFull("no room")]
        recorder.add(Record(1, True, 1, b"x"))
        await eventually(lambda: recorder.problem == "no room")
        assert recorder.full
        recorder.add(Record(2, True, 1, b"x"))
        await recorder.drain()
        assert ledger.groups == [[1, 2]]
        assert recorder.problem is None
        assert told == ["written", "freed"]
        await recorder.close()

    run(go())


@pytest.mark.parametrize("error", [StorageFailed("fsync failed"), OverflowError("too large")])
def test_a_failed_disk_or_an_error_of_ours_ends_it_with_a_word(error: Exception) -> None:
    async def go() -> None:
        ledger = Ledger()
        recorder, _ = make(ledger)
        ledger.errors.append(error)
        recorder.add(Record(1, True, 1, b"x"))
        with pytest.raises(StorageFailed):
            await recorder.drain()
        assert recorder.full
        assert str(error) in str(recorder.problem)
        await recorder.close()
        assert ledger.groups == []

    run(go())


def test_stopping_writes_what_there_is_but_waits_for_no_stuck_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LAST_S", 0.05)

    async def go() -> None:
        ledger = Ledger()
        recorder, _ = make(ledger)
        recorder.add(Record(1, True, 1, b"x"))
        await recorder.close()
        assert ledger.groups == [[1]]
        recorder, _ = make(ledger)
        ledger.gate.clear()
        recorder.add(Record(2, True, 1, b"x"))
        await recorder.close()
        assert ledger.groups == [[1]]

    run(go())


class Behind:
    """Lines to be read; ``errors`` come first."""

    def __init__(self, count: int) -> None:
        self.lines = [Line(at, 1, at, f"id-{at}", b"{}") for at in range(1, count + 1)]
        self.errors: list[Exception] = []
        self.seen: set[str | None] = set()
        self.source: LineSource | None = None

    async def next(self, model_no: int, after: int, most: int, max_bytes: int) -> Any:
        self.seen.add(self.source.problem if self.source is not None else None)
        if self.errors:
            raise self.errors.pop(0)
        found = [one for one in self.lines if one.pos > after][:most]
        more = bool(found) and found[-1].pos < len(self.lines)
        return found, found[-1].pos if more else None


class Batch:
    may_take = True

    def __init__(self) -> None:
        self.ended: list[tuple[int, str]] = []
        self.noted: list[int] = []

    def line_ended(self, job: Any, custom_id: str, ending: Any) -> None:
        self.ended.append((job.number, custom_id))

    def line_noted(self, job: Any) -> None:
        self.noted.append(job.number)


def test_lines_are_read_ahead_and_what_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_source, "AGAIN_S", 0.01)
    monkeypatch.setattr(line_source, "READ_LINES", 10)
    monkeypatch.setattr(line_source, "READ_AGAIN_BELOW", 3)

    async def go() -> None:
        behind, batch = Behind(25), Batch()
        behind.errors += [StorageFull("no room"), StorageFull("no room"), ZeroDivisionError("bug")]
        source = LineSource("b1", 1, "/v1/x", behind, batch, key_name="k", priority=0, deadline=1.0, left=25)
        assert source.take() is None
        source.start()
        behind.source = source
        await eventually(lambda: source._ahead)
        said = "its lines cannot be read: {}"
        assert behind.seen == {None, said.format("no room"), said.format("ZeroDivisionError('bug')")}
        assert source.problem is None
        assert len(source._ahead) == 10
        batch.may_take = False
        assert source.take() is None
        batch.may_take = True
        jobs = []
        while len(jobs) < 25:
            job = source.take()
            if job is None:
                await asyncio.sleep(0)
            else:
                jobs.append(job)
        source.returned(jobs[4])
        assert source.take() is jobs[4]
        source.noted(jobs[4])
        for job in jobs:
            source.ended(job, Answered(200, b"{}", "r"))
        assert batch.ended == [(at, f"id-{at}") for at in range(1, 26)]
        assert source.left == 0
        assert source.take() is None
        source.close()
        source.close()

    run(go())
