"""Launches that sleep and wake, with real shims and simulators: memory, claims, crashes, failures of each step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually, run
from tests.support.world import World, background
from vllm_bootstrap.engines.simulator_engine import SimulatorEngine
from vllm_bootstrap.errors import BadRequest, Conflict, GpuConflict, GpuUnknown, SleepFailed, WakeFailed
from vllm_bootstrap.gpus.mock import MockInventory
from vllm_bootstrap.launches.process import ShimRefused
from vllm_bootstrap.launches.types import LaunchView

GIB = 1024**3
USED = 3 * GIB
GPU = "GPU-mock-0"


def world(tmp_path: Path, **changes: Any) -> World:
    """Engines show their memory in a file that the inventory reads."""
    file = tmp_path / "gpus.json"
    engine = SimulatorEngine(stop_grace_s=3, mock_memory_file=str(file))
    made = World(tmp_path, engines={"simulator": engine}, **{"sleep_memory_reserve_bytes": 0, **changes})
    made.inventory = MockInventory(2, file=file)
    return made


async def asleep(w: World, level: int = 1, **wish: Any) -> LaunchView:
    view = await ready(w, sleep=level, **wish)
    return await w.supervisor.sleep(view.launch_id, level)


async def ready(w: World, **wish: Any) -> LaunchView:
    knobs = {"mock-memory-bytes": USED, **wish.pop("knobs", {})}
    return await w.ready(knobs=knobs, sleep=wish.pop("sleep", 1), gpu_count=None, gpu_ids=(0,), **wish)


def used(tmp_path: Path, uuid: str = GPU) -> int:
    return int(json.loads((tmp_path / "gpus.json").read_text())["used"].get(uuid, 0))


@asynccontextmanager
async def first_life(w: World) -> AsyncIterator[World]:
    """A daemon's life whose end is up to the test: ``restart`` crashes it."""
    await w.__aenter__()
    try:
        yield w
    except BaseException:
        await w.__aexit__()
        raise


def test_it_sleeps_and_wakes_and_serves_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await asleep(w)
            name = view.launch_id
            assert view.state == "asleep"
            assert w.adverts[name].instance is None
            assert used(tmp_path) < USED / 10
            assert w.ledger.owners(GPU) == ()
            assert w.ledger.parked_on(GPU) == (name,)
            assert await w.store.claims() == {}
            assert (await w.store.parked())[name] == w.ledger.parked(name)
            assert await w.supervisor.estimate_wake(name) is None
            assert w.supervisor.can_sleep(name)
            view = await w.supervisor.wake(name)
            assert view.state == "ready"
            assert used(tmp_path) == USED
            assert w.ledger.owners(GPU) == (name,)
            assert await w.store.parked() == {}
            assert await w.chat(name) == 200
            assert (await w.supervisor.estimate_wake(name) or 0) > 0
            told = {e.event: e.detail for e in await w.supervisor.events(name, 0, 100)}
            assert told["fell_asleep"]["bytes_freed"] == pytest.approx(USED * 0.95)
            assert told["fell_asleep"]["level"] == told["woke"]["level"] == 1
            assert float(str(told["woke"]["seconds"])) > 0

    run(scenario())


def test_level_2_brings_the_same_model_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await asleep(w, level=2)
            view = await w.supervisor.wake(view.launch_id)
            assert await w.chat(view.launch_id) == 200
            told = {e.event: e.detail for e in await w.supervisor.events(view.launch_id, 0, 100)}
            assert told["woke"]["level"] == 2

    run(scenario())


