"""The keeper over real launches: simulated engines on two mock GPUs."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from tests.support.aio import eventually, run
from tests.support.keeping import Keeping, gather, model
from vllm_bootstrap.errors import ModelFailed, ModelLoading, ModelNotFound
from vllm_bootstrap.launches.types import LaunchOrder
from vllm_bootstrap.models import planning
from vllm_bootstrap.models.planning import Policy
from vllm_bootstrap.models.types import GpuNeed, Group, ModelEntry


def test_a_request_loads_its_model_once_however_many_ask() -> None:
    async def main() -> None:
        async with Keeping(model("a")) as box:
            served = await gather(*(box.use("a") for _ in range(20)))
            assert len(set(served)) == 1
            assert len(box.launches_of("a")) == 1
            assert ("loaded", "a", "start") in box.told.notes
            assert await box.use("a") == served[0]

    run(main())


def test_a_mistake_of_ours_in_a_load_is_not_repeated_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def broken(entry: ModelEntry, **_: Any) -> LaunchOrder:
        tries.append(entry.name)
        raise ValueError("a mistake")

    async def main() -> None:
        async with Keeping(model("a"), hold_s=0.5) as box:
            with monkeypatch.context() as patched:
                patched.setattr(box.book, "order_of", broken)
                assert isinstance(await box.refused("a"), ModelLoading)
            assert tries == ["a"]
            await box.keeper.load("a")
            await box.until("a", "loaded")

    run(main())


def test_aliases_and_unknown_names() -> None:
    async def main() -> None:
        async with Keeping(model("a", aliases=("chat",))) as box:
            first, second = await gather(box.use("chat"), box.use("a"))
            assert first == second
            assert isinstance(await box.refused("b"), ModelNotFound)

    run(main())


def test_where_any_model_may_be_asked_for_a_name_is_enough() -> None:
    async def main() -> None:
        async with Keeping(on_demand="any") as box:
            assert await box.use("whatever")
            assert isinstance(await box.refused("no/such/name"), ModelNotFound)

    run(main())


def test_where_nothing_is_loaded_on_demand_an_operator_still_may() -> None:
    async def main() -> None:
        async with Keeping(model("a"), on_demand="off") as box:
            assert isinstance(await box.refused("a"), ModelNotFound)
            await box.keeper.load("a")
            await box.until("a", "loaded")
            assert await box.use("a")

    run(main())


def test_an_idle_model_makes_room_and_comes_back() -> None:
    async def main() -> None:
        async with Keeping(model("a"), model("b"), model("c")) as box:
            for name in ("a", "b"):
                await box.use(name)
            await asyncio.sleep(0.1)
            await box.use("b")
            await box.use("c")
            assert box.state("a") == "unloaded", "it was idle for longest"
            assert box.state("b") == "loaded"
            await box.use("a")
            assert len(box.launches_of("a")) == 2
            assert ("put away", "a", "stop", "room") in box.told.notes

    run(main())


def test_a_busy_model_is_not_put_away_until_it_is_free() -> None:
    async def main() -> None:
        whole = GpuNeed(count=2)
        async with Keeping(model("a", gpus=whole), model("b", gpus=whole)) as box:
            lease = await box.acquire("a")
            waiting = asyncio.create_task(box.use("b"))
            await eventually(lambda: box.gate.is_retired(lease.instance.launch_id))  # after ``max_wait_s``
            late = asyncio.create_task(box.use("a"))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            assert box.state("a") == "loaded"
            lease.release()
            await waiting
            await late
            assert [len(box.launches_of(name)) for name in "ab"] == [2, 1]

    run(main())


def test_who_gives_up_waiting_does_not_have_another_put_away() -> None:
    async def main() -> None:
        whole = GpuNeed(count=2)
        async with Keeping(model("a", gpus=whole), model("b", gpus=whole)) as box:
            lease = await box.acquire("a")
            waiting = asyncio.create_task(box.acquire("b"))
            await eventually(lambda: box.gate.is_retired(lease.instance.launch_id))
            waiting.cancel()
            await eventually(lambda: not box.gate.is_retired(lease.instance.launch_id))
            lease.release()
            assert await box.use("a") == lease.instance.launch_id

    run(main())


def test_a_pinned_model_stays_and_the_refusal_says_so() -> None:
    async def main() -> None:
        whole = GpuNeed(count=2)
        async with Keeping(model("a", gpus=whole, pin=True), model("b", gpus=whole), hold_s=0.5) as box:
            await box.keeper.load("a")
            await box.until("a", "loaded")
            error = await box.refused("b")
            assert isinstance(error, ModelLoading)
            assert "'a' is pinned" in error.message
            assert box.warmed == ["b"], "its files are read ahead, once"
            assert box.state("a") == "loaded"

    run(main())


def test_models_that_rest_cost_a_plan_nothing() -> None:
    async def main() -> None:
        planned: list[set[str]] = []

        def watched(facts: list[planning.Facts], *rest: Any) -> planning.Plan:
            planned.append({fact.name for fact in facts})
            return real(facts, *rest)

        real = planning.plan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "plan", watched)
            resting = [model(f"resting-{number}") for number in range(20)]
            async with Keeping(model("a"), model("up", preload=True), *resting) as box:
                await box.use("a")
                await box.until("up", "loaded")
                await box.keeper.unload("a", force=False)
                planned.clear()
                box.lines["resting-7"] = 3
                box.keeper.kick()
                await box.until("resting-7", "loaded")
                assert "resting-7" in planned[-1]
                assert box.keeper.records["resting-7"].batch_lines == 3
                box.lines.clear()
                await box.keeper.unload("resting-7", force=False)
                await eventually(lambda: planned[-1] == {"up"}, 10)
                assert box.keeper.records["resting-7"].batch_lines == 0
                assert box.state("a") == box.state("resting-7") == "unloaded"

    run(main())


def test_who_is_told_to_come_back_finds_it_loaded() -> None:
    async def main() -> None:
        async with Keeping(model("a")) as box:
            error = await box.refused("a", hold_s=0)
            assert isinstance(error, ModelLoading)
            await box.until("a", "loaded")
            assert await box.use("a", hold_s=0)

    run(main())


def test_a_load_that_fails_answers_all_who_wait_and_backs_off() -> None:
    async def main() -> None:
        broken = model("a", knobs={"die-at-boot": "bad_flag"}, restart="never")
        async with Keeping(broken) as box:
            errors = await gather(*(box.refused("a") for _ in range(5)))
            assert {type(error) for error in errors} == {ModelFailed}
            assert errors[0].details["failure"]["class"] == "bad_flag"
            assert errors[0].should_retry is False
            launched = len(box.launches_of("a"))
            assert isinstance(await box.refused("a"), ModelFailed)
            assert len(box.launches_of("a")) == launched == 1, "a permanent failure is not tried again"
            box.book.models["a"] = model("a")
            box.keeper.book_changed()
            assert await box.use("a"), "a changed entry is"

    run(main())


def test_a_failure_that_may_pass_is_tried_again_after_a_while() -> None:
    async def main() -> None:
        async with Keeping(model("a", knobs={"die-at-boot": "engine_died"}, restart="never")) as box:
            for _ in range(2):
                error = await box.refused("a")
                while isinstance(error, ModelFailed) and len(box.launches_of("a")) < 2:
                    assert error.retry_after == 1
                    error = await box.refused("a")
            assert isinstance(error, ModelFailed)
            assert len(box.launches_of("a")) >= 2
            assert box.keeper.records["a"].failures >= 2

    run(main())


def test_an_idle_model_goes_after_its_time_to_live_and_pinned_ones_stay() -> None:
    async def main() -> None:
        async with Keeping(model("a", ttl_s=0.3), model("b", pin=True, ttl_s=0.3)) as box:
            await gather(box.use("a"), box.use("b"))
            await box.until("a", "unloaded")
            assert box.state("b") == "loaded"
            await eventually(lambda: ("put away", "a", "stop", "idle") in box.told.notes)

    run(main())


def test_preloaded_models_come_by_themselves_but_put_nobody_away() -> None:
    async def main() -> None:
        whole = GpuNeed(count=2)
        async with Keeping(model("a", gpus=whole, preload=True), model("b", gpus=whole, preload=True)) as box:
            await box.until("a", "loaded")
            await asyncio.sleep(0.3)
            assert box.state("b") == "unloaded"
            await box.keeper.unload("a", force=False)
            await box.until("b", "loaded")

    run(main())


def test_unloading_waits_for_what_runs_and_with_force_does_not() -> None:
    async def main() -> None:
        async with Keeping(model("a")) as box:
            lease = await box.acquire("a")
            gently = asyncio.create_task(box.keeper.unload("a", force=False))
            await eventually(lambda: box.gate.is_retired(lease.instance.launch_id))
            await asyncio.sleep(0.2)
            assert not gently.done()
            await box.keeper.unload("a", force=True)
            await gently
            lease.release()
            assert box.state("a") == "unloaded"
            assert await box.use("a"), "it is loaded again when it is asked for"

    run(main())


def test_a_changed_entry_holds_from_the_next_load_which_comes_when_it_is_idle() -> None:
    async def main() -> None:
        async with Keeping(model("a")) as box:
            lease = await box.acquire("a")
            box.book.models["a"] = model("a", aliases=("chat",))
            box.keeper.book_changed()
            await asyncio.sleep(0.3)
            assert box.state("a") == "loaded"
            lease.release()
            assert await box.use("chat") != lease.instance.launch_id
            del box.book.models["a"]
            box.keeper.book_changed()
            await box.until("a", "unloaded")
            assert isinstance(await box.refused("a"), ModelNotFound)

    run(main())


def test_models_of_a_group_that_are_kept_apart() -> None:
    async def main() -> None:
        apart = [Group("apart", frozenset({"a", "b"}), together=False)]
        async with Keeping(model("a"), model("b"), groups=apart) as box:
            await box.use("a")
            await box.use("b")
            assert box.state("a") == "unloaded", "there was room for both"

    run(main())


def test_an_engine_that_is_killed_while_it_loads_is_loaded_again() -> None:
    async def main() -> None:
        async with Keeping(model("a", knobs={"boot-delay": 1.0}), hold_s=30) as box:
            waiting = asyncio.create_task(box.acquire("a"))
            await eventually(lambda: any(view.pid for view in box.launches_of("a")))
            os.kill(box.launches_of("a")[0].pid, signal.SIGKILL)
            with pytest.raises(ModelFailed):
                await waiting
            await box.until("a", "loaded")
            assert await box.use("a")

    run(main())


def test_batch_work_loads_a_model_and_gives_way_to_realtime() -> None:
    async def main() -> None:
        whole = GpuNeed(count=2)
        async with Keeping(model("a", gpus=whole), model("b", gpus=whole)) as box:
            box.lines = {"a": 10}
            await box.until("a", "loaded")
            line = await box.acquire("a", "batch")
            waiting = asyncio.create_task(box.use("b"))
            await eventually(lambda: box.gate.is_retired(line.instance.launch_id))
            assert not waiting.done()
            line.release()
            await waiting
            await box.until("a", "loaded")
            assert box.state("b") == "unloaded"

    run(main())


def test_two_batches_take_turns_by_model() -> None:
    async def main() -> None:
        whole = GpuNeed(count=2)
        policy = Policy(min_loaded_s=0.0, max_wait_s=5.0, batch_turn_s=1.0, quiet_s=0.1)
        async with Keeping(model("a", gpus=whole), model("b", gpus=whole), policy=policy) as box:
            box.lines = {"a": 10, "b": 10}
            await eventually(lambda: all(len(box.launches_of(name)) >= 2 for name in "ab"), 40)

    run(main())


def test_batch_that_is_done_makes_room_for_batch_at_once_where_realtime_never_was() -> None:
    async def main() -> None:
        whole = GpuNeed(count=2)
        policy = Policy(min_loaded_s=0.0, max_wait_s=5.0, batch_turn_s=600.0, quiet_s=600.0)
        async with Keeping(model("a", gpus=whole), model("b", gpus=whole), policy=policy) as box:
            box.lines = {"a": 10}
            await box.until("a", "loaded")
            (await box.acquire("a", "batch")).release()
            box.lines = {"b": 10}
            await box.until("b", "loaded")

    run(main())


def test_a_launch_of_an_operator_that_serves_the_name_is_used_and_not_doubled() -> None:
    async def main() -> None:
        async with Keeping(model("a")) as box:
            made = await box.world.launch(model="org/a", served_model_name="a")
            assert await box.use("a") == made.launch_id
            assert not box.launches_of("a")

    run(main())


def test_after_a_crash_of_the_daemon_it_goes_on_with_what_runs() -> None:
    async def main() -> None:
        box = Keeping(model("a"), model("b"))
        await box.__aenter__()
        served = await box.use("a")
        await box.keeper.close()
        following = Keeping(model("a"), model("b"), world=await box.world.restart())
        async with following as again:
            await again.until("a", "loaded")
            assert await again.use("a") == served
            assert await again.use("b")

    run(main())


def test_what_the_outlook_says() -> None:
    async def main() -> None:
        shown = model("a", show_loading=True, knobs={"boot-delay": 1.0})
        async with Keeping(shown, model("b", gpus=GpuNeed(count=2), pin=True)) as box:
            outlook = box.outlook
            assert outlook.wants_progress("a")
            assert not outlook.wants_progress("b")
            assert not outlook.wants_progress("c")
            assert outlook.progress_of("c") is None
            assert outlook.ready_in_s("a") is None
            waiting = asyncio.create_task(box.use("a"))
            await eventually(lambda: (outlook.progress_of("a") or "").startswith("loading a:"))
            await waiting
            assert outlook.progress_of("a") is None
            assert 0 < (outlook.ready_in_s("a") or 0) < 20
            blocked = asyncio.create_task(box.acquire("b"))
            lease = await box.acquire("a")
            blocked.cancel()
            lease.release()

    run(main())


def test_a_wish_that_this_machine_can_never_meet_is_refused() -> None:
    async def main() -> None:
        async with Keeping(model("a"), model("huge", gpus=GpuNeed(count=8))) as box:
            await box.use("a")
            error = await box.refused("huge")
            assert isinstance(error, ModelFailed)
            assert error.should_retry is False
            assert "8 GPUs are wanted" in error.message
            assert box.state("a") == "loaded"

    run(main())


def test_a_preloaded_model_that_an_operator_stops_comes_back_only_when_it_is_asked_for() -> None:
    async def main() -> None:
        async with Keeping(model("a", preload=True)) as box:
            await box.until("a", "loaded")
            await box.world.supervisor.stop(box.launches_of("a")[0].launch_id)
            await box.until("a", "unloaded")
            await asyncio.sleep(0.3)
            assert box.state("a") == "unloaded"
            assert await box.use("a")

    run(main())


def test_closing_while_a_launch_is_accepted_leaves_it_with_an_owner() -> None:
    async def main() -> None:
        async with Keeping(model("a")) as box:
            supervisor, begun, go_on = box.world.supervisor, asyncio.Event(), asyncio.Event()
            accept = supervisor.launch

            async def slowly(*args: Any) -> Any:
                begun.set()
                await go_on.wait()
                return await accept(*args)

            supervisor.launch = slowly
            waiting = asyncio.create_task(box.acquire("a"))
            await begun.wait()
            closing = asyncio.create_task(box.keeper.close())
            await asyncio.sleep(0.1)
            assert not closing.done()
            go_on.set()
            await closing
            assert [view.state for view in box.launches_of("a")] == ["bootstrapping"]
            (await waiting).release()

    run(main())


def test_where_any_model_may_be_asked_for_lines_of_a_batch_are_enough_too() -> None:
    async def main() -> None:
        async with Keeping(on_demand="any") as box:
            box.lines = {"whatever": 3, "no/such/name": 1}
            await box.until("whatever", "loaded")

    run(main())
