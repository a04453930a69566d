"""The keeper when something is wrong with one model: the others go on, and what passes is not held against it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.aio import eventually, run
from tests.support.keeping import Keeping, gather, model
from vllm_bootstrap.errors import (
    ApiError,
    BadRequest,
    Conflict,
    DoesNotFit,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    StorageFull,
)
from vllm_bootstrap.models import keeper
from vllm_bootstrap.models.desk import Desk
from vllm_bootstrap.models.planning import Policy
from vllm_bootstrap.models.types import GpuNeed, ModelEntry


def ask_smallest(box: Keeping, answers: dict[str, list[int | BadRequest]]) -> None:
    async def smallest(entry: ModelEntry) -> int:
        found = answers[entry.name].pop(0)
        if isinstance(found, BadRequest):
            raise found
        return found

    box.keeper._deps = replace(box.keeper._deps, smallest=smallest)


def test_a_model_that_cannot_be_judged_is_refused_and_does_not_keep_the_others_from_loading() -> None:
    async def main() -> None:
        async with Keeping(model("a"), model("bad", gpus=GpuNeed(share=0.3))) as box:
            ask_smallest(box, {"bad": [BadRequest("gpu_memory_utilization 0.5 is more than gpu_share 0.3")]})
            error, _ = await gather(box.refused("bad"), box.use("a"))
            assert isinstance(error, ModelFailed)
            assert "more than gpu_share" in error.message
            assert error.should_retry is False

    run(main())


def test_the_number_of_gpus_is_asked_anew_for_each_load() -> None:
    async def main() -> None:
        async with Keeping(model("a", gpus=GpuNeed())) as box:
            ask_smallest(box, {"a": [1, 2]})
            await box.use("a")
            await box.keeper.unload("a", force=False)
            await box.use("a")
            assert [len(view.claims) for view in box.launches_of("a")] == [1, 2]

    run(main())


@pytest.mark.parametrize("passes", [True, False])
def test_what_does_not_fit_beside_what_others_use_just_now_is_tried_again(*, passes: bool) -> None:
    async def main() -> None:
        async with Keeping(model("a")) as box:
            answers = [DoesNotFit("60 GiB are free now", retry_after=1 if passes else None)]

            async def fit(_spec: object, _placement: object) -> None:
                if answers:
                    raise answers.pop()

            box.world.supervisor._acceptor._fit = fit
            if passes:
                assert await box.use("a")
                assert box.keeper.records["a"].trouble is None
            else:
                assert isinstance(await box.refused("a"), ModelFailed)

    run(main())


def test_the_end_of_one_replica_is_no_trouble_of_a_model_that_another_one_serves() -> None:
    async def main() -> None:
        async with Keeping(model("a", replicas=2, restart="never"), backoff_s=60, backoff_max_s=60) as box:
            await box.use("a")
            await eventually(lambda: all(view.state == "ready" for view in box.launches_of("a")))
            os.kill(box.launches_of("a")[0].pid, signal.SIGKILL)
            await eventually(lambda: box.launches_of("a")[0].state == "failed")
            await box.use("a")
            assert box.keeper.records["a"].trouble is None
            await box.keeper.unload("a", force=False)
            assert await box.use("a"), "nor is the next load put off for it"

    run(main())


def test_a_changed_entry_ends_a_load_of_the_old_one_at_once() -> None:
    async def main() -> None:
        slow = model("a", knobs={"boot-delay": 60})
        async with Keeping(slow) as box:
            waiting = asyncio.create_task(box.use("a"))
            await box.until("a", "loading")
            box.book.models["a"] = model("a")
            box.keeper.book_changed()
            await waiting
            assert [view.state for view in box.launches_of("a")] == ["stopped", "ready"]

    run(main())


def test_a_made_up_name_is_not_forgotten_while_somebody_waits_for_it() -> None:
    async def main() -> None:
        async with Keeping(model("busy", gpus=GpuNeed(count=2)), on_demand="any") as box:
            lease = await box.acquire("busy")
            waiting = asyncio.create_task(box.use("wanted"))
            await eventually(lambda: "wanted" in box.keeper.records)
            for number in range(2 * keeper.MOST_ADHOC):
                box.keeper.record_of(f"n{number}")
            assert "wanted" in box.keeper.records
            assert len(box.keeper.records) <= keeper.MOST_ADHOC + 3
            lease.release()
            await waiting

    run(main())


async def unloaded(box: Keeping) -> None:
    await box.keeper.unload("a", force=False)


async def removed(box: Keeping) -> None:
    del box.book.models["a"]
    box.keeper.book_changed()


async def given_up(box: Keeping) -> None:
    box.keeper.records["a"].asked["realtime"].until = 0.0


@pytest.mark.parametrize(("end", "told"), [(unloaded, Conflict), (removed, ModelNotFound), (given_up, ModelLoading)])
def test_who_awaits_a_load_that_will_not_come_is_told(end: Callable[[Keeping], Any], told: type[ApiError]) -> None:
    async def main() -> None:
        whole = GpuNeed(count=2)
        async with Keeping(model("a", gpus=whole), model("pinned", gpus=whole, pin=True)) as box:
            await box.use("pinned")
            nobody: Any = None
            desk = Desk(box.keeper, box.book, nobody, nobody, nobody, box.gate, time.monotonic)  # type: ignore[arg-type]
            awaited = asyncio.create_task(desk.load("a", wait=True))
            await eventually(lambda: box.keeper.records["a"].obstacle is not None)
            await end(box)
            with pytest.raises(told):
                await asyncio.wait_for(awaited, 10)

    run(main())


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("loading", [False, True])
def test_an_unload_ends_what_was_there_and_who_waits_gets_the_model_loaded_anew(*, loading: bool, force: bool) -> None:
    async def main() -> None:
        async with Keeping(model("a", knobs={"boot-delay": 0.5})) as box:
            if loading:
                waiting = asyncio.create_task(box.use("a"))
                await box.until("a", "loading")
                unloading = asyncio.create_task(box.keeper.unload("a", force=force))
            else:
                lease = await box.acquire("a")
                unloading = asyncio.create_task(box.keeper.unload("a", force=force))
                await eventually(lambda: box.gate.is_retired(lease.instance.launch_id) or box.state("a") != "loaded")
                waiting = asyncio.create_task(box.use("a"))
                await eventually(lambda: "a" in box.gate.demand() or force)
                lease.release()
            await asyncio.wait_for(unloading, 10)
            await asyncio.wait_for(waiting, 10)
            assert [view.state for view in box.launches_of("a")] == ["stopped", "ready"]

    run(main())


def test_an_unload_that_comes_while_a_load_is_being_accepted_ends_that_load_only() -> None:
    async def main() -> None:
        async with Keeping(model("a", knobs={"boot-delay": 0.5})) as box:
            begun, go_on = asyncio.Event(), asyncio.Event()

            async def fit(_spec: object, _placement: object) -> None:
                begun.set()
                await go_on.wait()

            box.world.supervisor._acceptor._fit = fit
            waiting = asyncio.create_task(box.use("a"))
            await begun.wait()
            unloading = asyncio.create_task(box.keeper.unload("a", force=False))
            await asyncio.sleep(0)  # it has seen the load now, which has no launch yet
            go_on.set()
            await asyncio.wait_for(unloading, 10)
            await asyncio.wait_for(waiting, 10)
            assert [view.state for view in box.launches_of("a")] == ["stopped", "ready"]

    run(main())


def test_who_unloads_again_and_again_while_somebody_waits_does_not_make_it_launch_all_the_time() -> None:
    async def main() -> None:
        async with Keeping(model("a", knobs={"boot-delay": 1.0}), backoff_s=1.0, backoff_max_s=4.0) as box:
            waiting = asyncio.create_task(box.use("a"))
            until = time.monotonic() + 2.5
            while time.monotonic() < until:
                await box.keeper.unload("a", force=True)
                await asyncio.sleep(0.01)
            assert len(box.launches_of("a")) <= 4, "the second that is ended unready costs a second, the third two"
            await asyncio.wait_for(waiting, 10)

    run(main())


def test_names_that_nobody_stands_behind_do_not_keep_who_waits_from_its_model() -> None:
    async def main() -> None:
        policy = Policy(min_loaded_s=0.1, max_wait_s=1.0, batch_turn_s=0.5, quiet_s=0.1)
        async with Keeping(on_demand="any", policy=policy) as box:
            for number in range(30):
                await box.refused(f"n{number}", hold_s=0)
            assert await box.use("mine")
            others = [view for view in box.world.supervisor.list(include_ended=True) if view.model != "mine"]
            assert len(others) <= 12, "it did not stand behind all of them"

    run(main())


def test_a_load_that_an_operator_has_asked_for_does_not_stand_behind_requests() -> None:
    async def main() -> None:
        async with Keeping(model("a", gpus=GpuNeed(count=2)), model("b", gpus=GpuNeed(count=2), pin=True)) as box:
            await box.use("b")
            keeper_ = box.keeper
            await keeper_.load("a")
            await box.refused("a", hold_s=0)
            wanted = {fact.name: fact.absent for fact in keeper_._facts()}
            assert wanted["a"] is False
            keeper_.records["a"].asked.clear()
            await box.refused("a", hold_s=0)
            assert {fact.name: fact.absent for fact in keeper_._facts()}["a"] is True

    run(main())


@pytest.mark.parametrize("on_demand", ["catalogue", "any"])
@pytest.mark.parametrize("known_as", ["a", "chat"])
def test_who_waits_for_a_model_that_is_taken_out_while_it_loads_is_told_so(known_as: str, on_demand: str) -> None:
    async def main() -> None:
        loading = model("a", aliases=("chat",), knobs={"boot-delay": 60})
        async with Keeping(loading, on_demand=on_demand) as box:
            waiting = asyncio.create_task(box.refused(known_as))
            await box.until("a", "loading")
            await removed(box)
            assert isinstance(await asyncio.wait_for(waiting, 10), ModelNotFound)
            await box.until("a", "unloaded")

    run(main())


def test_who_waits_for_a_load_that_a_full_disk_refuses_is_told_at_once_and_the_next_one_is_tried() -> None:
    async def main() -> None:
        async with Keeping(model("a", aliases=("chat",))) as box:
            full = [StorageFull("The disk is full.")]

            async def fit(_spec: object, _placement: object) -> None:
                if full:
                    raise full.pop()

            box.world.supervisor._acceptor._fit = fit
            assert isinstance(await asyncio.wait_for(box.refused("chat"), 5), StorageFull)
            assert await box.use("a"), "there is room again"

    run(main())