@pytest.mark.parametrize(
    ("how", "level", "says"),
    [("garbled", 2, "weights are not the same"), ("error", 1, "500"), ("hang", 1, "no answer")],
)
def test_one_that_does_not_wake_well_fails(tmp_path: Path, how: str, level: int, says: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path, start_timeout_s=6) as w:
            view = await asleep(w, level, knobs={"wake-fails": how})
            with pytest.raises(WakeFailed, match=says):
                await w.supervisor.wake(view.launch_id)
            view = await w.until(view.launch_id, "failed")
            assert view.failure is not None
            assert view.failure.failure_class == "wake_failed"
            assert says in view.failure.message
            assert w.ledger.owners(GPU) == () == w.ledger.parked_on(GPU)
            assert await w.store.parked() == {}
            assert await w.store.claims() == {}
            await w.ready(knobs={"mock-memory-bytes": USED}, gpu_count=None, gpu_ids=(0,))

    run(scenario())


def test_a_failed_wake_is_restarted_by_policy_for_its_gpus_are_its_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await asleep(w, knobs={"wake-fails": "error"}, restart_policy="on-failure")
            with pytest.raises(WakeFailed):
                await w.supervisor.wake(view.launch_id)
            await eventually(lambda: (v := w.supervisor.get(view.launch_id)).state == "ready" and v.attempt == 2, 15)
            assert await w.chat(view.launch_id) == 200

    run(scenario())


