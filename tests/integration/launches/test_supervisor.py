"""The life of launches with real shims, real simulator processes and a real database."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from pathlib import Path

import pytest

from tests.support.aio import eventually, run
from tests.support.world import World, background
from vllm_bootstrap.errors import BadRequest, Conflict, Draining, GpuConflict, NotFound, StorageFull, Unavailable
from vllm_bootstrap.launches.types import LaunchOrder
from vllm_bootstrap.serving import Advert

GIB = 1 << 30


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_launch_ready_serve_stop():
    async def main():
        async with World() as world:
            view = await world.launch(served_model_name="tiny", labels={"a": "b"})
            assert view.state == "bootstrapping"
            assert view.progress is not None
            view = await world.until(view.launch_id, "ready")
            assert alive(view.pid)
            assert world.adverts[view.launch_id].instance.served_names == ("tiny",)
            assert await world.chat(view.launch_id) == 200
            assert [c.uuid for c in view.claims] == list(world.ledger.owners("GPU-mock-0") and ["GPU-mock-0"])
            outcome = await world.supervisor.stop(view.launch_id)
            assert (outcome.state, outcome.forced) == ("stopped", False)
            assert not alive(view.pid)
            assert not alive(view.shim_pid)
            assert world.ledger.owners("GPU-mock-0") == ()
            assert await world.store.claims() == {}
            assert world.adverts[view.launch_id].instance is None
            assert await world.events(view.launch_id) == ["created", "became_ready", "stop_requested", "released"]
            again = await world.supervisor.stop(view.launch_id)
            assert again.state == "stopped"

    run(main())


def adverts_of(world: World) -> list[Advert]:
    """All that are made from now on."""
    made: list[Advert] = []
    world.on_advert = made.append
    return made


def test_a_launch_that_is_stopped_says_so_in_the_same_breath_as_it_leaves_traffic():
    async def main():
        async with World() as world:
            view = await world.ready(knobs={"slow-stop": 1})
            adverts = adverts_of(world)
            world.supervisor._owners[view.launch_id].wish_stop(force=False)
            (first,) = adverts
            assert (first.instance, first.state, first.stopped) == (None, "stopping", True)
            assert world.supervisor.get(view.launch_id).state == "ready", "what is told of it is what has happened"
            await world.supervisor.stop(view.launch_id)
            assert {advert.instance for advert in adverts} == {None}
            assert [advert.state for advert in adverts] == ["stopping"] * (len(adverts) - 1) + ["stopped"]
            assert await world.events(view.launch_id) == ["created", "became_ready", "stop_requested", "released"]

    run(main())


def test_a_launch_that_is_stopped_while_it_loads_promises_nothing_any_more():
    async def main():
        async with World() as world:
            first = await world.ready(knobs={"boot-delay": 0.5})
            await world.supervisor.stop(first.launch_id, force=True)
            view = await world.launch(knobs={"boot-delay": 0.5})
            await eventually(lambda: view.launch_id in world.adverts)
            assert world.adverts[view.launch_id].retry_after_s is not None
            adverts = adverts_of(world)
            await world.supervisor.stop(view.launch_id, force=True)
            assert (adverts[0].state, adverts[0].stopped, adverts[0].retry_after_s) == ("stopping", True, None)

    run(main())


def test_a_launch_that_dies_is_not_said_to_be_stopped():
    async def main():
        async with World() as world:
            view = await world.ready()
            adverts = adverts_of(world)
            os.kill(view.pid, signal.SIGKILL)
            await world.until(view.launch_id, "failed")
            assert (adverts[0].instance, adverts[0].state) == (None, "ready")
            assert not any(advert.stopped for advert in adverts)
            assert {advert.instance for advert in adverts} == {None}

    run(main())


def test_a_stop_that_comes_too_late_does_not_change_how_a_launch_has_ended():
    async def main():
        async with World() as world:
            view = await world.ready()
            owner = world.supervisor._owners[view.launch_id]
            os.kill(view.pid, signal.SIGKILL)
            await world.until(view.launch_id, "failed")
            owner.wish_stop(force=True)
            advert = world.adverts[view.launch_id]
            assert (advert.state, advert.stopped) == ("failed", False)

    run(main())


def test_a_second_start_knows_how_long_the_first_took():
    async def main():
        async with World() as world:
            first = await world.ready()
            await world.supervisor.stop(first.launch_id, force=True)
            second = await world.launch(knobs={"boot-delay": 2})
            assert second.progress.eta_s is None  # other arguments, other duration
            await world.supervisor.stop(second.launch_id, force=True)
            third = await world.launch()
            assert third.progress.eta_s is not None

    run(main())


def test_exit_zero_without_our_stop_is_a_crash_and_is_restarted_up_to_the_cap():
    async def main():
        async with World() as world:
            # The answer that shows it ready counts as well.
            view = await world.ready(knobs={"exit-zero-after": 2}, restart_policy="on-failure")
            assert await world.chat(view.launch_id) == 200
            await eventually(lambda: world.supervisor.get(view.launch_id).attempt == 2, 20)
            view = await world.until(view.launch_id, "ready")
            await world.supervisor.stop(view.launch_id)

        async with World() as world:
            view = await world.ready(knobs={"exit-zero-after": 2})
            assert await world.chat(view.launch_id) == 200
            view = await world.until(view.launch_id, "failed")
            assert view.failure.failure_class == "engine_died"
            assert view.failure.exit_code == 0

    run(main())


def test_retryable_death_at_boot_ends_at_the_cap():
    async def main():
        async with World() as world:
            view = await world.launch(knobs={"die-at-boot": "address_in_use"}, restart_policy="on-failure")
            view = await world.until(view.launch_id, "failed", timeout=30)
            assert view.attempt == 3
            assert view.failure.failure_class == "address_in_use"
            assert world.ledger.owners("GPU-mock-0") == ()
            assert (await world.events(view.launch_id)).count("released") == 3
            assert world.supervisor.log_reader(view.launch_id, 1).size > 0
            with pytest.raises(NotFound):
                world.supervisor.log_reader(view.launch_id, 4)

    run(main())


def test_permanent_failures_are_not_retried():
    async def main():
        async with World() as world:
            view = await world.launch(knobs={"die-at-boot": "bad_flag"}, restart_policy="on-failure")
            view = await world.until(view.launch_id, "failed")
            assert (view.attempt, view.failure.failure_class, view.failure.permanent) == (1, "bad_flag", True)
            assert view.failure.lines
            assert view.failure.hint

    run(main())


@pytest.mark.parametrize("victim", ["engine", "shim", "child"])
def test_kill_minus_nine_leaves_nothing_and_frees_the_gpu(victim):
    async def main():
        async with World() as world:
            view = await world.ready(tensor_parallel_size=1, knobs={"fork-setsid-child": True})
            tree = tree_of(view.shim_pid)
            assert len(tree) >= 3
            core = next(pid for pid in tree if pid not in {view.pid, view.shim_pid})
            os.kill({"engine": view.pid, "shim": view.shim_pid, "child": core}[victim], signal.SIGKILL)
            if victim == "child":
                await asyncio.wait_for(world.supervisor.stop(view.launch_id), 20)
            else:
                view = await world.until(view.launch_id, "failed")
                assert view.failure.failure_class in {"killed_by_signal", "shim_lost"}
            await eventually(lambda: not any(alive(pid) for pid in tree), 10)
            assert world.ledger.owners("GPU-mock-0") == ()

    run(main())


def tree_of(root: int) -> set[int]:
    """All living descendants of a process, itself included, from /proc alone."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found
        found |= more


