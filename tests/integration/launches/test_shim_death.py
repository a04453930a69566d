"""How trees die: by stop, by force, by themselves, by the death of their shim; never with anything left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support import orphans
from tests.support.aio import eventually, run
from tests.support.shims import LAUNCH, TREE, Box, all_dead, python, within
from vllm_bootstrap.launches.process import MainExit, ShimLost, ShimRefused

# Hides cgroup v2 from the shim in a mount namespace of its own, so that descent is all it can go by.
WITHOUT_CGROUP = 'for m in $(grep " cgroup2 " /proc/self/mounts | cut -d" " -f2); do umount -l "$m"; done; exec "$@"'


@pytest.fixture(params=["as found", "without cgroup"])
def box(request, tmp_path):
    python = None
    if request.param == "without cgroup":
        if os.geteuid() != 0 or shutil.which("unshare") is None:
            # Then cgroups are hardly ever writable, and the other parameter has tried the same way.
            request.param = "as found"
        else:
            inside = [sys.executable, "-I", "-S", "-X", "utf8"]
            python = ["unshare", "--mount", "sh", "-c", WITHOUT_CGROUP, "sh", *inside]
    box = Box(tmp_path / "b", python=python)
    yield box
    assert box.left() == []
    assert orphans.cgroups(LAUNCH) == []
    assert list(box.runtime_dir.iterdir()) == []


def test_stop_asks_the_main_process_only_and_needs_no_force(box):
    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim, "tidy")
            await shim.stop(5)
            record = await within(3, shim.wait())
            assert (record.exit_code, record.signal) == (3, None)
            assert record.stop_requested
            assert not record.forced
            assert "tidying up" in box.text()
            assert "the child got SIGTERM" not in box.text()
            assert await shim.main_exited == MainExit(3, None)
            await all_dead(pids)

    run(main())


def test_ignored_sigterm_ends_in_sigkill_at_the_end_of_the_grace(box):
    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim, "ignore")
            began = time.monotonic()
            await shim.stop(0.3)
            record = await within(3, shim.wait())
            assert time.monotonic() - began >= 0.3
            assert (record.exit_code, record.signal, record.forced) == (None, signal.SIGKILL, True)
            await all_dead(pids)

    run(main())


def test_force_cuts_a_grace_short_and_stop_may_be_repeated(box):
    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim, "ignore")
            await shim.stop(60)
            await shim.stop(90)
            assert (await shim.status())["phase"] == "stopping"
            await shim.stop(0, force=True)
            record = await within(3, shim.wait())
            assert record.forced
            await all_dead(pids)
            await shim.stop(1)  # all over: still accepted

    run(main())


def test_a_later_stop_never_lengthens_the_grace(box):
    async def main():
        async with box.shim() as shim:
            await box.tree(shim, "ignore")
            await shim.stop(0.3)
            await shim.stop(60)
            await within(3, shim.wait())

    run(main())


@pytest.mark.parametrize("how", ["exit 0", "killed"])
def test_when_the_main_process_dies_the_rest_is_taken_down(box, how):
    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim, then="exit" if how == "exit 0" else "stay")
            if how == "killed":
                os.kill(pids[0], signal.SIGKILL)
            main_exit = await within(3, shim.main_exited)
            record = await within(3, shim.wait())
            assert main_exit == (MainExit(0, None) if how == "exit 0" else MainExit(None, signal.SIGKILL))
            assert not record.stop_requested
            assert record.forced
            assert box.host.exit_record(shim.handle) == record
            await all_dead(pids)
            assert not await box.host.kill_marked(LAUNCH, 1)

    run(main())


def test_a_stop_after_the_death_does_not_make_it_a_stop(box):
    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim)
            os.kill(pids[0], signal.SIGKILL)
            await within(3, shim.main_exited)
            await shim.stop(60)
            await shim.stop(0, force=True)
            record = await within(3, shim.wait())
            assert (record.signal, record.stop_requested) == (signal.SIGKILL, False)

    run(main())


def test_sigterm_to_the_shim_is_a_stop(box):
    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim, "tidy")
            os.kill(shim.handle.identity.pid, signal.SIGTERM)
            record = await within(3, shim.wait())
            assert (record.exit_code, record.stop_requested) == (3, True)
            await all_dead(pids)

    run(main())


def test_killed_shim_takes_the_main_process_with_it_and_the_sweep_finds_the_rest(box):
    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim, "ignore")
            os.kill(shim.handle.identity.pid, signal.SIGKILL)
            assert await within(3, shim.wait()) is None
            assert await within(3, shim.main_exited) == MainExit(None, None)
            await all_dead(pids[:1])
            assert orphans.marked(box.state_id) == sorted(pids[1:])
            with pytest.raises(ShimLost):
                await shim.stop(1)
            assert box.host.exit_record(shim.handle) is None
            assert await box.host.kill_marked(LAUNCH, 1)
            await all_dead(pids)

    run(main())


def test_sweep_ends_what_nobody_knows_and_spares_what_is_kept(box):
    async def main():
        async with box.shim(1) as lost, box.shim(2) as kept:
            pids = await box.tree(lost, "ignore", attempt=1)
            other = await box.tree(kept, attempt=2)
            os.kill(lost.handle.identity.pid, signal.SIGKILL)
            await lost.wait()
            stranger = Box(box.folder / "other")
            assert await stranger.host.sweep(set()) == []
            (swept,) = await box.new_host().sweep({(LAUNCH, 2)})
            assert (swept.launch_id, swept.attempt, swept.gone) == (LAUNCH, 1, True)
            assert set(pids[1:]) <= set(swept.pids)
            await all_dead(pids)
            assert not box.host.run_dir(LAUNCH, 1).exists()
            assert not any(orphans.is_dead(pid) for pid in other)

    run(main())


def test_sweep_also_ends_a_shim_that_is_alive_but_unknown(box):
    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim)
            shim.close()
            (swept,) = await box.new_host().sweep(set())
            assert {*pids, shim.handle.identity.pid} == set(swept.pids)
            await all_dead(swept.pids)

    run(main())


def test_children_that_drop_the_marker_are_found_through_session_or_descent(box):
    # `env -i` takes the marker away; the process stays in the shim's session.
    code = (
        "import os, sys\nprint(os.getpid(), flush=True)\n"
        "if os.fork() == 0: os.execve('/bin/sleep', ['sleep', '60'], {})\nos.wait()"
    )

    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(python(code)))
            await box.says("\n")
            children = Path(f"/proc/{shim.engine.pid}/task/{shim.engine.pid}/children")
            await eventually(lambda: children.read_text().split())
            sleeper = int(children.read_text())
            await eventually(lambda: Path(f"/proc/{sleeper}/environ").read_text() == "")
            os.kill(shim.handle.identity.pid, signal.SIGKILL)
            await shim.wait()
            assert await box.host.kill_marked(LAUNCH, 1)
            await all_dead([sleeper])

    run(main())


def test_stop_before_go_refuses_the_start(box):
    async def main():
        async with box.shim() as shim:
            await shim.stop(1)
            with pytest.raises(ShimRefused) as caught:
                await shim.go(box.order(python(TREE, "die", "stay")))
            assert caught.value.kind == "stopping"
            record = await within(3, shim.wait())
            assert (record.exit_code, record.signal, record.error, record.stop_requested) == (None, None, None, True)

    run(main())


def test_stop_while_going(box):
    async def main():
        async with box.shim() as shim:
            going = asyncio.create_task(shim.go(box.order(python(TREE, "ignore", "stay"))))
            await shim.stop(0.1)
            with contextlib.suppress(ShimRefused):  # whichever came first
                await going
            assert await within(3, shim.wait()) is not None

    run(main())


def test_a_fault_in_the_shim_itself_leaves_no_orphan(box):
    box.host = box.new_host(shim=Path(__file__).resolve().parents[2] / "support" / "faulty_shim.py")

    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim, "ignore")
            await shim.stop(60)
            record = await within(3, shim.wait())
            assert record.error == "the shim failed: RuntimeError('injected')"
            assert record.signal == signal.SIGKILL
            await all_dead(pids)
            assert "RuntimeError: injected" in (box.host.run_dir(LAUNCH, 1) / "shim" / "errors.log").read_text()

    run(main())


def test_random_deaths_leave_nothing(box):
    ways = ["stop", "force", "kill main", "kill shim", "soft then force", "sigterm"]

    async def one(attempt: int) -> None:
        chance = random.Random(attempt)
        async with box.shim(attempt) as shim:
            argv = python(TREE, chance.choice(["ignore", "die", "tidy"]), chance.choice(["stay", "stay", "exit"]))
            engine = await shim.go(box.order(argv, attempt))
            delay = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(chance.random() * 0.06, delay.set_result, None)
            await delay
            await die(shim, engine, chance.choice(ways))
            await within(5, shim.wait())

    def send(shim, pid: int, number: int) -> None:
        # Once the end is told the pid may be anybody's; before that the process may be gone all the same.
        if not shim.main_exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def die(shim, engine, way: str) -> None:
        if way == "kill main":
            send(shim, engine.pid, signal.SIGKILL)
        elif way in ("kill shim", "sigterm"):
            send(shim, shim.handle.identity.pid, signal.SIGKILL if way == "kill shim" else signal.SIGTERM)
        else:
            await shim.stop(0.05, force=way == "force")
            if way == "soft then force":
                await shim.stop(0, force=True)

    async def main():
        for attempt in range(0, 15, 3):
            await asyncio.gather(*(one(attempt + number) for number in range(3)))

    run(main())
