"""What must not happen to the others when one launch, or the disk, is in trouble."""

from __future__ import annotations

import asyncio

from tests.support.aio import eventually, run
from tests.support.world import World
from vllm_bootstrap.engines import probe
from vllm_bootstrap.engines.simulator_engine import SimulatorEngine
from vllm_bootstrap.errors import StorageFull
from vllm_bootstrap.launches import supervisor


class CannotBeCommanded(SimulatorEngine):
    name = "broken"

    def command(self, spec, placement, context):
        raise ValueError("a bug in this engine's command line")


class CannotBeRead(SimulatorEngine):
    """Its log parser has a bug."""

    name = "unreadable"

    def progress(self, line):
        raise RuntimeError("a bug in reading log lines")


def test_a_bug_in_starting_one_launch_fails_that_launch_only():
    async def main():
        async with World(engines={"broken": CannotBeCommanded()}) as world:
            healthy = await world.ready()
            view = await world.launch(engine="broken")
            view = await world.until(view.launch_id, "failed")
            assert view.failure.failure_class == "spawn_failed"
            assert "a bug in this engine" in view.failure.message
            assert world.fatal == []
            assert await world.chat(healthy.launch_id) == 200

    run(main())


def test_a_log_that_cannot_be_read_for_progress_does_not_hinder_the_start():
    async def main():
        async with World(engines={"unreadable": CannotBeRead()}) as world:
            view = await world.ready(engine="unreadable")
            assert view.state == "ready"
            assert world.fatal == []

    run(main())


def test_an_engine_that_cannot_be_watched_is_ended_and_says_so(monkeypatch):
    async def broken(*_args, **_kwargs):
        raise ValueError("a bug in watching")

    monkeypatch.setattr(probe, "ready", broken)

    async def main():
        async with World() as world:
            view = await world.launch()
            view = await world.until(view.launch_id, "failed")
            assert "could not be watched" in view.failure.message
            assert world.ledger.owners("GPU-mock-0") == ()
            assert world.fatal == []

    run(main())


def test_shutting_down_does_not_wait_for_a_full_disk(monkeypatch):
    monkeypatch.setattr(supervisor, "WRITING_PATIENCE_S", 0.5)

    async def main():
        world = await World().__aenter__()
        view = await world.ready()

        async def full(*_args, **_kwargs):
            raise StorageFull("no room")

        world.store.transition = full
        await asyncio.wait_for(world.supervisor.stop_all(), 7)
        async with await world.restart() as following:
            found = await following.until(view.launch_id, "stopped")
            assert found.failure is None
            await eventually(lambda: list((world.home / "run").iterdir()) == [], 5)

    run(main())