def test_an_engine_that_ignores_sigterm_is_killed_and_the_answer_says_so():
    async def main():
        async with World(stop_grace_s=0.5) as world:
            view = await world.ready(knobs={"ignore-sigterm": True})
            outcome = await asyncio.wait_for(world.supervisor.stop(view.launch_id), 10)
            assert outcome.forced is True
            assert not alive(view.pid)

    run(main())


def test_never_ready_without_progress_times_out_and_frees_the_gpu():
    async def main():
        async with World(start_timeout_s=1.0) as world:
            view = await world.launch(knobs={"never-ready": True})
            view = await world.until(view.launch_id, "failed", timeout=20)
            assert view.failure.failure_class == "start_timeout"
            assert world.ledger.owners("GPU-mock-0") == ()

    run(main())


def test_hung_engine_is_flagged_and_given_up_in_the_end():
    async def main():
        async with World(unresponsive_after_s=0.5, unhealthy_after_s=1.5) as world:
            view = await world.ready(knobs={"hang-after": 1})
            request = background(world.chat(view.launch_id, timeout_s=30))
            await eventually(lambda: world.supervisor.get(view.launch_id).unresponsive, 10)
            assert world.adverts[view.launch_id].instance is None
            assert world.supervisor.get(view.launch_id).state == "ready"
            view = await world.until(view.launch_id, "failed", timeout=20)
            assert view.failure.failure_class == "unhealthy"
            await asyncio.gather(request, return_exceptions=True)
            assert "unresponsive" in await world.events(view.launch_id)

    run(main())


