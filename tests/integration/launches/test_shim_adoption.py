"""Finding shims again: after a restart, a lost connection, a reboot, a reused pid, an upgrade."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from tests.support.aio import eventually, run
from tests.support.shims import LAUNCH, Box, all_dead, python, within
from vllm_bootstrap.launches.exit_watch import ExitWatch
from vllm_bootstrap.launches.process import MainExit, ShimLost, ShimRefused
from vllm_bootstrap.launches.shim import procfs, protocol

SLEEP = ("sleep", "60")
FROZEN_V1 = Path(__file__).resolve().parents[2] / "fixtures" / "shim_v1" / "__main__.py"


@pytest.fixture
def box(tmp_path):
    box = Box(tmp_path / "b", answer_s=0.6)
    yield box
    assert box.left() == []


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_new_daemon_goes_on_with_the_same_engine(box, loop):
    async def main():
        async with box.shim() as shim:
            engine = await shim.go(box.order(SLEEP))
            shim.close()
            again = await box.new_host().adopt(shim.handle)
            assert again.engine == engine
            assert again.handle == shim.handle
            await again.stop(5)
            record = await within(3, again.wait())
            assert (record.signal, record.stop_requested) == (signal.SIGTERM, True)
            assert await again.main_exited == MainExit(None, signal.SIGTERM)
            assert await box.new_host().adopt(shim.handle) is None
            assert box.new_host().exit_record(shim.handle) == record

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


def test_what_happened_meanwhile_is_known_at_adoption(box):
    """Adopted in the moment that the rest of a tree is given to go by itself, or just after it."""

    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim)
            os.kill(pids[0], signal.SIGKILL)
            await within(3, shim.main_exited)
            shim.close()
            again = await box.new_host().adopt(shim.handle)
            if again is not None:  # else it was over already
                assert await within(1, again.main_exited) == MainExit(None, signal.SIGKILL)
                await within(3, again.wait())
                again.close()
            await eventually(lambda: box.host.exit_record(shim.handle) is not None)
            assert box.host.exit_record(shim.handle).signal == signal.SIGKILL

    run(main())


def test_reused_pids_and_other_boots_are_never_touched(box):
    async def main():
        async with box.shim() as shim:
            engine = await shim.go(box.order(SLEEP))
            identity = shim.handle.identity
            wrong_time = replace(shim.handle, identity=replace(identity, start_ticks=identity.start_ticks - 1))
            rebooted = replace(shim.handle, identity=replace(identity, boot_id="00000000-0000"))
            stranger = replace(shim.handle, launch_id="another")
            for handle in (wrong_time, rebooted, stranger):
                assert await box.host.adopt(handle) is None
            assert box.host.exit_record(rebooted) is None
            assert procfs.is_alive(engine.pid, engine.start_ticks)
            assert procfs.is_alive(identity.pid, identity.start_ticks)

    run(main())


def test_after_a_reboot_nothing_is_signalled_because_it_was_written_down(box):
    """Identity and engine files of another boot that name living processes by pid and start time."""

    async def main():
        victim = await asyncio.create_subprocess_exec(*SLEEP, start_new_session=True)
        ticks = procfs.stat(victim.pid).start_ticks
        async with box.shim() as shim:
            control = box.host.run_dir(LAUNCH, 1) / "shim"
            shim.close()
            await eventually(lambda: not procfs.is_alive(shim.handle.identity.pid, shim.handle.identity.start_ticks))
            forged = {"pid": victim.pid, "start_ticks": ticks, "boot_id": "00000000-0000"}
            for name in (protocol.IDENTITY, protocol.ENGINE):
                (control / name).write_text(json.dumps(forged))
            assert await box.host.sweep(set()) == []
        assert victim.returncode is None
        victim.kill()
        await victim.wait()

    run(main())


def test_a_session_founded_by_a_reused_pid_is_a_strangers(box):
    """The identity file names a pid that now founds another session: same pid, other start time, same boot."""

    async def main():
        victim = await asyncio.create_subprocess_exec(*SLEEP, start_new_session=True)
        async with box.shim() as shim:
            control = box.host.run_dir(LAUNCH, 1) / "shim"
            shim.close()
            await eventually(lambda: not procfs.is_alive(shim.handle.identity.pid, shim.handle.identity.start_ticks))
            forged = {"pid": victim.pid, "start_ticks": 1, "boot_id": procfs.boot_id()}
            (control / protocol.IDENTITY).write_text(json.dumps(forged))
            assert not await box.host.kill_marked(LAUNCH, 1)
        assert victim.returncode is None
        victim.kill()
        await victim.wait()

    run(main())


def test_a_lost_connection_to_a_living_shim_is_made_again(box):
    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(SLEEP))
            shim._connection._writer.transport.abort()
            assert (await within(1, shim.status()))["phase"] == "running"
            shim._connection.close()
            await shim.stop(5)
            assert (await within(3, shim.wait())).signal == signal.SIGTERM

    run(main())


def test_a_frozen_shim_counts_as_lost_and_blocks_nobody(box):
    async def main():
        async with box.shim() as shim:
            engine = await shim.go(box.order(SLEEP))
            pid = shim.handle.identity.pid
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(ShimLost, match="does not answer"):
                await within(2, shim.stop(1))
            assert await within(2, box.new_host().adopt(shim.handle)) is None
            assert await box.host.kill_marked(LAUNCH, 1)
            await all_dead([pid, engine.pid])
            assert await within(3, shim.wait()) is None

    run(main())


def test_a_daemon_that_is_frozen_for_a_while_loses_nothing(box):
    """The daemon's side reads nothing while the engine writes and ends: neither shim nor engine waits for it."""
    code = "import sys; [print('line', n) for n in range(20_000)]; print('done')"

    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(python(code)))
            shim._connection._writer.transport.pause_reading()
            await box.says("done")
            await eventually(lambda: box.host.exit_record(shim.handle) is not None)
            shim._connection._writer.transport.resume_reading()
            assert (await within(3, shim.wait())).exit_code == 0
            assert box.log().read(0, 10).content == "line 0\nlin"

    run(main())


