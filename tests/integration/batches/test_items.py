"""Single items in one process, with a real database: accepted, carried in order, ended once."""

from __future__ import annotations

import asyncio
import contextlib
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually, run
from tests.support.batch_office import OWNER, answer_to, office
from tests.support.batches import CHAT, COMPLETIONS
from tests.support.lanes import HandEngine
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches import item_source, items, records
from vllm_bootstrap.batches.items_store import ItemStore
from vllm_bootstrap.batches.store import SQL
from vllm_bootstrap.batches.types import NewItem
from vllm_bootstrap.batches.work import Outcome
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import BadRequest, NotFound, QueueFull, StorageFailed, StorageFull, UpstreamError

BODY = {"model": "small", "prompt": "x"}


def new(prompt: str = "x", *, model: str = "small", owner: str = OWNER, path: str = CHAT, **fields: Any) -> NewItem:
    return NewItem(owner, path, {"model": model, "prompt": prompt}, model, **fields)


@contextlib.asynccontextmanager
async def desk(folder: Path, engine: Any = None, **changes: Any) -> Any:
    changes = {"items_max_queued": 1000, **changes}
    async with office(folder, engine or HandEngine(), **changes) as here:
        yield here


def test_an_item_is_done_and_whoever_waits_hears_of_it(tmp_path: Path) -> None:
    async def go() -> None:
        engine = HandEngine()
        engine.held = True
        async with desk(tmp_path, engine) as here:
            service = here.department.items
            view = await service.submit(new("hello"))
            assert view.state in ("queued", "in_progress")
            assert (await service.get(view.id, OWNER, wait_s=0.02)).state == "in_progress"
            waiting = [asyncio.create_task(service.get(view.id, OWNER, wait_s=20)) for _ in range(3)]
            await asyncio.sleep(0.01)
            engine.release()
            for seen in await asyncio.gather(*waiting):
                assert seen.state == "completed"
                assert seen.response is not None
                assert seen.response["body"]["choices"] == [{"text": "hello"}]
                assert seen.attempts == 1
            assert service.waiting == 0
            assert not any((service._listeners, service._sources, service._numbers, service._ending))
            assert here.department.dispatcher.demand() == {}
            with pytest.raises(NotFound):
                await service.get(view.id, "mallory")
            with pytest.raises(NotFound):
                await service.get("item_none", OWNER)

    run(go())


def test_items_go_by_priority_and_the_oldest_first(tmp_path: Path) -> None:
    async def go() -> None:
        engine = HandEngine()
        async with desk(tmp_path, engine, launched=False) as here:
            service = here.department.items
            for number in range(6):
                view = await service.submit(new(f"p{number}", priority=(number % 3) * 10))
            assert "is not loaded" in (view.waits_for or "")
            assert here.department.dispatcher.demand() == {"small": 6}
            here.launch()
            await eventually(lambda: service.waiting == 0)
            assert engine.prompts == ["p2", "p5", "p1", "p4", "p0", "p3"]

    run(go())


def test_names_that_look_alike_when_put_together_are_kept_apart(tmp_path: Path) -> None:
    async def go() -> None:
        async with desk(tmp_path, launched=False) as here:
            for owner in ("a", "a.b"):
                here.keys[owner] = Principal(owner, frozenset({"batch"}))
            service = here.department.items
            await service.submit(new(model="b.c", owner="a"))
            await service.submit(new(model="c", owner="a.b"))
            here.launch(model="b.c")
            here.launch(model="c")
            await eventually(lambda: service.waiting == 0)

    run(go())


def test_items_that_come_close_together_are_gathered(tmp_path: Path) -> None:
    async def go() -> None:
        engine = HandEngine()
        engine.held = True
        async with desk(tmp_path, engine, max_size=4, max_latency_s=0.1) as here:
            service = here.department.items
            for number in range(3):
                await service.submit(new(f"p{number}", path=COMPLETIONS))
            assert not engine.prompts
            await eventually(lambda: engine.waiting)
            assert [len(flight.jobs) for flight in engine.waiting] == [3]
            began = time.monotonic()
            for number in range(4):
                await service.submit(new(f"q{number}", path=COMPLETIONS))
            await eventually(lambda: len(engine.waiting) == 2)
            assert time.monotonic() - began < 5
            assert len(engine.waiting[1].jobs) == 4
            await service.submit(new("chat", path=CHAT))
            await eventually(lambda: len(engine.waiting) == 3)
            engine.release()
            await eventually(lambda: service.waiting == 0)

    run(go())


