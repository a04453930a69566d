"""What is done to batches while their lines are under way: the right end, counts that add up, no work left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.aio import eventually, run
from tests.support.batch_office import OWNER, InstantEngine, Office, index_here, input_lines, office
from vllm_bootstrap.batches.indexer import OnProgress
from vllm_bootstrap.batches.indexing import Outcome, Task
from vllm_bootstrap.batches.jobs import State
from vllm_bootstrap.batches.types import BatchView
from vllm_bootstrap.errors import Conflict, NotFound, StorageFull

LINES, ANSWERED = 120, 40
HOUR = 3600.0


class Clock:
    """Wall clock that can be set."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Door:
    """An index that waits before it begins."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.entered = asyncio.Event()

    async def __call__(self, task: Task, on_progress: OnProgress | None = None) -> Outcome:
        self.entered.set()
        await self.open.wait()
        return await index_here(task, on_progress)


async def under_way(one: Office, **changes: Any) -> str:
    """A batch whose engine has answered ``ANSWERED`` lines, all recorded, and holds others."""
    view = await one.create(await one.upload(input_lines(LINES)), **changes)
    await recorded(one, view.row.id, ANSWERED)
    assert one.engine.waiting
    return view.row.id


async def recorded(one: Office, batch_id: str, count: int) -> BatchView:
    """Wait until so many lines have a record."""
    while True:
        view: BatchView = await one.batches.get(batch_id, OWNER)
        if view.row.counts.completed + view.row.counts.failed >= count and one.engine.answered == count:
            assert view.row.counts.completed + view.row.counts.failed == count
            return view
        await asyncio.sleep(0.001)


async def check_files(one: Office, view: BatchView, *, code: str | None = None) -> None:
    """Each line has one record; those that were not run say ``code``."""
    row = view.row
    good = await one.content(row.output_file_id) if row.output_file_id else []
    bad = await one.content(row.error_file_id) if row.error_file_id else []
    assert sorted(r["custom_id"] for r in good + bad) == sorted(f"id-{n}" for n in range(1, LINES + 1))
    assert row.counts == (LINES, len(good), len(bad))
    assert {r["error"]["code"] for r in bad if r["error"]} == ({code} if code else set())
    assert row.usage.completion == 3 * len(good)


def nothing_is_left(one: Office, batch_id: str, view: BatchView) -> None:
    """No line of it is with an engine or will be."""
    assert one.engine.waiting == 0
    assert one.department.dispatcher.under_way(f"{batch_id}.1") == 0
    assert dict(one.department.dispatcher.demand()) == {}
    assert view.progress.in_flight == 0


def within(tmp_path: Path, body: Callable[[Office], Awaitable[None]], **changes: Any) -> None:
    async def main() -> None:
        async with office(tmp_path, InstantEngine(holds_after=ANSWERED), **changes) as one:
            await body(one)

    run(main())


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("there", [True, False])
def test_cancelled_while_its_lines_are_under_way(tmp_path: Path, paused: bool, there: bool) -> None:
    async def body(one: Office) -> None:
        batch_id = await under_way(one)
        with_engine = one.engine.running
        if paused:
            await one.batches.pause(batch_id, OWNER)
        one.launch(there=there)
        await one.batches.cancel(batch_id, OWNER)
        view = await one.ended(batch_id)
        assert view.row.phase.state is State.CANCELLED
        assert with_engine <= set(one.engine.cancelled)
        await check_files(one, view, code="batch_cancelled")
        nothing_is_left(one, batch_id, view)
        assert (await one.batches.cancel(batch_id, OWNER)).row == view.row

    within(tmp_path, body)


def test_cancelled_before_its_lines_are_known(tmp_path: Path) -> None:
    async def main() -> None:
        door = Door()
        async with office(tmp_path, InstantEngine(), index=door) as one:
            view = await one.create(await one.upload(input_lines(LINES)))
            await door.entered.wait()
            await one.batches.cancel(view.row.id, OWNER)
            view = await one.ended(view.row.id)
            assert view.row.phase.state is State.CANCELLED
            assert (view.row.counts, view.row.output_file_id, view.row.error_file_id) == ((0, 0, 0), None, None)
            nothing_is_left(one, view.row.id, view)
            assert list((tmp_path / "batches").iterdir()) == []
            with pytest.raises(Conflict):
                await one.batches.retry(view.row.id, OWNER)

    run(main())


def test_cancelled_while_another_input_is_judged_it_does_not_wait_for_that(tmp_path: Path) -> None:
    async def main() -> None:
        door = Door()
        async with office(tmp_path, InstantEngine(), index=door) as one:
            first = await one.create(await one.upload(input_lines(LINES)))
            await door.entered.wait()
            second = await one.create(await one.upload(input_lines(LINES)))
            await one.batches.cancel(second.row.id, OWNER)
            assert (await one.ended(second.row.id)).row.phase.state is State.CANCELLED
            door.open.set()
            assert (await one.ended(first.row.id)).row.phase.state is State.COMPLETED

    run(main())


def test_cancelled_while_its_files_are_written_it_is_completed(tmp_path: Path) -> None:
    async def body(one: Office) -> None:
        one.engine.release()
        file_id = await one.upload(input_lines(LINES))
        with mock.patch.object(one.files, "receive", side_effect=StorageFull("no room")):
            view = await one.create(file_id)
            batch_id = view.row.id
            while (view := await one.batches.get(batch_id, OWNER)).progress.waits_for != "no room":
                await asyncio.sleep(0.001)
            assert view.row.phase.state is State.FINALIZING
            view = await one.batches.cancel(batch_id, OWNER)
            assert view.row.phase.state is State.FINALIZING
        view = await one.ended(batch_id)
        assert view.row.phase.state is State.COMPLETED
        await check_files(one, view)

    within(tmp_path, body)


def test_the_last_line_ends_while_the_wish_to_cancel_is_being_written(tmp_path: Path) -> None:
    async def body(one: Office) -> None:
        batch_id = await under_way(one)
        entered, door = threading.Event(), threading.Event()
        blocking = asyncio.create_task(one.db.write(lambda _: (entered.set(), door.wait(10))))
        await asyncio.to_thread(entered.wait, 10)
        cancelling = asyncio.create_task(one.batches.cancel(batch_id, OWNER))
        await asyncio.sleep(0)
        one.engine.release()
        while (await one.batches.get(batch_id, OWNER)).row.counts.left:
            await asyncio.sleep(0.001)
        door.set()
        await asyncio.gather(blocking, cancelling)
        view = await one.ended(batch_id)
        assert view.row.phase.state is State.CANCELLED
        await check_files(one, view)

    within(tmp_path, body)


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_clock_that_jumps_neither_ends_a_batch_nor_keeps_it(tmp_path: Path, jump: float) -> None:
    clock = Clock()

    async def body(one: Office) -> None:
        lasting = await under_way(one, window_s=HOUR / 2)
        clock.ahead = jump
        one.engine.release()
        view = await one.ended(lasting)
        assert view.row.phase.state is State.COMPLETED
        await check_files(one, view)
        one.engine.held = True
        short = await one.create(await one.upload(input_lines(LINES)), window_s=1.0)
        clock.ahead = 0.0
        view = await one.ended(short.row.id)
        assert view.row.phase.state is State.EXPIRED
        await check_files(one, view, code="batch_expired")
        nothing_is_left(one, short.row.id, view)

    within(tmp_path, body, clock=clock)


@pytest.mark.parametrize(("jump", "state"), [(HOUR, State.EXPIRED), (-HOUR, State.COMPLETED)])
def test_a_clock_that_jumps_between_two_lives_is_believed(tmp_path: Path, jump: float, state: State) -> None:
    async def main() -> None:
        async with office(tmp_path, InstantEngine(holds_after=ANSWERED)) as one:
            batch_id = await under_way(one, window_s=HOUR / 2)
        clock = Clock()
        clock.ahead = jump
        async with office(tmp_path, InstantEngine(), clock=clock) as two:
            view = await two.ended(batch_id)
            assert view.row.phase.state is state
            await check_files(two, view, code="batch_expired" if state is State.EXPIRED else None)

    run(main())


@pytest.mark.parametrize("how", ["under way", "paused", "not loaded", "key revoked"])
def test_its_window_closes(tmp_path: Path, how: str) -> None:
    async def body(one: Office) -> None:
        batch_id = await under_way(one, window_s=1.0)
        if how == "paused":
            await one.batches.pause(batch_id, OWNER)
        elif how == "not loaded":
            one.launch(there=False)
        elif how == "key revoked":
            del one.keys[OWNER]
        view = await one.ended(batch_id)
        assert view.row.phase.state is State.EXPIRED
        await check_files(one, view, code="batch_expired")
        nothing_is_left(one, batch_id, view)

    within(tmp_path, body)


def test_its_input_is_deleted_before_it_was_judged(tmp_path: Path) -> None:
    async def main() -> None:
        door = Door()
        async with office(tmp_path, InstantEngine(), index=door) as one:
            file_id = await one.upload(input_lines(LINES))
            view = await one.create(file_id)
            await one.files.delete(file_id, OWNER)
            door.open.set()
            view = await one.ended(view.row.id)
            assert view.row.phase.state is State.COMPLETED
            await check_files(one, view)

    run(main())


def test_its_launch_goes_and_another_comes(tmp_path: Path) -> None:
    async def body(one: Office) -> None:
        batch_id = await under_way(one)
        for model in ("small", "large"):
            one.launch(there=False, model=model)
        begun = one.engine.waiting
        one.engine.release()
        view = await recorded(one, batch_id, ANSWERED + begun)
        assert "the model" in (view.progress.waits_for or "")
        assert not one.engine.running
        for model in ("small", "large"):
            one.launch(model=model)
        view = await one.ended(batch_id)
        await check_files(one, view)
        assert one.engine.answered == LINES

    within(tmp_path, body)


def test_its_key_is_revoked_and_comes_back(tmp_path: Path) -> None:
    async def body(one: Office) -> None:
        batch_id = await under_way(one)
        key = one.keys.pop(OWNER)
        begun = one.engine.waiting
        one.engine.release()
        view = await recorded(one, batch_id, ANSWERED + begun)
        assert "not valid" in (view.progress.waits_for or "")
        assert not one.engine.running
        one.keys[OWNER] = key
        one.department.dispatcher.keys_changed()
        view = await one.ended(batch_id)
        await check_files(one, view)
        assert one.engine.answered == LINES

    within(tmp_path, body)


def test_it_is_paused_and_goes_on(tmp_path: Path) -> None:
    async def body(one: Office) -> None:
        batch_id = await under_way(one)
        await one.batches.pause(batch_id, OWNER)
        await one.batches.pause(batch_id, OWNER)
        begun = one.engine.waiting
        one.engine.release()
        view = await recorded(one, batch_id, ANSWERED + begun)
        assert (view.progress.waits_for, view.progress.in_flight) == ("it is paused", 0)
        assert not one.engine.running
        await one.batches.set_priority(batch_id, OWNER, 7)
        await one.batches.resume(batch_id, OWNER)
        view = await one.ended(batch_id)
        assert (view.row.priority, one.engine.answered) == (7, LINES)
        await check_files(one, view)
        for change in (one.batches.pause, one.batches.resume):
            with pytest.raises(Conflict, match="has ended"):
                await change(batch_id, OWNER)

    within(tmp_path, body)


def test_a_pause_lasts_over_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with office(tmp_path, InstantEngine(holds_after=ANSWERED)) as one:
            batch_id = await under_way(one)
            await one.batches.pause(batch_id, OWNER)
        async with office(tmp_path, InstantEngine()) as two:
            while (await two.batches.get(batch_id, OWNER)).row.counts.total == 0:
                await asyncio.sleep(0.001)
            assert two.engine.executed == []
            await two.batches.resume(batch_id, OWNER)
            await check_files(two, await two.ended(batch_id))

    run(main())


def test_what_failed_is_run_again_and_nothing_else(tmp_path: Path) -> None:
    async def body(one: Office) -> None:
        batch_id = await under_way(one)
        await one.batches.cancel(batch_id, OWNER)
        before = (await one.ended(batch_id)).row
        done = {record["custom_id"] for record in await one.content(before.output_file_id or "")}
        one.engine.prompts.clear()
        one.engine.release()
        with pytest.raises(Conflict):
            await asyncio.gather(one.batches.retry(batch_id, OWNER), one.batches.retry(batch_id, OWNER))
        view = await one.ended(batch_id)
        assert view.row.phase.state is State.COMPLETED
        await check_files(one, view)
        assert set(one.engine.prompts) == {f"id-{n}" for n in range(1, LINES + 1)} - done
        for file_id in (before.output_file_id, before.error_file_id):
            with pytest.raises(NotFound):
                await one.files.get(file_id or "", OWNER)

    within(tmp_path, body)


def test_each_retry_has_the_window_that_was_asked_for(tmp_path: Path) -> None:
    clock = Clock()

    async def body(one: Office) -> None:
        batch_id = await under_way(one)
        await one.batches.cancel(batch_id, OWNER)
        row = (await one.ended(batch_id)).row
        window = row.expires_at - row.created_at
        for _ in range(3):
            clock.ahead += HOUR
            view = await one.batches.retry(batch_id, OWNER)
            assert view.row.expires_at == pytest.approx(clock() + window, abs=60)
            await one.batches.cancel(batch_id, OWNER)
            await one.ended(batch_id)

    within(tmp_path, body, clock=clock)


def test_it_is_deleted_when_it_has_ended_and_not_before(tmp_path: Path) -> None:
    async def body(one: Office) -> None:
        batch_id = await under_way(one)
        with pytest.raises(Conflict, match="cancel it first"):
            await one.batches.delete(batch_id, OWNER)
        one.engine.release()
        await one.ended(batch_id)
        await one.batches.delete(batch_id, OWNER)
        assert list((tmp_path / "batches").iterdir()) == []
        with pytest.raises(NotFound):
            await one.batches.get(batch_id, OWNER)

    within(tmp_path, body)


def test_a_caller_who_goes_while_a_batch_is_accepted_leaves_a_batch_that_runs(tmp_path: Path) -> None:
    async def body(one: Office) -> None:
        one.engine.release()
        file_id = await one.upload(input_lines(LINES))
        entered, door = threading.Event(), threading.Event()
        blocking = asyncio.create_task(one.db.write(lambda _: (entered.set(), door.wait(10))))
        await asyncio.to_thread(entered.wait, 10)
        creating = asyncio.create_task(one.create(file_id, idempotency_key="k"))
        await eventually(lambda: list((tmp_path / "batches").iterdir()))
        creating.cancel()
        with suppress(asyncio.CancelledError):
            await creating
        door.set()
        await blocking
        view = await one.create(file_id, idempotency_key="k")
        view = await one.ended(view.row.id)
        await check_files(one, view)
        assert len((await one.batches.list(OWNER, after=None, limit=10))[0]) == 1

    within(tmp_path, body)


def test_the_bound_of_unfinished_batches_holds_for_new_ones_only(tmp_path: Path) -> None:
    async def body(one: Office) -> None:
        one.engine.held = True
        file_id = await one.upload(input_lines(LINES))
        first = await one.create(file_id, idempotency_key="k")
        with pytest.raises(Exception, match="have not ended yet"):
            await one.create(file_id, idempotency_key="another")
        assert (await one.create(file_id, idempotency_key="k")).row.id == first.row.id

    within(tmp_path, body, max_unfinished=1)