def test_frozen_engine_recovers_when_it_moves_again():
    async def main():
        async with World(unresponsive_after_s=0.5, probe_timeout_s=0.3) as world:
            view = await world.ready()
            pids = tree_of(view.pid)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            await eventually(lambda: world.supervisor.get(view.launch_id).unresponsive, 10)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            await eventually(lambda: not world.supervisor.get(view.launch_id).unresponsive, 10)
            assert world.adverts[view.launch_id].instance is not None

    run(main())


def test_conflicts_name_the_owner_and_sharing_needs_both():
    async def main():
        async with World() as world:
            first = await world.launch(gpu_count=None, gpu_ids=(0,))
            with pytest.raises(GpuConflict, match=first.launch_id):
                await world.launch(gpu_count=None, gpu_ids=(0,))
            half = await world.launch(gpu_count=None, gpu_ids=(1,), gpu_share=0.5)
            with pytest.raises(GpuConflict):
                await world.launch(gpu_count=None, gpu_ids=(1,))
            other = await world.launch(gpu_count=None, gpu_ids=(1,), gpu_share=0.5)
            for view in (half, other):
                await world.until(view.launch_id, "ready")
            assert world.ledger.claimed_milli("GPU-mock-1") == 1000
            starts = {v.launch_id: v.transitions["ready"] for v in world.supervisor.list(include_ended=False)}
            assert starts[half.launch_id] < starts[other.launch_id]  # start-ups on one GPU follow each other

    run(main())


def test_an_engine_that_takes_more_than_its_share_is_not_taken_for_a_stranger():
    """Where processes can be seen, ours are known by their trees, and a stranger by not being in one."""

    async def main():
        async with World() as world:
            half = {"gpu_ids": (0,), "gpu_count": None, "gpu_share": 0.5}
            view = await world.ready(**half, knobs={"fork-setsid-child": True})
            used, stranger = 60 << 30, {"uuid": "GPU-mock-0", "pid": os.getpid(), "used_bytes": 2 << 30}
            world.inventory.set_used("GPU-mock-0", used)
            own = await world.supervisor.own_pids(await world.inventory.snapshot())
            assert own is None, "nobody is seen there"
            ours = {"uuid": "GPU-mock-0", "pid": view.pid, "used_bytes": used}
            world.inventory.set_processes(ours, stranger)
            own = await world.supervisor.own_pids(await world.inventory.snapshot())
            assert {view.pid, view.shim_pid} <= own
            assert os.getpid() not in own
            with pytest.raises(GpuConflict, match=f"pid {os.getpid()}"):
                await world.launch(**half)
            world.inventory.set_processes(ours)
            second = await world.launch(**half)
            assert second.claims[0].uuid == "GPU-mock-0"
            world.inventory.set_used("GPU-mock-0", 0)
            world.inventory.set_processes()

    run(main())


def test_memory_that_does_not_come_back_makes_the_gpu_unsettled_until_it_does():
    async def main():
        world = await World().__aenter__()
        try:
            view = await world.ready()
            world.inventory.set_used("GPU-mock-0", 8 * GIB)
            outcome = await world.supervisor.stop(view.launch_id)
            assert (outcome.state, outcome.unsettled_gpus) == ("stopped", ("GPU-mock-0",))
            with pytest.raises(GpuConflict):
                await world.launch(gpu_count=None, gpu_ids=(0,))
            world = await (await world.restart()).__aenter__()
            assert "GPU-mock-0" in world.gpus.unsettled
            world.inventory.set_used("GPU-mock-0", 0)
            await world.gpus.recheck()
            await world.launch(gpu_count=None, gpu_ids=(0,))
        finally:
            await world.__aexit__()

    run(main())


def test_stop_at_any_moment_of_the_start_leaves_nothing():
    async def main():
        async with World() as world:

            async def one(step: int) -> None:
                view = await world.launch(knobs={"boot-delay": 0.3})
                await asyncio.sleep(step * 0.06)
                outcome = await asyncio.wait_for(world.supervisor.stop(view.launch_id), 15)
                assert outcome.state == "stopped"

            for step in range(0, 12, 2):  # one on each GPU
                await asyncio.gather(one(step), one(step + 1))
            assert world.ledger.owners("GPU-mock-0") == ()
            assert list((world.home / "run").rglob("*.sock")) == []

    run(main())


def test_stop_between_two_attempts():
    async def main():
        async with World(restart_backoff_s=30.0, restart_backoff_max_s=30.0) as world:
            view = await world.launch(knobs={"die-at-boot": "engine_died"}, restart_policy="on-failure")
            await eventually(lambda: world.supervisor.get(view.launch_id).next_attempt_at is not None, 15)
            outcome = await asyncio.wait_for(world.supervisor.stop(view.launch_id), 2)
            assert outcome.state == "stopped"

    run(main())