def test_waiting_shims_are_not_adopted(box):
    async def main():
        async with box.shim() as shim:
            assert await box.new_host().adopt(shim.handle) is None
            assert await box.host.adopt(replace(shim.handle, run_dir="/no/such")) is None

    run(main())


def test_shims_of_the_first_release_are_adopted_and_stopped(box):
    """A frozen copy of the program: what runs on machines today must be understood by every later daemon."""

    async def main():
        host = box.new_host(python=None, shim=FROZEN_V1)
        shim = await host.spawn(LAUNCH, 1)
        try:
            assert shim.handle.protocol == 1
            pids = await box.tree(shim, "ignore")
            shim.close()
            adopted = await box.new_host().adopt(shim.handle)
            assert adopted.engine.pid == pids[0]
            assert (await adopted.status())["phase"] == "running"
            assert not adopted.can_unlock
            with pytest.raises(ShimRefused, match="does not know"):
                await adopted.unlock_gpus()
            await adopted.stop(30)
            await adopted.stop(0, force=True)
            record = await within(3, adopted.wait())
            assert (record.signal, record.forced, record.stop_requested) == (signal.SIGKILL, True, True)
            assert box.host.exit_record(shim.handle) == record
            await all_dead(pids)
            adopted.close()
        finally:
            assert not await host.kill_marked(LAUNCH, 1)
            host.cleanup(LAUNCH, 1)

    run(main())


def test_supported_versions_include_every_frozen_shim():
    frozen = sorted(int(path.name.removeprefix("shim_v")) for path in FROZEN_V1.parents[1].glob("shim_v*"))
    assert set(frozen) <= set(protocol.SUPPORTED)
    assert protocol.PROTOCOL in protocol.SUPPORTED
    assert max(frozen) >= protocol.PROTOCOL - 1


@pytest.mark.parametrize("how", ["pidfd", "looking"])
def test_exit_watch(how, monkeypatch):
    if how == "looking":
        monkeypatch.delattr(os, "pidfd_open", raising=False)  # as on kernels and in sandboxes without it

    async def main():
        process = await asyncio.create_subprocess_exec(*SLEEP)
        ticks = procfs.stat(process.pid).start_ticks
        watch, idle = ExitWatch(process.pid, ticks), ExitWatch(process.pid, ticks)
        assert not watch.gone.is_set()
        idle.close()
        idle.close()
        assert procfs.send_signal(process.pid, ticks, signal.SIGKILL)
        await within(2, watch.gone.wait())
        assert ExitWatch(process.pid, ticks).gone.is_set()
        watch.close()
        await process.wait()

    run(main())