def test_a_sleep_that_frees_too_little_is_undone_and_said(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await ready(w, knobs={"sleep-frees": 0.2})
            with pytest.raises(SleepFailed, match=r"only 0\.6 of 3\.0 GiB"):
                await w.supervisor.sleep(view.launch_id, 1)
            view = w.supervisor.get(view.launch_id)
            assert view.state == "ready"
            assert await w.chat(view.launch_id) == 200
            assert w.ledger.owners(GPU) == (view.launch_id,)
            assert (await w.events(view.launch_id))[-2:] == ["sleep_begun", "stayed_awake"]

    run(scenario())


def test_memory_that_cannot_be_read_is_no_sleep(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await ready(w)
            file = tmp_path / "gpus.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "fail": "memory"}))
            with pytest.raises(SleepFailed, match="cannot be read"):
                await w.supervisor.sleep(view.launch_id, 1)
            assert w.supervisor.get(view.launch_id).state == "ready"

    run(scenario())


def test_what_cannot_sleep_is_told_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            plain = await ready(w, sleep=0)
            assert not w.supervisor.can_sleep(plain.launch_id)
            with pytest.raises(BadRequest, match="not launched with sleep"):
                await w.supervisor.sleep(plain.launch_id, 1)
            with pytest.raises(Conflict, match="is ready, not asleep"):
                await w.supervisor.wake(plain.launch_id)
            await w.supervisor.stop(plain.launch_id)
            with pytest.raises(Conflict, match="has ended"):
                await w.supervisor.sleep(plain.launch_id, 1)
            booting = await w.launch(sleep=1, knobs={"boot-delay": 60})
            with pytest.raises((BadRequest, Conflict)):
                await w.supervisor.sleep(booting.launch_id, 1)
            await w.supervisor.stop(booting.launch_id)
            with pytest.raises(BadRequest, match="levels 1, 2"):
                await w.supervisor.sleep((await ready(w)).launch_id, 3)

    run(scenario())


def test_the_host_keeps_its_reserve(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, sleep_memory_reserve_bytes=1 << 60) as w:
            view = await ready(w)
            with pytest.raises(SleepFailed, match="reserve"):
                await w.supervisor.sleep(view.launch_id, 1)
            assert await w.events(view.launch_id) == ["created", "became_ready"]

    run(scenario())


@pytest.mark.parametrize("trusted", [True, False])
def test_its_gpu_serves_others_while_it_sleeps_and_it_wakes_when_they_are_gone(tmp_path: Path, trusted: bool) -> None:
    async def scenario() -> None:
        # A sleeping launch uses more than what makes a GPU count as busy.
        async with world(tmp_path, gpu_busy_bytes=64 << 20) as w:
            sleeper = await asleep(w)
            file = tmp_path / "gpus.json"
            seen = [{"uuid": GPU, "pid": sleeper.pid, "used_bytes": USED // 20}]
            file.write_text(json.dumps({**json.loads(file.read_text()), "pids_trusted": trusted, "processes": seen}))
            other = await w.ready(knobs={"mock-memory-bytes": 7 * GIB}, gpu_count=None, gpu_ids=(0,))
            assert await w.chat(other.launch_id) == 200
            with pytest.raises(GpuConflict, match=other.launch_id):
                await w.supervisor.wake(sleeper.launch_id)
            assert w.supervisor.get(sleeper.launch_id).state == "asleep"
            await w.supervisor.stop(other.launch_id)
            assert w.gpus.unsettled == {}
            await w.supervisor.wake(sleeper.launch_id)
            assert await w.chat(sleeper.launch_id) == 200

    run(scenario())


def test_it_does_not_wake_onto_what_others_use(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await asleep(w)
            file = tmp_path / "gpus.json"
            state = json.loads(file.read_text())
            file.write_text(json.dumps({**state, "used": {GPU: 40 * GIB}}))
            with pytest.raises(GpuConflict, match="GPU 0 has"):
                await w.supervisor.wake(view.launch_id)
            file.write_text(json.dumps({**state, "fail": "memory"}))
            with pytest.raises(GpuUnknown):
                await w.supervisor.wake(view.launch_id)
            file.write_text(json.dumps(state))
            assert (await w.supervisor.wake(view.launch_id)).state == "ready"

    run(scenario())


def test_killed_asleep_it_has_failed_and_is_not_restarted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await asleep(w, restart_policy="always")
            other = await w.ready(knobs={"mock-memory-bytes": 7 * GIB}, gpu_count=None, gpu_ids=(0,))
            assert view.pid is not None
            os.kill(view.pid, signal.SIGKILL)
            view = await w.until(view.launch_id, "failed")
            assert view.attempt == 1
            assert w.ledger.owners(GPU) == (other.launch_id,)
            assert await w.store.parked() == {}
            last = (await w.supervisor.events(view.launch_id, 0, 100))[-1]
            assert "it slept" in str(last.detail["restart"])
            assert await w.chat(other.launch_id) == 200

    run(scenario())


def test_stopped_asleep_it_is_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await asleep(w)
            outcome = await w.supervisor.stop(view.launch_id)
            assert (outcome.state, outcome.unsettled_gpus) == ("stopped", ())
            assert used(tmp_path) == 0
            assert await w.store.parked() == {}
            assert w.ledger.parked_on(GPU) == ()

    run(scenario())


@pytest.mark.parametrize("knob", ["sleep-seconds", "wake-seconds"])
def test_a_stop_comes_through_while_it_falls_asleep_or_wakes(tmp_path: Path, knob: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await ready(w, knobs={knob: 60})
            name = view.launch_id
            if knob == "sleep-seconds":
                resting = background(w.supervisor.sleep(name, 1))
                await w.until(name, "falling_asleep")
            else:
                await w.supervisor.sleep(name, 1)
                resting = background(w.supervisor.wake(name))
                await w.until(name, "waking")
                assert w.ledger.owners(GPU) == (name,)
            assert w.adverts[name].instance is None
            assert (await w.supervisor.stop(name)).state == "stopped"
            with pytest.raises(Conflict):
                await resting
            assert await w.store.claims() == {}
            assert await w.store.parked() == {}

    run(scenario())


def test_a_new_daemon_finds_it_asleep_and_wakes_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = world(tmp_path)
        async with first_life(first) as w:
            view = await asleep(w, level=2)
        async with await first.restart() as w:
            name = view.launch_id
            found = w.supervisor.get(name)
            assert (found.state, found.pid) == ("asleep", view.pid)
            assert w.ledger.parked_on(GPU) == (name,)
            assert w.ledger.residue_bytes(GPU) == used(tmp_path) > 0
            assert w.ledger.owners(GPU) == ()
            assert (await w.supervisor.wake(name)).state == "ready"
            assert await w.chat(name) == 200
            assert w.ledger.owners(GPU) == (name,)

    run(scenario())


@pytest.mark.parametrize(("knob", "state"), [("sleep-seconds", "falling_asleep"), ("wake-seconds", "waking")])
def test_a_daemon_that_dies_half_way_leaves_it_to_the_next(tmp_path: Path, knob: str, state: str) -> None:
    async def scenario() -> None:
        first = world(tmp_path)
        async with first_life(first) as w:
            view = await ready(w, knobs={knob: 1.5})
            name = view.launch_id
            if state == "waking":
                await w.supervisor.sleep(name, 1)
            resting = background(w.supervisor.wake(name) if state == "waking" else w.supervisor.sleep(name, 1))
            begun = "wake_begun" if state == "waking" else "sleep_begun"
            await eventually(lambda: any(event.event == begun for event in w.told))
            resting.cancel()
        async with await first.restart() as w:
            assert w.supervisor.get(name).state == state
            assert w.ledger.owners(GPU) == (name,)
            await w.until(name, "ready")
            assert await w.chat(name) == 200
            await eventually(lambda: any(e.event in {"woke", "stayed_awake"} for e in w.told))
            assert used(tmp_path) == USED

    run(scenario())


def test_one_that_died_asleep_while_nobody_watched_has_failed(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = world(tmp_path)
        async with first_life(first) as w:
            view = await asleep(w)
        assert view.pid is not None
        os.kill(view.pid, signal.SIGKILL)
        async with await first.restart() as w:
            await w.until(view.launch_id, "failed")
            await eventually(lambda: any(e.to_state == "failed" for e in w.told))
            assert await w.store.parked() == {}

    run(scenario())


def test_level_2_is_for_models_that_can_be_compared(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await ready(w, sleep=2, knobs={"tasks": "embed"})
            with pytest.raises(SleepFailed, match="continue texts"):
                await w.supervisor.sleep(view.launch_id, 2)
            assert (await w.supervisor.sleep(view.launch_id, 1)).state == "asleep"
            assert (await w.supervisor.wake(view.launch_id)).state == "ready"

    run(scenario())


def test_it_sleeps_on_when_another_daemon_has_its_gpu(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            view = await asleep(w)
            attempt = w.supervisor._owners[view.launch_id].attempt
            assert attempt is not None
            shim = attempt._shim
            assert shim is not None
            locking = shim.lock_gpus

            async def refuse() -> None:
                raise ShimRefused("GPU-mock-0 is held by another daemon", "gpu_locked")

            shim.lock_gpus = refuse  # type: ignore[method-assign]
            with pytest.raises(WakeFailed, match="held by another daemon"):
                await w.supervisor.wake(view.launch_id)
            assert w.supervisor.get(view.launch_id).state == "asleep"
            assert w.ledger.parked_on(GPU) == (view.launch_id,)
            assert w.ledger.residue_bytes(GPU) == used(tmp_path)
            assert await w.store.claims() == {}
            shim.lock_gpus = locking  # type: ignore[method-assign]
            assert (await w.supervisor.wake(view.launch_id)).state == "ready"

    run(scenario())


def test_a_sleep_waits_for_a_start_on_the_same_gpu(tmp_path: Path) -> None:
    """An engine that starts there measures how much is free: nothing may change meanwhile."""

    async def scenario() -> None:
        async with world(tmp_path) as w:
            half = {"gpu_count": None, "gpu_ids": (0,), "gpu_share": 0.5}
            knobs = {"mock-memory-bytes": USED, "sleep-seconds": 0.5}
            view = await w.ready(sleep=1, knobs=knobs, **half)
            other = await w.launch(knobs={"boot-delay": 1.5}, **half)
            await eventually(lambda: w.supervisor.get(other.launch_id).pid is not None)
            sleeping = background(w.supervisor.sleep(view.launch_id, 1))
            await w.until(other.launch_id, "ready")
            assert (await sleeping).state == "asleep"
            at = {event.event: event.at for event in w.told if event.event in {"became_ready", "fell_asleep"}}
            assert at["became_ready"] < at["fell_asleep"]

    run(scenario())