def test_cancelled_wherever_it_is_an_item_ends_once(tmp_path: Path) -> None:
    async def go() -> None:
        engine = HandEngine()
        engine.held = True
        async with desk(tmp_path, engine) as here:
            service = here.department.items
            under_way = await service.submit(new("a"))
            waiting = await service.submit(new("b", model="missing"))
            await eventually(lambda: engine.waiting)
            for view in (under_way, waiting):
                ended = await service.cancel(view.id, OWNER)
                assert ended.state == "cancelled"
                assert ended.error is not None
                assert (await service.cancel(view.id, OWNER)).ended_at == ended.ended_at
            assert not engine.waiting
            engine.release()
            await service.submit(new("the third of all fails"))
            done = await service.submit(new("c"))
            assert (await service.get(done.id, OWNER, wait_s=10)).state == "completed"
            assert (await service.cancel(done.id, OWNER)).state == "completed"

    run(go())


def test_cancelled_while_its_record_is_written_it_has_one_end_and_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        engine = HandEngine()
        async with desk(tmp_path, engine) as here:
            service, end = here.department.items, ItemStore.end
            inside, go_on = asyncio.Event(), asyncio.Event()

            async def slow(self: ItemStore, ended: Any, now: float) -> None:
                if ended and ended[0].state == "completed" and not go_on.is_set():
                    inside.set()
                    await go_on.wait()
                await end(self, ended, now)

            monkeypatch.setattr(ItemStore, "end", slow)
            first = await service.submit(new("a"))
            await inside.wait()
            assert (await service.cancel(first.id, OWNER)).state == "cancelled"
            go_on.set()
            second = await service.submit(new("b"))
            assert (await service.get(second.id, OWNER, wait_s=10)).state == "completed"
            assert (await service.get(first.id, OWNER)).state == "cancelled"

    run(go())


def test_what_is_not_done_in_its_time_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "LOOK_S", 0.01)

    async def go() -> None:
        now = [1e9]
        async with desk(tmp_path, clock=lambda: now[0], launched=False) as here:
            service = here.department.items
            late = await service.submit(new("late", expires_after_s=50))
            soon = await service.submit(new("soon", expires_after_s=10))
            end, failures = ItemStore.end, 1

            async def failing(self: ItemStore, ended: Any, at: float) -> None:
                nonlocal failures
                failures -= 1
                if failures >= 0:
                    raise StorageFull("no room")
                # Meanwhile another comes that expires before all others.
                if failures == -1:
                    sooner.append(await service.submit(new("sooner", expires_after_s=-5)))
                await end(self, ended, at)

            sooner: list[Any] = []
            monkeypatch.setattr(ItemStore, "end", failing)
            now[0] += 11
            seen = await service.get(soon.id, OWNER, wait_s=10)
            assert seen.state == "expired"
            assert (await service.get(sooner[0].id, OWNER, wait_s=10)).state == "expired"
            assert (await service.get(late.id, OWNER)).state == "queued"
            assert service.waiting == 1

    run(go())


def test_times_of_ended_items_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "FEW_EXPIRIES", 10)

    async def go() -> None:
        async with desk(tmp_path) as here:
            service = here.department.items
            for _ in range(40):
                view = await service.submit(new())
                await service.get(view.id, OWNER, wait_s=10)
            assert len(service._expiries) <= 12

    run(go())


