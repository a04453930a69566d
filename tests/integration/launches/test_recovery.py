"""A daemon that died comes back: every launch is found again or its end is known."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

from tests.support.aio import eventually, run
from tests.support.world import World
from vllm_bootstrap.engines.simulator_engine import SimulatorEngine
from vllm_bootstrap.launches import lifecycle


def test_ready_launch_is_adopted_and_still_serves():
    async def main():
        world = await World().__aenter__()
        view = await world.ready()
        async with await world.restart() as world:
            found = world.supervisor.get(view.launch_id)
            assert (found.state, found.pid, found.attempt) == ("ready", view.pid, 1)
            assert world.ledger.owners("GPU-mock-0") == (view.launch_id,)
            assert await world.chat(view.launch_id) == 200
            outcome = await world.supervisor.stop(view.launch_id)
            assert (outcome.state, outcome.forced) == ("stopped", False)

    run(main())


def test_loading_launch_goes_on_loading():
    async def main():
        world = await World().__aenter__()
        view = await world.launch(knobs={"boot-delay": 1.5})
        await eventually(lambda: world.supervisor.get(view.launch_id).pid is not None)
        pid = world.supervisor.get(view.launch_id).pid
        async with await world.restart() as world:
            view = await world.until(view.launch_id, "ready")
            assert (view.pid, view.attempt) == (pid, 1)

    run(main())


def test_stopping_launch_completes():
    async def main():
        world = await World(stop_grace_s=2).__aenter__()
        view = await world.ready(knobs={"slow-stop": 1})
        await world.supervisor.stop(view.launch_id, wait=False)
        await world.until(view.launch_id, "stopping")
        async with await world.restart() as world:
            found = await world.until(view.launch_id, "stopped")
            assert found.failure is None
            assert world.ledger.owners("GPU-mock-0") == ()

    run(main())


def test_a_stop_that_reached_the_engine_but_not_the_disk_is_still_a_stop():
    async def main():
        world = await World(stop_grace_s=2).__aenter__()
        view = await world.ready(knobs={"slow-stop": 1}, restart_policy="on-failure")

        async def never(*_args, **_kwargs):
            await asyncio.Event().wait()

        world.store.transition = never
        await world.supervisor.stop(view.launch_id, wait=False)
        telling = world.supervisor._owners[view.launch_id].attempt._stopping
        await eventually(lambda: telling and all(task.done() for task in telling.values()))
        assert (await world.store.get(view.launch_id)).phase == lifecycle.READY
        async with await world.restart() as world:
            found = await world.until(view.launch_id, "stopped")
            assert (found.failure, found.attempt) == (None, 1)

    run(main())


def test_an_end_nobody_watched_is_known_by_its_exit_code():
    async def main():
        world = await World().__aenter__()
        view = await world.ready()
        await world.abandon()
        os.kill(view.pid, signal.SIGKILL)
        async with World(world.home) as world:
            found = await world.until(view.launch_id, "failed")
            assert found.failure.failure_class == "killed_by_signal"
            assert found.failure.signal == 9

    run(main())


def test_shim_and_daemon_gone_nothing_survives():
    async def main():
        world = await World().__aenter__()
        view = await world.ready(knobs={"fork-setsid-child": True})
        await world.abandon()
        os.kill(view.shim_pid, signal.SIGKILL)
        async with World(world.home) as world:
            found = await world.until(view.launch_id, "failed")
            assert found.failure.failure_class == "shim_lost"
            assert await world.host.sweep(set()) == []

    run(main())


def test_killed_before_the_handle_was_stored_begins_again():
    async def main():
        world = await World().__aenter__()
        view = await world.launch(knobs={"boot-delay": 1})
        await world.abandon()  # at the very beginning: the attempt has not got far
        async with World(world.home) as world:
            found = await world.until(view.launch_id, "ready", "failed", timeout=25)
            assert found.state == "ready"

    run(main())


def test_after_a_reboot_nothing_is_signalled_and_policy_decides():
    async def main():
        world = await World().__aenter__()
        kept = await world.ready(restart_policy="on-failure")
        lost = await world.ready()
        await world.abandon()
        pids = [kept.pid, lost.pid]
        world = await World(world.home, boot_id="another boot").__aenter__()
        gone = await world.until(lost.launch_id, "failed")
        assert gone.failure.failure_class == "host_rebooted"
        await eventually(lambda: world.supervisor.get(kept.launch_id).attempt == 2)
        # In this test the machine did not really restart: the processes of the first boot must be untouched.
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        await world.supervisor.stop_all(force=True)
        await world.host.kill_marked(kept.launch_id, 1)
        await world.host.kill_marked(lost.launch_id, 1)
        await world.abandon()

    run(main())


def test_pid_reuse_is_never_signalled():
    async def main():
        world = await World().__aenter__()
        view = await world.ready()
        await world.abandon()
        os.kill(view.shim_pid, signal.SIGKILL)
        sleeper = await asyncio.create_subprocess_exec("sleep", "60")
        world = World(world.home)
        # Write the stranger's pid where the shim's was; its start time does not fit.
        from vllm_bootstrap.db import Database  # noqa: PLC0415

        db = Database.open(world.home / "state" / "state.db")
        await db.write(
            lambda conn: conn.execute(
                "UPDATE attempts SET handle = json_set(handle, '$.identity.pid', ?)", (sleeper.pid,)
            )
        )
        db.close()
        async with world:
            await world.until(view.launch_id, "failed")
            assert sleeper.returncode is None
        sleeper.kill()
        await sleeper.wait()

    run(main())


def test_terminal_launches_are_remembered():
    async def main():
        world = await World().__aenter__()
        view = await world.ready()
        await world.supervisor.stop(view.launch_id, force=True)
        async with await world.restart() as world:
            found = world.supervisor.get(view.launch_id)
            assert found.state == lifecycle.State.STOPPED.value
            assert world.supervisor.list(include_ended=False) == []
            assert len(world.supervisor.list(include_ended=True)) == 1

    run(main())


class NewerSimulator(SimulatorEngine):
    """As if what lies on the disk had been replaced: other routes, slots and priority support."""

    def traits(self, spec):
        return replace(super().traits(spec), routes=(), slots=99, priority_header=False, health_path="/new")


def test_a_running_engine_stays_what_it_was_when_another_version_lies_on_the_disk():
    async def main():
        world = await World().__aenter__()
        view = await world.ready(restart_policy="on-failure")
        before = world.adverts[view.launch_id].instance
        world = await world.restart()
        world._engines = {"simulator": NewerSimulator()}
        async with world:
            assert world.adverts[view.launch_id].instance == before
            assert world.supervisor.get(view.launch_id).capacity == before.slots
            os.kill(view.pid, signal.SIGKILL)
            await eventually(lambda: world.supervisor.get(view.launch_id).attempt == 2)
            await eventually(lambda: world.supervisor.get(view.launch_id).pid is not None)
            assert world.supervisor.get(view.launch_id).capacity == 99

    run(main())