def test_idempotency_key_gives_the_same_launch_and_refuses_another_request():
    async def main():
        async with World() as world:
            order = LaunchOrder(model="sim", gpu_count=1)
            first = await world.supervisor.launch(order, "tester", "key-1")
            again = await world.supervisor.launch(order, "tester", "key-1")
            assert first.launch_id == again.launch_id
            with pytest.raises(Conflict):
                await world.supervisor.launch(dataclasses.replace(order, model="other"), "tester", "key-1")
            other = await world.supervisor.launch(order, "somebody else", "key-1")
            assert other.launch_id != first.launch_id

    run(main())


def test_raced_launches_never_share_a_gpu():
    async def main():
        async with World() as world:
            results = await asyncio.gather(*(world.launch() for _ in range(40)), return_exceptions=True)
            won = [r for r in results if not isinstance(r, BaseException)]
            assert len(won) == 2
            assert all(isinstance(r, GpuConflict) for r in results if isinstance(r, BaseException))
            assert {c.uuid for view in won for c in view.claims} == {"GPU-mock-0", "GPU-mock-1"}

    run(main())


def test_delete_only_after_the_end_and_then_everything_is_gone():
    async def main():
        async with World() as world:
            view = await world.ready()
            with pytest.raises(Conflict):
                await world.supervisor.delete(view.launch_id)
            await world.supervisor.stop(view.launch_id, force=True)
            assert (world.home / "logs" / view.launch_id).exists()
            await world.supervisor.delete(view.launch_id)
            assert not (world.home / "logs" / view.launch_id).exists()
            with pytest.raises(NotFound):
                world.supervisor.get(view.launch_id)

    run(main())


def test_unknown_engine_names_the_field():
    async def main():
        async with World() as world:
            with pytest.raises(BadRequest) as caught:
                await world.launch(engine="nonsense")
            assert caught.value.param == "engine"

    run(main())


def test_watch_tells_history_and_news_and_ends():
    async def main():
        async with World() as world:
            view = await world.launch()

            async def collect():
                return [event.event async for event in world.supervisor.watch(view.launch_id)]

            watching = background(collect())
            await world.until(view.launch_id, "ready")
            await world.supervisor.stop(view.launch_id)
            seen = await asyncio.wait_for(watching, 5)
            assert seen == ["created", "became_ready", "stop_requested", "released"]
            assert [event.event for event in world.told] == seen[1:]  # each is counted once

    run(main())


def test_a_watcher_that_goes_away_leaves_no_task():
    async def main():
        async with World() as world:
            view = await world.ready()
            before = asyncio.all_tasks()
            for _ in range(5):
                watching = world.supervisor.watch(view.launch_id, after_seq=1_000)
                waiting = background(anext(watching))
                await asyncio.sleep(0.02)
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waiting
                await watching.aclose()
            await eventually(lambda: len(asyncio.all_tasks()) <= len(before))

    run(main())


def test_the_cap_on_logs_touches_nothing_that_is_not_an_ended_launch_of_ours():
    async def main():
        async with World(ended_logs_max_bytes=1) as world:
            strangers = world.home / "logs" / "nginx" / "access.log"
            strangers.parent.mkdir(parents=True)
            strangers.write_bytes(b"x" * 1000)
            running, ended = await world.ready(), await world.ready()
            await world.supervisor.stop(ended.launch_id)
            await eventually(lambda: not (world.home / "logs" / ended.launch_id).exists())
            assert strangers.exists()
            assert (world.home / "logs" / running.launch_id).exists()

    run(main())


@pytest.mark.parametrize("trouble", [StorageFull("full"), PermissionError("no"), Unavailable("locked")])
def test_what_cannot_be_tidied_up_does_not_end_the_daemon(trouble, monkeypatch):
    async def main():
        async with World() as world:

            async def refuse(_keep):
                raise trouble

            monkeypatch.setattr(world.store, "prune", refuse)
            view = await world.ready()
            await world.supervisor.stop(view.launch_id)
            await world.ready()
            assert world.fatal == []

    run(main())


def test_a_daemon_that_leaves_refuses_launches():
    async def main():
        async with World() as world:
            await world.supervisor.stop_all()
            with pytest.raises(Draining):
                await world.launch()

    run(main())


def test_secrets_are_neither_in_the_log_nor_in_argv():
    async def main():
        async with World() as world:
            view = await world.ready(knobs={"log-secret": True})
            key = world.adverts[view.launch_id].instance.endpoint.credential
            log = world.supervisor.log_reader(view.launch_id).read(0, 1 << 20).content
            assert "hf_secret_token_0123456789" not in log
            assert key not in log
            for pid in tree_of(view.shim_pid):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                assert b"hf_secret_token" not in words
                assert key.encode() not in words

    run(main())