def test_too_many_are_refused_but_not_a_repeated_request(tmp_path: Path) -> None:
    async def go() -> None:
        async with desk(tmp_path, items_max_queued=2, launched=False) as here:
            service = here.department.items
            first = await service.submit(new("a", idempotency_key="k"))
            came = await asyncio.gather(*(service.submit(new(f"{n}")) for n in range(5)), return_exceptions=True)
            assert sum(isinstance(one, QueueFull) for one in came) == 4
            assert (await service.submit(new("a", idempotency_key="k"))).id == first.id
            with pytest.raises(BadRequest):
                await service.submit(new("b", idempotency_key="k"))
            with pytest.raises(NotFound):
                await service.submit(new("b", launch_id="nowhere"))
            here.launch()
            await eventually(lambda: service.waiting == 0)
            assert (await service.submit(new("a", idempotency_key="k"))).id == first.id

    run(go())


def test_a_repeated_request_is_answered_also_when_its_launch_has_ended(tmp_path: Path) -> None:
    async def go() -> None:
        async with desk(tmp_path) as here:
            service = here.department.items
            launch_id = next(iter(here.department.dispatcher._adverts))
            first = await service.submit(new("a", idempotency_key="k", launch_id=launch_id))
            here.department.forget(launch_id)
            assert (await service.submit(new("a", idempotency_key="k", launch_id=launch_id))).id == first.id
            with pytest.raises(NotFound):
                await service.submit(new("a", launch_id=launch_id))

    run(go())


def test_a_number_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    async def go() -> None:
        async with desk(tmp_path) as here:
            with pytest.raises(BadRequest, match="larger than"):
                await here.department.items.submit(replace(new("a"), body={"model": "m", "temperature": 1e999}))
            assert here.department.items.waiting == 0

    run(go())


def test_a_caller_that_goes_away_leaves_no_item_that_nobody_knows(tmp_path: Path) -> None:
    async def go() -> None:
        async with desk(tmp_path) as here:
            service = here.department.items
            for turns in range(8):
                call = asyncio.create_task(service.submit(new()))
                for _ in range(turns):
                    await asyncio.sleep(0)
                call.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await call
            await asyncio.sleep(0.1)
            await eventually(lambda: service.waiting == 0)
            found, _ = await service.list(OWNER, state="queued", after=None, limit=100)
            assert found == []

    run(go())


def test_a_restart_goes_on_with_all_and_reads_bodies_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_source, "MOST_BODIES", 4)
    monkeypatch.setattr(item_source, "AGAIN_S", 0.01)

    async def go() -> None:
        async with desk(tmp_path, launched=False) as here:
            service = here.department.items
            prompts = {(await service.submit(new(f"p{n:02}"))).id: f"p{n:02}" for n in range(30)}
            ids = sorted(prompts)
            assert len(next(iter(service._sources.values()))._ahead) == 4
        engine, body, count = HandEngine(), ItemStore.body, 0

        async def failing(self: ItemStore, item_id: str) -> bytes | None:
            nonlocal count
            count += 1
            if count == 3:
                raise StorageFull("no room")
            if count == 4:
                raise ZeroDivisionError
            return await body(self, item_id)

        monkeypatch.setattr(ItemStore, "body", failing)
        async with desk(tmp_path, engine, launched=False) as here:
            service = here.department.items
            await service.cancel(ids[7], OWNER)
            found, more = await service.list(OWNER, state="queued", after=None, limit=10)
            assert (len(found), more) == (10, True)
            await eventually(lambda: len(next(iter(service._sources.values()))._ahead) == 4)
            here.launch()
            await eventually(lambda: service.waiting == 0)
            assert engine.prompts == [prompts[one] for one in ids if one != ids[7]]
            for state, number in (("completed", 29 - 3), ("failed", 3), ("cancelled", 1), ("queued", 0)):
                found, _ = await service.list(OWNER, state=state, after=None, limit=100)
                assert len(found) == number

    run(go())


def test_lists_tell_what_is_under_way_from_what_waits(tmp_path: Path) -> None:
    async def go() -> None:
        engine = HandEngine()
        engine.held = True
        async with desk(tmp_path, engine) as here:
            service = here.department.items
            for number in range(5):
                await service.submit(new(model="small" if number % 2 else "missing"))
            await eventually(lambda: len(engine.waiting) == 2)
            for state, number in (("queued", 3), ("in_progress", 2), (None, 5)):
                found, more = await service.list(OWNER, state=state, after=None, limit=10)
                assert (len(found), more) == (number, False)
            first, more = await service.list(None, state="in_progress", after=None, limit=1)
            assert more
            rest, more = await service.list(None, state="in_progress", after=first[0].id, limit=1)
            assert not more
            assert rest[0].id < first[0].id

    run(go())


