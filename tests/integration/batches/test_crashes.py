"""A crash at any database statement and file write of a batch: what was accepted is done, once, and stays done.

A whole batch runs once over a disk that writes everything down; then it is cut off after an operation of that record,
batches start anew on what the cut has left, and all must come to its end. ``CRASH_ALL=1`` tries every operation with
every kind of cut, as ``python -m tests.support.crash_world`` does; else a few of them, others each day.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.aio import run
from tests.support.batch_office import LINES, InstantEngine, input_lines, office
from tests.support.crash_steered import SteeredCut, record_steered
from tests.support.crash_world import cuts, points, record
from tests.support.recorded_disk import Left
from vllm_bootstrap.batches.indexer import OnProgress, index
from vllm_bootstrap.batches.indexing import Outcome, Task
from vllm_bootstrap.batches.jobs import State

ALL = os.environ.get("CRASH_ALL") == "1"
SEED = int(os.environ.get("CRASH_SEED", time.time() // 86400))
STEP = 1 if ALL else 11
KINDS = list(Left)


def kinds_of_cut(number: int) -> list[Left]:
    return KINDS if ALL else [KINDS[(number + SEED) % len(KINDS)]]


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory where that is possible: what is on disk is decided by the model, not by the disk."""
    with TemporaryDirectory(prefix="crash", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder).resolve()


@pytest.mark.timeout(600 if ALL else 60)
def test_after_a_cut_at_any_operation_each_line_has_one_record_and_no_finished_one_is_run_again(place: Path) -> None:
    log = record(place / "state")
    at = points(log, STEP, SEED % STEP)
    faults = [
        f"cut after operation {point} of {len(log)}, {left.value} of the unsynced left: {wrong}"
        for point, left, wrong in cuts(place / "state", log, at, kinds_of_cut)
        if wrong
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.timeout(600 if ALL else 60)
def test_a_cut_while_a_batch_is_steered_takes_back_nothing_that_was_answered(place: Path) -> None:
    """Paused, cancelled, run again where it failed, deleted; and single items."""
    log = record_steered(place / "state")
    at = points(log, STEP, SEED % STEP)
    faults = [
        f"cut after operation {point} of {len(log)}, {left.value} of the unsynced left: {wrong}"
        for point, left, wrong in cuts(place / "state", log, at, kinds_of_cut, cut=SteeredCut)
        if wrong
    ]
    assert not faults, "\n".join(faults)


def everything(_: Path) -> bool:
    return True


def rows_of_batches(path: Path) -> bool:
    return path.name == "state.db-wal"


def records_of_lines(path: Path) -> bool:
    return path.name.startswith("batch_") and path.name.endswith("-wal")


def names_of_batches(path: Path) -> bool:
    return path.name == "batches"


def names_of_files(path: Path) -> bool:
    return path.name == "files"


def contents_of_files(path: Path) -> bool:
    return path.parent.name == "files"


def new_line_databases(path: Path) -> bool:
    return path.name.endswith(".db.part")


@pytest.mark.parametrize(
    "lying",
    [
        everything,
        rows_of_batches,
        records_of_lines,
        names_of_batches,
        names_of_files,
        contents_of_files,
        new_line_databases,
    ],
)
def test_that_would_be_noticed_if_a_sync_did_nothing(place: Path, lying: Callable[[Path], bool]) -> None:
    lines = 60
    log = record(place / "state", lines, lying)
    at = points(log, 4)
    assert any(wrong for _, _, wrong in cuts(place / "state", log, at, lambda _: [Left.NOTHING], lines))


KILLED_AT = {
    "its start": "pass",
    "its sync": "os.fsync = die",
    "its rename": "pathlib.Path.rename = die",
    "its end": "say = indexing._print\nindexing._print = lambda said: die() if 'error_count' in said else say(said)",
}
DYING = """
import os, pathlib, signal, sys
from vllm_bootstrap.batches import indexing
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
{patch}
{now}
indexing.main()
"""


@pytest.mark.parametrize("where", KILLED_AT)
def test_a_helper_that_is_killed_while_it_checks_an_input_costs_a_moment(tmp_path: Path, where: str) -> None:
    calls = []
    dying = DYING.format(patch=KILLED_AT[where], now="die()" if where == "its start" else "")

    async def dies_once(task: Task, on_progress: OnProgress | None = None) -> Outcome:
        calls.append(task)
        if len(calls) == 1:
            return await index(task, on_progress, program=(sys.executable, "-c", dying))
        assert not list(tmp_path.rglob("*.part*"))
        return await index(task, on_progress)

    async def main() -> None:
        async with office(tmp_path, InstantEngine(), index=dies_once) as one:
            view = await one.create(await one.upload(input_lines(20)))
            view = await one.ended(view.row.id)
            assert view.row.phase.state is State.COMPLETED
            assert view.row.counts == (20, 18, 2)
            assert len(one.engine.executed) == 20

    run(main())
    assert len(calls) == 2


def test_a_helper_that_never_gets_to_an_end_fails_the_batch_saying_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_bootstrap.batches.run.INDEX_AGAIN_S", (0.0, 0.0))

    async def dies(task: Task, on_progress: OnProgress | None = None) -> Outcome:
        return await index(task, on_progress, program=(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))

    async def main() -> None:
        async with office(tmp_path, InstantEngine(), index=dies) as one:
            view = await one.create(await one.upload(input_lines(20)))
            view = await one.ended(view.row.id)
            assert view.row.phase.state is State.FAILED
            assert [error.code for error in view.row.errors] == ["validation_failed"]
            assert "SIGKILL" in view.row.errors[0].message

    run(main())


def test_a_daemon_that_dies_with_lines_under_way_runs_those_again_and_no_others(tmp_path: Path) -> None:
    """Executed at least once, recorded exactly once."""

    async def first_life() -> tuple[str, set[tuple[str, int]]]:
        engine = InstantEngine(holds_after=50)
        async with office(tmp_path, engine) as one:
            view = await one.create(await one.upload(input_lines()))
            while (view := await one.batches.get(view.row.id, None)).row.counts.left != LINES - 50:
                await asyncio.sleep(0.001)
            assert engine.waiting > 10
            return view.row.id, set(engine.executed)

    async def second_life(batch_id: str) -> list[tuple[str, int]]:
        async with office(tmp_path, InstantEngine()) as two:
            view = await two.ended(batch_id)
            assert view.row.counts == (LINES, LINES - LINES // 10, LINES // 10)
            return two.engine.executed

    batch_id, begun = run(first_life())
    again = run(second_life(batch_id))
    assert len(set(again)) == len(again) == LINES - 50
    assert begun | set(again) == {(batch_id, number) for number in range(1, LINES + 1)}
    assert len(begun) > 50
