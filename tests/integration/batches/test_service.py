"""Batches in one process, with real files and databases: what callers see and change while they run."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually, run
from tests.support.batch_office import OWNER, index_here, input_lines, office
from tests.support.batches import COMPLETIONS, line
from tests.support.lanes import HandEngine, answered, failed
from vllm_bootstrap.api.batch_views import batch as shown
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches import desk, line_source, records, service
from vllm_bootstrap.batches import run as run_module
from vllm_bootstrap.batches.indexer import IndexingFailed
from vllm_bootstrap.batches.indexing import Outcome
from vllm_bootstrap.batches.jobs import Event, State
from vllm_bootstrap.batches.linestore import LineStore
from vllm_bootstrap.batches.store import BatchStore
from vllm_bootstrap.batches.types import NewBatch, Webhook
from vllm_bootstrap.errors import (
    BadRequest,
    Conflict,
    Draining,
    LaunchNotReady,
    NotFound,
    StorageFailed,
    StorageFull,
    TooManyRequests,
    Unavailable,
)
from vllm_bootstrap.metrics import Metrics


def state_of(view: Any) -> State:
    return view.row.phase.state


async def running(here: Any, lines: int = 40, **changes: Any) -> str:
    """A batch whose engine holds everything."""
    view = await here.create(await here.upload(input_lines(lines)), **changes)
    batch_id: str = view.row.id
    here.engine.held = True
    await in_state(here, batch_id, State.IN_PROGRESS)
    return batch_id


async def in_state(here: Any, batch_id: str, state: State) -> None:
    while state_of(await here.batches.get(batch_id, OWNER)) is not state:
        await asyncio.sleep(0.002)


def test_ids_of_files_are_shown_when_the_files_can_be_read(tmp_path: Path) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            view = await here.create(await here.upload(input_lines(20)))
            seen = []
            async for now in here.batches.watch(view.row.id, OWNER):
                seen.append(shown(now))
                if now.row.phase.state is not State.COMPLETED:
                    assert shown(now).output_file_id is None
            assert seen[-1].status == "completed"
            assert seen[-1].request_counts.completed == 18
            assert seen[-1].usage is not None
            assert len(await here.content(seen[-1].output_file_id or "")) == 18
            assert len(await here.content(seen[-1].error_file_id or "")) == 2

    run(go())


@pytest.mark.parametrize("killed", [False, True])
def test_after_a_restart_counts_are_shown_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    async def nothing(_run: object) -> None: ...

    if killed:  # the counts beside its row are those of its beginning
        monkeypatch.setattr(run_module.Run, "_keep_counts", nothing)

    async def go() -> None:
        async with office(tmp_path, HandEngine(0.01)) as here:
            batch_id = await running(here, 200)
            here.engine.release()
            await eventually(lambda: here.batches._runs[batch_id].view().row.counts.completed > 20)
            here.engine.held = True
            await asyncio.sleep(0.05)
            before = (await here.batches.get(batch_id, OWNER)).row.counts
        engine = HandEngine()
        engine.held = True
        async with office(tmp_path, engine, launched=False) as here:
            after = await here.batches.get(batch_id, OWNER)
            assert after.row.counts.completed >= before.completed
            assert after.row.counts.total == 200
            assert after.row.usage.prompt > 0
            await eventually(lambda: here.batches._runs[batch_id].view().progress.waits_for is not None)
            waits_for = (await here.batches.get(batch_id, OWNER)).progress.waits_for or ""
            assert "is not loaded: launch it" in waits_for
            assert (
                sum(here.department.dispatcher.demand().values())
                >= 200 - after.row.counts.completed - after.row.counts.failed
            )

    run(go())


def test_pauses_while_an_input_is_looked_through_hold_from_the_first_line(tmp_path: Path) -> None:
    async def go() -> None:
        go_on = asyncio.Event()

        async def slow_index(task: Any, on_progress: Any = None) -> Outcome:
            on_progress(1, 1)
            await go_on.wait()
            return await index_here(task, on_progress)

        async with office(tmp_path, HandEngine(), index=slow_index) as here:
            view = await here.create(await here.upload(input_lines(20)))
            await here.batches.pause(view.row.id, OWNER)
            await here.batches.pause(view.row.id, OWNER)
            await here.batches.set_priority(view.row.id, OWNER, 7)
            progress = (await here.batches.get(view.row.id, OWNER)).progress
            assert progress.validated_bytes == 1
            go_on.set()
            await in_state(here, view.row.id, State.IN_PROGRESS)
            await asyncio.sleep(0.05)
            assert not here.engine.executed
            assert (await here.batches.get(view.row.id, OWNER)).progress.waits_for == "it is paused"
            assert (
                len(
                    [e for e in await here.batches.events(view.row.id, OWNER, after=0, limit=99) if e.event == "paused"]
                )
                == 1
            )
            await here.batches.resume(view.row.id, OWNER)
            assert (await here.ended(view.row.id)).row.priority == 7

    run(go())


def test_a_pause_while_the_lines_are_opened_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            models, opening, go_on = LineStore.models, asyncio.Event(), asyncio.Event()

            async def slow(self: LineStore) -> Any:
                opening.set()
                await go_on.wait()
                return await models(self)

            monkeypatch.setattr(LineStore, "models", slow)
            view = await here.create(await here.upload(input_lines(20)))
            await opening.wait()
            await here.batches.pause(view.row.id, OWNER)
            await here.batches.set_priority(view.row.id, OWNER, 3)
            go_on.set()
            await asyncio.sleep(0.05)
            assert not here.engine.executed
            await here.batches.resume(view.row.id, OWNER)
            await here.ended(view.row.id)

    run(go())


def test_cancelled_while_its_last_record_is_written_a_batch_is_completed_or_cancelled_and_never_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            batch_id = await running(here, 20)
            the_run = here.batches._runs[batch_id]
            store = BatchStore.change
            inside, go_on = asyncio.Event(), asyncio.Event()

            async def slow(self: BatchStore, row: Any, at: float, event: str, *rest: Any) -> None:
                if event == Event.CANCEL_REQUESTED:
                    inside.set()
                    await go_on.wait()
                await store(self, row, at, event, *rest)

            monkeypatch.setattr(BatchStore, "change", slow)
            cancelling = asyncio.create_task(here.batches.cancel(batch_id, OWNER))
            await inside.wait()
            here.engine.release()
            await eventually(lambda: the_run.view().row.counts.left == 0)
            await asyncio.sleep(0.02)
            go_on.set()
            await cancelling
            view = await here.ended(batch_id)
            assert state_of(view) is State.CANCELLED
            assert view.row.counts == (20, 18, 2)

    run(go())


def test_cancelled_while_another_input_is_looked_through_a_batch_ends_at_once(tmp_path: Path) -> None:
    async def go() -> None:
        go_on = asyncio.Event()

        async def slow_index(task: Any, on_progress: Any = None) -> Outcome:
            await go_on.wait()
            return await index_here(task, on_progress)

        async with office(tmp_path, HandEngine(), index=slow_index) as here:
            file_id = await here.upload(input_lines(10))
            first, second = await here.create(file_id), await here.create(file_id)
            await asyncio.sleep(0.02)
            await here.batches.cancel(second.row.id, OWNER)
            assert state_of(await here.ended(second.row.id)) is State.CANCELLED
            await here.batches.cancel(second.row.id, OWNER)
            go_on.set()
            assert state_of(await here.ended(first.row.id)) is State.COMPLETED

    run(go())


def test_of_two_who_retry_at_once_one_does_and_deleting_waits_for_its_end(tmp_path: Path) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            view = await here.create(await here.upload(input_lines(20)))
            batch_id = view.row.id
            old = (await here.ended(batch_id)).row
            here.engine.held = True
            calls = [here.batches.retry(batch_id, OWNER), here.batches.retry(batch_id, OWNER)]
            done = await asyncio.gather(*calls, here.batches.delete(batch_id, OWNER), return_exceptions=True)
            assert [type(one) for one in done[1:]] == [Conflict, Conflict]
            assert state_of(done[0]) is State.IN_PROGRESS
            assert shown(done[0]).output_file_id is None
            with pytest.raises(NotFound):
                await here.files.get(old.error_file_id, OWNER)
            here.engine.release()
            again = (await here.ended(batch_id)).row
            assert again.counts == (20, 18, 2)
            assert again.output_file_id != old.output_file_id
            await here.batches.delete(batch_id, OWNER)
            for call in (here.batches.get, here.batches.retry, here.batches.delete, here.batches.pause):
                with pytest.raises(NotFound):
                    await call(batch_id, OWNER)
            assert not list((tmp_path / "batches").iterdir())

    run(go())


def test_a_retry_whose_old_files_cannot_be_deleted_runs_all_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            batch_id = (await here.create(await here.upload(input_lines(20)))).row.id
            await here.ended(batch_id)

            async def full(*_: Any) -> None:
                raise StorageFull("no room")

            monkeypatch.setattr(here.files, "delete", full)
            await here.batches.retry(batch_id, OWNER)
            assert state_of(await here.ended(batch_id)) is State.COMPLETED

    run(go())


def test_what_cannot_be_retried_says_so(tmp_path: Path) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            whole = await here.create(await here.upload(input_lines(2)))
            await here.ended(whole.row.id)
            with pytest.raises(Conflict, match="No line"):
                await here.batches.retry(whole.row.id, OWNER)
            with pytest.raises(Conflict, match="has ended"):
                await here.batches.pause(whole.row.id, OWNER)
            damaged = await here.create(await here.upload(input_lines(20)))
            await here.ended(damaged.row.id)
            (tmp_path / "batches" / f"{damaged.row.id}.db").write_bytes(b"no database at all" * 100)
            with pytest.raises(Conflict, match="cannot be run again"):
                await here.batches.retry(damaged.row.id, OWNER)
            refused = await here.create(await here.upload([b"{}"]))
            assert state_of(await here.ended(refused.row.id)) is State.FAILED
            with pytest.raises(Conflict):
                await here.batches.retry(refused.row.id, OWNER)
            here.engine.held = True
            live = await running(here)
            with pytest.raises(Conflict, match="has not ended"):
                await here.batches.retry(live, OWNER)
            with pytest.raises(Conflict, match="has not ended"):
                await here.batches.delete(live, OWNER)
            with pytest.raises(NotFound):
                await here.batches.get(live, "mallory")

    run(go())


@pytest.mark.parametrize("which", ["jsonl", "db"])
def test_a_batch_whose_lines_are_lost_fails_and_says_why(tmp_path: Path, which: str) -> None:
    async def go() -> None:
        engine = HandEngine()
        engine.held = True
        async with office(tmp_path, engine) as here:
            batch_id = await running(here)
        path = tmp_path / "batches" / f"{batch_id}.{which}"
        path.unlink()
        async with office(tmp_path, HandEngine()) as here:
            view = await here.ended(batch_id)
            assert state_of(view) is State.FAILED
            assert view.row.errors[0].code == "storage_lost"

    run(go())


def test_a_full_disk_is_waited_for_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run_module, records, line_source):
        monkeypatch.setattr(module, "AGAIN_S", 0.01)
    left: dict[str, int] = {}

    def failing(cls: Any, name: str) -> None:
        method = getattr(cls, name)

        async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if left.get(name, 2) > 0:
                left[name] = left.get(name, 2) - 1
                raise StorageFull("no room")
            return await method(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, call)

    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            for cls, name in (
                (LineStore, "models"), (LineStore, "totals"), (LineStore, "next"), (LineStore, "finish"),
                (BatchStore, "change"),
            ):  # fmt: skip
                failing(cls, name)
            batch_id = (await here.create(await here.upload(input_lines(20)))).row.id
            view = await here.ended(batch_id)
            assert view.row.counts == (20, 18, 2)
            assert set(left.values()) == {0}
            assert sorted(number for _, number in here.engine.executed) == list(range(1, 21))

    run(go())


def test_an_error_of_our_own_stops_a_batch_for_a_while_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "AFTER_BUG_S", 0.3)
    models, count = LineStore.models, 0

    async def buggy(self: LineStore) -> Any:
        nonlocal count
        count += 1
        if count == 1:
            raise ZeroDivisionError
        return await models(self)

    async def go() -> None:
        monkeypatch.setattr(LineStore, "models", buggy)
        async with office(tmp_path, HandEngine()) as here:
            batch_id = (await here.create(await here.upload(input_lines(20)))).row.id
            waits = set()
            while state_of(view := await here.batches.get(batch_id, OWNER)) is not State.COMPLETED:
                waits.add(view.progress.waits_for)
                await asyncio.sleep(0.01)
            assert any("an error in the daemon" in (one or "") for one in waits)

    run(go())


def test_a_failed_disk_stops_a_batch_and_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOOK_S", 0.05)

    async def broken(*_: Any) -> Any:
        raise StorageFailed("fsync failed")

    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            monkeypatch.setattr(LineStore, "finish", broken)
            batch_id = (await here.create(await here.upload(input_lines(20)))).row.id
            await eventually(here.batches._runs[batch_id]._task.done)
            view = await here.batches.get(batch_id, OWNER)
            assert (state_of(view), view.row.counts.completed) == (State.IN_PROGRESS, 0)
            assert view.progress.waits_for == "fsync failed"
            monkeypatch.undo()
        async with office(tmp_path, HandEngine()) as here:
            assert (await here.ended(batch_id)).row.counts == (20, 18, 2)

    run(go())


def test_what_the_window_closes_on_expires(tmp_path: Path) -> None:
    async def go() -> None:
        engine = HandEngine()
        engine.held = True
        async with office(tmp_path, engine) as here:
            view = await here.create(await here.upload(input_lines(30)), window_s=0.4)
            seen = await here.ended(view.row.id)
            assert state_of(seen) is State.EXPIRED
            lines = await here.content(shown(seen).error_file_id or "")
            assert {one["error"]["code"] for one in lines} == {"batch_expired"}
            assert not engine.waiting

    run(go())


# Who waits for a place


def test_batches_that_stand_still_give_their_places_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_OPEN", 2)
    monkeypatch.setattr(service, "LOOK_S", 0.02)
    monkeypatch.setattr(service, "PATIENCE_S", 0.1)

    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            missing = await here.upload([line("a", model="missing")])
            good = await here.upload(input_lines(20))
            stuck = [(await here.create(missing)).row.id for _ in range(5)]
            paused = (await here.create(missing)).row.id
            await here.batches.pause(paused, OWNER)
            view = await here.create(good)
            assert "come first" in (view.progress.waits_for or "")
            assert state_of(await here.ended(view.row.id)) is State.COMPLETED
            await eventually(lambda: any(one in here.batches._waiting and one != paused for one in here.batches._aside))
            aside = next(one for one in here.batches._aside if one in here.batches._waiting and one != paused)
            assert "others have their turn" in ((await here.batches.get(aside, OWNER)).progress.waits_for or "")
            await here.batches.cancel(aside, OWNER)
            assert state_of(await here.ended(aside)) is State.CANCELLED
            here.launch(model="missing")
            for one in stuck:
                if one != aside:
                    assert state_of(await here.ended(one)) is State.COMPLETED
            assert not here.batches._aside.keys() & set(stuck)
            await here.batches.resume(paused, OWNER)
            await here.ended(paused)

    run(go())


def test_a_key_without_a_place_does_not_wait_for_the_patience_that_many_of_another_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MOST_OPEN", 3)
    monkeypatch.setattr(service, "LOOK_S", 0.02)

    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            here.keys["other"] = Principal("other", frozenset({"batch"}))
            missing = await here.upload([line("a", model="missing")])
            every = [(await here.create(missing)).row.id for _ in range(6)]
            file_id = await here.upload(input_lines(20), owner="other")
            new = NewBatch("other", COMPLETIONS, file_id, completion_window="24h", window_s=86400.0)
            batch_id = (await here.batches.create(new)).row.id
            await eventually(lambda: batch_id in here.batches._runs)
            while state_of(await here.batches.get(batch_id, "other")) is not State.COMPLETED:
                await asyncio.sleep(0.01)
            assert len(here.batches._aside.keys() & set(every)) == 1

    run(go())


def test_what_is_changed_of_one_that_waits_does_not_begin_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MOST_OPEN", 2)

    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            missing = await here.upload([line("a", model="missing")])
            every = [(await here.create(missing)).row.id for _ in range(6)]
            for number, one in enumerate(every):
                await here.batches.pause(one, OWNER)
                await here.batches.set_priority(one, OWNER, number)
                await here.batches.resume(one, OWNER)
                assert len(here.batches._runs) == 2
            assert [(await here.batches.get(one, OWNER)).row.priority for one in every] == list(range(6))
            await here.batches.cancel(every[0], OWNER)
            await here.ended(every[0])
            assert every[5] in here.batches._runs
            here.launch(model="missing")
            for one in every[1:]:
                assert state_of(await here.ended(one)) is State.COMPLETED

    run(go())


def test_one_that_cannot_be_set_aside_now_is_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_OPEN", 1)
    monkeypatch.setattr(service, "LOOK_S", 0.02)
    monkeypatch.setattr(service, "PATIENCE_S", 0.0)

    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            rotate, failures = here.batches._rotate, 2

            async def failing(now: float) -> None:
                nonlocal failures
                failures -= 1
                if failures >= 0:
                    raise StorageFull("no room")
                await rotate(now)

            here.batches._rotate = failing
            await here.create(await here.upload([line("a", model="missing")]))
            view = await here.create(await here.upload(input_lines(20)))
            await here.ended(view.row.id)
            assert failures < 0

    run(go())


# Accepting


def test_a_full_house_takes_no_more_but_answers_for_what_it_took(tmp_path: Path) -> None:
    async def go() -> None:
        engine = HandEngine()
        engine.held = True
        async with office(tmp_path, engine, max_unfinished=1) as here:
            file_id = await here.upload(input_lines(5))
            first = await here.create(file_id, idempotency_key="k")
            for key in ("other", None):
                with pytest.raises(TooManyRequests):
                    await here.create(file_id, idempotency_key=key)
            assert (await here.create(file_id, idempotency_key="k")).row.id == first.row.id
            with pytest.raises(BadRequest):
                await here.create(file_id, idempotency_key="k", priority=3)
            engine.release()
            await here.ended(first.row.id)
            assert (await here.create(file_id, idempotency_key="k")).row.id == first.row.id

    run(go())


def test_inputs_and_launches_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            file = here.files.receive(OWNER, "evals", "in.jsonl", None)
            await file.write(b"x")
            other = (await file.commit()).id
            good = await here.upload(input_lines(2))
            with pytest.raises(BadRequest, match="purpose"):
                await here.create(other)
            with pytest.raises(NotFound):
                await here.create(good, launch_id="nowhere")
            here.launch(model="ended", there=False)
            with pytest.raises(LaunchNotReady, match="has ended"):
                await here.create(good, launch_id="launch-ended")
            assert not list((tmp_path / "batches").iterdir())

    run(go())


def test_a_caller_that_goes_away_leaves_either_nothing_or_a_whole_batch(tmp_path: Path) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine(), max_unfinished=100) as here:
            file_id = await here.upload(input_lines(20))
            for turns in range(12):
                call = asyncio.create_task(here.create(file_id))
                for _ in range(turns):
                    await asyncio.sleep(0.0005)
                call.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await call
            await asyncio.sleep(0.2)
            views, _ = await here.batches.list(OWNER, after=None, limit=100)
            for view in views:
                assert state_of(await here.ended(view.row.id)) is State.COMPLETED

    run(go())


def test_one_that_was_deleted_between_upload_and_link_is_not_found(tmp_path: Path, monkeypatch: Any) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            file_id = await here.upload(input_lines(2))
            _, path = await here.files.open(file_id, OWNER)
            path.unlink()
            monkeypatch.setattr(here.files, "open", lambda *_: asyncio.sleep(0, (FILE, path)))
            with pytest.raises(NotFound):
                await here.create(file_id)

    class FILE:
        purpose, id = "batch", "file-1"

    run(go())


# What a launch or a key does to a batch


def test_a_batch_for_a_launch_that_ended_says_what_to_do(tmp_path: Path) -> None:
    async def go() -> None:
        engine = HandEngine()
        engine.held = True
        async with office(tmp_path, engine) as here:
            view = await here.create(await here.upload(input_lines(5)), launch_id="launch-small")
            await in_state(here, view.row.id, State.IN_PROGRESS)
            await eventually(lambda: engine.waiting)
            said = []
            for flight in engine.waiting:
                flight.unplaced()
            for state in ("stopping", "failed"):
                here.department.advert(desk.Advert("launch-small", "launch-small", "small", ("small",), state, None))
                said.append((await here.batches.get(view.row.id, OWNER)).progress.waits_for or "")
            assert "is being stopped" in said[0]
            assert "will not come back: cancel this, and submit it again" in said[1]
            here.department.forget("launch-small")
            assert "is not there and will not come back" in (
                (await here.batches.get(view.row.id, OWNER)).progress.waits_for or ""
            )
            for state, words in (("bootstrapping", "is being loaded"), ("ready", "does not answer")):
                here.department.advert(desk.Advert("launch-small", "g", "small", ("small",), state, None))
                assert words in ((await here.batches.get(view.row.id, OWNER)).progress.waits_for or "")

    run(go())


def test_a_key_that_goes_and_comes_back_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "KEYS_S", 0.02)

    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            looks = []
            named = here.department.dispatcher._key_named

            def look(name: str) -> Principal | None:
                looks.append(name)
                if len(looks) > 20:
                    here.keys[OWNER] = Principal(OWNER, frozenset({"batch"}))
                    asyncio.get_running_loop().call_soon(here.department.dispatcher.keys_changed)
                return named(name)

            here.department.dispatcher._key_named = look
            del here.keys[OWNER]
            view = await here.create(await here.upload(input_lines(20)))
            assert state_of(await here.ended(view.row.id)) is State.COMPLETED
            assert "" in looks

    run(go())


# Partial output, webhooks, the end of things


def test_partial_output_while_it_runs_and_after_its_lines_are_gone(tmp_path: Path) -> None:
    async def read(here: Any, batch_id: str, *, failed: bool) -> list[Any]:
        pieces = [piece async for piece in here.batches.partial(batch_id, OWNER, failed=failed)]
        return [json.loads(one) for one in b"".join(pieces).splitlines()]

    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            batch_id = await running(here, 2)
            assert await read(here, batch_id, failed=False) == []
            path = tmp_path / "batches" / f"{batch_id}.jsonl"
            path.rename(path.with_suffix(".away"))
            with pytest.raises(Unavailable):
                await read(here, batch_id, failed=False)
            path.with_suffix(".away").rename(path)
            here.engine.release()
            await here.ended(batch_id)
            assert len(await read(here, batch_id, failed=False)) == 2
            assert await read(here, batch_id, failed=True) == []
            partly = (await here.create(await here.upload(input_lines(20)))).row.id
            await here.ended(partly)
            assert len(await read(here, partly, failed=True)) == 2

    run(go())


def test_the_end_is_told_once(tmp_path: Path) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            hook = Webhook("http://127.0.0.1:9/", "secret")
            view = await here.batches.create(
                NewBatch(OWNER, COMPLETIONS, await here.upload(input_lines(3)), "24h", 86400.0, webhook=hook)
            )
            await here.ended(view.row.id)
            rows = await here.db.read(lambda conn: conn.execute("SELECT batch_id FROM webhooks").fetchall())
            assert [row[0] for row in rows] == [view.row.id]

    run(go())


def test_sweeping_forgets_the_old_and_keeps_what_is_run_again(tmp_path: Path) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            file_id = await here.upload(input_lines(20))
            old, again = [(await here.create(file_id)).row.id for _ in range(2)]
            for one in (old, again):
                await here.ended(one)
            here.engine.held = True
            await here.batches.retry(again, OWNER)
            await here.batches.sweep(9e12)
            with pytest.raises(NotFound):
                await here.batches.get(old, OWNER)
            assert state_of(await here.batches.get(again, OWNER)) is State.IN_PROGRESS
            (tmp_path / "batches" / "batch_stray.jsonl").write_bytes(b"x")
            await here.batches.sweep_strays()
            assert not (tmp_path / "batches" / "batch_stray.jsonl").exists()
            assert (tmp_path / "batches" / f"{again}.jsonl").exists()

    run(go())


def test_what_is_asked_of_a_daemon_that_stops_is_asked_again_later(tmp_path: Path) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            ended = (await here.create(await here.upload(input_lines(20)))).row.id
            await here.ended(ended)
            batch_id = await running(here)
            await here.batches.close()
            for call in (here.batches.cancel, here.batches.pause):
                with pytest.raises(Draining):
                    await call(batch_id, OWNER)
            with pytest.raises(Draining):
                await here.batches.retry(ended, OWNER)

    run(go())


def test_what_became_of_lines_is_counted(tmp_path: Path) -> None:
    async def go() -> None:
        metrics = Metrics()
        async with office(tmp_path, HandEngine()) as here:
            here.batches._deps = replace(here.batches._deps, tally=metrics.batch_lines)
            await here.ended((await here.create(await here.upload(input_lines(20)))).row.id)
            await running(here)
            assert here.batches.states() == {"in_progress": 1, "paused": 0}
            text = metrics.render().decode()
            assert 'vllm_bootstrap_batch_lines_total{outcome="completed"} 18.0' in text
            assert 'vllm_bootstrap_batch_lines_total{outcome="failed"} 2.0' in text
            assert "vllm_bootstrap_batch_retries_total 0.0" in text

    run(go())


@pytest.mark.parametrize("failures", [1, 9])
def test_an_input_whose_check_is_killed_is_checked_again_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    monkeypatch.setattr(run_module, "INDEX_AGAIN_S", (0.0, 0.0))
    left = failures

    async def killed(task: Any, on_progress: Any = None) -> Outcome:
        nonlocal left
        left -= 1
        if left >= 0:
            raise IndexingFailed("it was killed")
        return await index_here(task, on_progress)

    async def go() -> None:
        async with office(tmp_path, HandEngine(), index=killed) as here:
            view = await here.ended((await here.create(await here.upload(input_lines(5)))).row.id)
            if failures == 1:
                assert state_of(view) is State.COMPLETED
            else:
                assert state_of(view) is State.FAILED
                assert view.row.errors[0].code == "validation_failed"
                assert "it was killed" in view.row.errors[0].message

    run(go())


def test_an_input_that_is_gone_before_it_was_looked_at(tmp_path: Path) -> None:
    async def go() -> None:
        go_on = asyncio.Event()

        async def slow_index(task: Any, on_progress: Any = None) -> Outcome:
            await go_on.wait()
            return await index_here(task, on_progress)

        async with office(tmp_path, HandEngine(), index=slow_index) as here:
            file_id = await here.upload(input_lines(5))
            _, second = await here.create(file_id), await here.create(file_id)
            await asyncio.sleep(0.02)
            (tmp_path / "batches" / f"{second.row.id}.jsonl").unlink()
            go_on.set()
            view = await here.ended(second.row.id)
            assert (state_of(view), view.row.errors[0].code) == (State.FAILED, "storage_lost")

    run(go())


def test_while_it_runs_counts_are_stored_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "KEEP_COUNTS_S", 0.02)
    monkeypatch.setattr(run_module, "LOOK_S", 0.01)

    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            batch_id = await running(here, 20)
            await eventually(lambda: len(here.engine.waiting) == 20)
            here.engine.take().ended(answered(200, b"{}"))
            here.engine.take().ended(failed(BadRequest("refused")))

            async def stored() -> Any:
                return (await BatchStore(here.db).get(batch_id)).counts

            while await stored() != (20, 1, 1):
                await asyncio.sleep(0.01)
            events = await here.batches.events(batch_id, OWNER, after=0, limit=99)
            assert [event.event for event in events] == ["created", "input_accepted"]

    run(go())


def test_pauses_and_priorities_of_a_batch_that_runs(tmp_path: Path) -> None:
    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            batch_id = await running(here, 20)
            await eventually(lambda: len(here.engine.waiting) == 20)
            busy = here.engine.take()
            await here.batches.set_priority(batch_id, OWNER, -7)
            assert {flight.source.priority for flight in here.engine.waiting} == {-7}
            view = await here.batches.pause(batch_id, OWNER)
            assert not here.engine.waiting
            assert (view.row.paused, view.progress.in_flight) == (True, 1)
            here.engine.release()
            busy.ended(answered(200, b"{}"))
            await asyncio.sleep(0.02)
            assert len(here.engine.executed) == 20
            view = await here.batches.resume(batch_id, OWNER)
            assert not view.row.paused
            the_run = here.batches._runs[batch_id]
            assert (await here.ended(batch_id)).row.counts.total == 20
            with pytest.raises(Conflict, match="has ended"):
                await the_run.pause(True)

    run(go())


def test_a_failed_disk_of_records_is_what_a_batch_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any) -> Any:
        raise StorageFull("no room for records")

    async def go() -> None:
        async with office(tmp_path, HandEngine()) as here:
            batch_id = await running(here, 60)
            monkeypatch.setattr(LineStore, "finish", full)
            monkeypatch.setattr(LineStore, "note", full)
            await eventually(lambda: len(here.engine.waiting) > 20)
            flight = here.engine.take()
            flight.ended(answered(429))
            flight = here.engine.take()
            flight.ended(answered(200, b"{}"))
            await eventually(lambda: here.batches._runs[batch_id].view().progress.waits_for == "no room for records")
            begun = len(here.engine.executed)
            await asyncio.sleep(0.02)
            assert len(here.engine.executed) == begun
            monkeypatch.undo()
            here.engine.release()
            assert (await here.ended(batch_id)).row.counts.left == 0

    run(go())