def test_attempts_and_deaths_are_stored_and_what_fails_in_the_end_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_bootstrap.batches.retrying.BACKOFF_S", 0.01)
    monkeypatch.setattr("vllm_bootstrap.batches.verdicts.VERDICT_S", 0.01)

    async def go() -> None:
        engine = HandEngine()
        engine.held = True
        async with desk(tmp_path, engine, line_attempts=2) as here:
            service = here.department.items
            view = await service.submit(new())
            for _ in range(2):
                await eventually(lambda: engine.waiting)
                engine.take().ended(items_outcome())
                await asyncio.sleep(0.02)
            seen = await service.get(view.id, OWNER, wait_s=10)
            assert (seen.state, seen.attempts) == ("failed", 2)
            assert seen.error is not None
            assert seen.error["code"] == "upstream_error"

    run(go())


def items_outcome() -> Any:
    return Outcome(None, b"", UpstreamError("cut"), True, "req")


def test_a_full_disk_delays_the_end_and_a_failed_one_prevents_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "AGAIN_S", 0.01)
    end, errors = ItemStore.end, [StorageFull("no room"), StorageFull("no room")]

    async def failing(self: ItemStore, ended: Any, now: float) -> None:
        if errors:
            raise errors.pop()
        await end(self, ended, now)

    async def go() -> None:
        monkeypatch.setattr(ItemStore, "end", failing)
        async with desk(tmp_path) as here:
            service = here.department.items
            view = await service.submit(new())
            assert (await service.get(view.id, OWNER, wait_s=10)).state == "completed"
            errors[:] = [StorageFailed("fsync failed")]
            view = await service.submit(new())
            await eventually(lambda: service._recorder.failed is not None)
            assert (await service.get(view.id, OWNER)).state == "in_progress"
            assert not service.may_take
        async with desk(tmp_path) as here:
            assert (await here.department.items.get(view.id, OWNER, wait_s=10)).state == "completed"
            await here.department.items._store.sweep(9e12)
            with pytest.raises(NotFound):
                await here.department.items.get(view.id, OWNER)

    run(go())


def test_what_is_finished_when_a_daemon_stops_is_not_lost(tmp_path: Path) -> None:
    async def go() -> None:
        engine = HandEngine()
        engine.held = True
        async with desk(tmp_path, engine) as here:
            service = here.department.items
            ids = [(await service.submit(new(f"{n}"))).id for n in range(20)]
            await eventually(lambda: len(engine.waiting) >= 16)
            while engine.waiting:
                flight = engine.take()
                flight.ended(answer_to(flight.jobs[0]))
        async with desk(tmp_path, launched=False) as here:
            states = [(await here.department.items.get(one, OWNER)).state for one in ids]
            assert states.count("queued") <= 4
            assert here.department.items.waiting == states.count("queued")

    run(go())


def test_a_hundred_thousand_wait_in_little_memory(tmp_path: Path) -> None:
    async def fill() -> None:
        db = Database.open(tmp_path / "state.db")
        values = {
            "node_id": "local", "owner_id": OWNER, "path": CHAT, "model": "small", "launch_id": None,
            "body": '{"model": "small", "prompt": "x"}', "priority": 0, "created_at": 1.0, "expires_at": 9e12,
        }  # fmt: skip
        rows = [{**values, "id": f"item_{n:020d}"} for n in range(100_000)]
        await db.write(lambda conn: conn.executemany(SQL["insert_item"], rows) and None)
        db.close()

    async def go() -> None:
        await fill()
        tracemalloc.start()
        try:
            async with desk(tmp_path, launched=False, items_max_queued=200_000) as here:
                assert here.department.items.waiting == 100_000
                used, _ = tracemalloc.get_traced_memory()
                assert used < 60e6
        finally:
            tracemalloc.stop()

    run(go())
