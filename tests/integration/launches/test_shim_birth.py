"""How a shim and its engine come to be: identity first, nothing inherited, refusals that say why, locks on GPUs."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import orphans
from tests.support.aio import eventually, run
from tests.support.shims import LAUNCH, TREE, Box, all_dead, python, within
from vllm_bootstrap.launches.process import ProcessHost, ShimLost, ShimRefused, ShimSpawnFailed
from vllm_bootstrap.launches.shim import procfs
from vllm_bootstrap.launches.types import ProcessIdentity, ShimHandle

SLEEP = ("sleep", "60")
NOBODY = 65534


@pytest.fixture
def box(tmp_path):
    box = Box(tmp_path / "b")
    yield box
    assert box.left() == []
    assert orphans.cgroups(LAUNCH) == []


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def parent_of(pid: int) -> int:
    return int(status_of(pid)["PPid"])


def test_identity_is_written_before_anything_is_started(box):
    async def main():
        async with box.shim() as shim:
            control = box.host.run_dir(LAUNCH, 1) / "shim"
            written = json.loads((control / "identity.json").read_text())
            identity = shim.handle.identity
            assert written["pid"] == identity.pid
            assert (written["start_ticks"], written["boot_id"]) == (identity.start_ticks, identity.boot_id)
            assert (written["state_id"], written["launch_id"], written["attempt"]) == (box.state_id, LAUNCH, 1)
            assert written["protocol"] == shim.handle.protocol
            assert shim.engine is None
            assert not (control / "engine.json").exists()
            assert stat.S_IMODE(control.stat().st_mode) == 0o700
            assert stat.S_IMODE((control / "control.sock").stat().st_mode) == 0o600
            assert os.getsid(identity.pid) == identity.pid

    run(main())


def test_shim_knows_no_secret_and_stays_small(box, monkeypatch):
    monkeypatch.setenv("VLLM_ACCESS_KEY", "the-admin-key")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_daemon")

    async def main():
        host = box.new_host(python=None)  # not measured: coverage would be most of its memory
        shim = await host.spawn(LAUNCH, 1)
        try:
            await shim.go(box.order(SLEEP, env={"PATH": os.environ["PATH"], "HF_TOKEN": "hf_of_the_engine"}))
            proc = Path(f"/proc/{shim.handle.identity.pid}")
            names = {entry.partition("=")[0] for entry in (proc / "environ").read_text().split("\0") if entry}
            assert names <= {"PATH", "LD_LIBRARY_PATH", "LC_ALL", "MALLOC_ARENA_MAX", "VBS_LAUNCH"}
            assert "hf_" not in (proc / "cmdline").read_text() + Path(f"/proc/{shim.engine.pid}/cmdline").read_text()
            assert int(status_of(shim.handle.identity.pid)["VmRSS"].removesuffix(" kB")) < 15_000
        finally:
            await host.kill_marked(LAUNCH, 1)
            shim.close()

    run(main())


def test_engine_inherits_nothing_but_its_order(box):
    leak = os.dup(2)
    os.set_inheritable(leak, True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    before = resource.getrlimit(resource.RLIMIT_CORE)

    async def main():
        async with box.shim() as shim:
            engine = await shim.go(box.order(SLEEP, env={"PATH": os.environ["PATH"], "MINE": "1"}))
            proc = Path(f"/proc/{engine.pid}")
            assert {entry.name for entry in (proc / "fd").iterdir()} == {"0", "1", "2"}
            assert (proc / "fd" / "0").readlink() == Path(os.devnull)
            environ = dict(e.split("=", 1) for e in (proc / "environ").read_text().split("\0") if e)
            environ.pop("COVERAGE_PROCESS_CONFIG", None)
            assert environ == {
                "PATH": os.environ["PATH"], "MINE": "1", "SPT_NOENV": "1",
                "TMPDIR": str(box.host.run_dir(LAUNCH, 1) / "tmp"), "VBS_LAUNCH": f"{box.state_id}/{LAUNCH}/1",
            }  # fmt: skip
            status = status_of(engine.pid)
            own_of_libc = 1 << 31 | 1 << 32  # signals 32 and 33, which posix_spawn itself leaves ignored
            assert int(status["SigIgn"], 16) & ~own_of_libc == int(status["SigBlk"], 16) == 0
            assert os.getpgid(engine.pid) == engine.pid
            assert os.getsid(engine.pid) == shim.handle.identity.pid
            limits = (proc / "limits").read_text()
            core = next(line.split()[4] for line in limits.splitlines() if line.startswith("Max core"))
            assert core == ("unlimited" if before[0] == resource.RLIM_INFINITY else str(before[0]))
            assert "Max core file size        0 " in Path(f"/proc/{shim.handle.identity.pid}/limits").read_text()

    try:
        run(main())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(leak)


def test_engine_lives_in_a_cgroup_of_its_own_where_there_is_one(box):
    async def main():
        async with box.shim() as shim:
            pids = await box.tree(shim)
            leaves = orphans.cgroups(LAUNCH)
            where = {pid: Path(f"/proc/{pid}/cgroup").read_text() for pid in [shim.handle.identity.pid, *pids]}
            in_leaf = {pid for pid, text in where.items() if f"vbs-{LAUNCH}.1" in text}
            assert in_leaf == (set(pids) if leaves else set())

    run(main())


def test_spawning_leaks_no_descriptor_and_no_task(box):
    async def main():
        async with box.shim() as shim:  # what the first use of everything opens
            await shim.go(box.order(("true",)))
            await shim.wait()
        descriptors, tasks = open_descriptors(), len(asyncio.all_tasks())
        for attempt in range(2, 5):
            async with box.shim(attempt) as shim:
                await shim.go(box.order(("true",), attempt))
                assert (await shim.wait()).exit_code == 0
        assert open_descriptors() == descriptors
        await eventually(lambda: len(asyncio.all_tasks()) == tasks)

    run(main())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"argv": ("/no/such/program",)}, "spawn_failed", "program /no/such/program: No such file or directory"),
        ({"cwd": "/no/such/folder"}, "spawn_failed", "working directory /no/such/folder"),
        ({"tmp_dir": "/proc/no"}, "spawn_failed", "/proc/no"),
        ({"argv": ()}, "bad_order", "no command"),
        ({"cwd": "relative"}, "bad_order", "not absolute"),
        ({"log_max_bytes": "many"}, "bad_order", "cannot be read"),
        ({"gpu_locks": ("../../etc",), "lock_dir": "/tmp"}, "spawn_failed", "not a GPU UUID"),
    ],
)
def test_refused_starts_say_why_and_leave_a_record(box, change, kind, words):
    async def main():
        async with box.shim() as shim:
            with pytest.raises(ShimRefused, match=words) as caught:
                await shim.go(replace(box.order(SLEEP), **change))
            assert caught.value.kind == kind
            record = await within(3, shim.wait())
            assert words in record.error
            assert (record.exit_code, record.signal, record.stop_requested) == (None, None, False)
            assert not shim.main_exited.done()

    run(main())


def test_an_engine_is_started_once_and_only_by_the_daemon_that_made_the_shim(box):
    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(SLEEP))
            with pytest.raises(ShimRefused) as caught:
                await shim.go(box.order(SLEEP))
            assert caught.value.kind == "already_started"
            adopted = await box.new_host().adopt(shim.handle)
            with pytest.raises(ShimRefused) as caught:
                await adopted.go(box.order(SLEEP))
            assert caught.value.kind == "not_yours"
            adopted.close()

    run(main())


def test_log_folder_that_cannot_be_written_stops_no_engine(box):
    box.folder.joinpath("logs").write_text("in the way")

    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(python("print('x' * 1000)")))
            assert (await within(3, shim.wait())).exit_code == 0

    run(main())


def test_spawn_says_what_went_wrong(box):
    async def main():
        broken = [
            box.new_host(python=["/no/such/python"]),
            box.new_host(python=[sys.executable, "-c", "raise SystemExit('the interpreter is broken')"]),
            *(box.new_host(python=[sys.executable, "-c", BABBLE, text]) for text in BABBLES),
        ]
        words = ["No such file", "the interpreter is broken", "did not start", "cannot be understood", "answers where"]
        words += ["protocol 99 is not supported"]
        for number, (host, text) in enumerate(zip(broken, words, strict=True), 1):
            with pytest.raises(ShimSpawnFailed, match=text):
                await host.spawn(LAUNCH, number)
            host.cleanup(LAUNCH, number)

    run(main())


BABBLE = "import os, sys; os.read(0, 1000); os.write(0, sys.argv[1].encode() + b'\\n'); os.read(0, 1)"
HELLO = {
    "id": 1, "ok": True, "protocol": 1, "launch_id": LAUNCH, "attempt": 1, "phase": "waiting", "engine": None,
    "main": None, "identity": {"pid": 1, "start_ticks": 1, "boot_id": ""},
}  # fmt: skip
BABBLES = ("this is no JSON", '{"id": 1, "ok": true}', json.dumps(HELLO), json.dumps({**HELLO, "protocol": 99}))


def test_a_cancelled_spawn_leaves_nothing(box):
    async def main():
        for moment in (0.0, 0.01, 0.02, 0.04):
            spawning = asyncio.create_task(box.host.spawn(LAUNCH, 1))
            await asyncio.wait([spawning], timeout=moment)
            spawning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await spawning).close()
            await eventually(lambda: orphans.marked(box.state_id) == [])
            await box.host.sweep(set())
            assert list(box.runtime_dir.glob("*")) == []

    run(main())


def test_run_dirs_are_never_used_twice_nor_shared_with_strangers(box):
    async def main():
        async with box.shim():
            with pytest.raises(ShimSpawnFailed):
                await box.host.spawn(LAUNCH, 1)
        box.runtime_dir.chmod(0o777)
        with pytest.raises(ShimSpawnFailed, match="only this user"):
            await box.host.spawn(LAUNCH, 1)
        box.runtime_dir.chmod(0o700)

    run(main())
    with pytest.raises(ValueError, match="slashes"):
        ProcessHost(box.runtime_dir, "a/b")


def test_long_runtime_dirs_work(tmp_path):
    box = Box(tmp_path / ("long" * 20) / ("name" * 10))

    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(SLEEP))
            adopted = await box.new_host().adopt(shim.handle)
            await adopted.stop(1)
            assert (await within(3, adopted.wait())).signal == signal.SIGTERM
            adopted.close()

    run(main())
    assert box.left() == []


def test_half_made_run_dirs_are_swept(box):
    async def main():
        ours = box.runtime_dir / f".new-{box.state_id}-{LAUNCH}.7"
        others = box.runtime_dir / f".new-other-{LAUNCH}.7"
        ours.mkdir(parents=True)
        others.mkdir()
        assert await box.host.sweep(set()) == []
        assert [path.name for path in box.runtime_dir.iterdir()] == [others.name]

    run(main())


# -- the daemon goes away before "go" ---------------------------------------------------------------------------------

DAEMON = """
import asyncio, os, sys
from dataclasses import asdict
from pathlib import Path
from tests.support.shims import *
async def main():
    box = Box(Path(sys.argv[1]))
    box.state_id = sys.argv[2]
    box.host = box.new_host()
    shim = await box.host.spawn(LAUNCH, 1)
    if sys.argv[3] == "go":
        await box.tree(shim, "tidy")
    print(json.dumps(asdict(shim.handle)), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def daemon(box: Box, until: str) -> tuple[asyncio.subprocess.Process, dict]:
    """Another process that spawns a shim; the handle it says."""
    root = Path(__file__).resolve().parents[3]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, str(box.folder), box.state_id, until, cwd=root, stdout=asyncio.subprocess.PIPE
    )
    return process, json.loads(await process.stdout.readline())


def test_a_shim_ends_when_its_daemon_is_killed_before_go(box):
    async def main():
        process, handle = await daemon(box, "spawned")
        process.kill()
        await process.wait()
        await all_dead([handle["identity"]["pid"]])
        assert await box.host.sweep(set()) == []
        assert list(box.runtime_dir.iterdir()) == []

    run(main())


def test_a_shim_outlives_its_daemon_after_go(box):
    async def main():
        process, raw = await daemon(box, "go")
        process.kill()
        await process.wait()
        pid = raw["identity"]["pid"]
        await eventually(lambda: parent_of(pid) != process.pid)
        handle = shim_handle(raw)
        shim = await box.host.adopt(handle)
        assert shim.engine is not None
        assert (await shim.status())["phase"] == "running"
        await shim.stop(5)
        assert (await within(3, shim.wait())).exit_code == 3
        assert box.host.exit_record(handle).exit_code == 3
        box.host.cleanup(LAUNCH, 1)
        shim.close()

    run(main())


def shim_handle(raw: dict) -> ShimHandle:
    return ShimHandle(**{**raw, "identity": ProcessIdentity(**raw["identity"])})


def test_a_shim_whose_first_connection_closes_before_go_is_lost_to_go(box):
    async def main():
        async with box.shim() as shim:
            os.kill(shim.handle.identity.pid, signal.SIGKILL)
            with pytest.raises(ShimLost):
                await shim.go(box.order(SLEEP))

    run(main())


# -- another user, GPUs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop", "kill -9 of the shim"])
def test_engine_runs_as_the_user_it_was_told_and_dies_with_its_shim(box, end):
    uid = NOBODY if os.geteuid() == 0 else os.geteuid()
    code = "import os, time; print(os.getresuid(), os.getcwd(), os.path.isdir(os.environ['TMPDIR']), flush=True)"
    code += "; open(os.environ['TMPDIR'] + '/mine', 'w'); print('made', flush=True); time.sleep(60)"
    for folder in (box.folder, box.folder.parent, box.folder.parent.parent, box.folder.parents[2]):
        folder.chmod(folder.stat().st_mode | 0o111)

    async def main():
        async with box.shim() as shim:
            run_dir = box.host.run_dir(LAUNCH, 1)
            order = box.order(("/usr/bin/python3", "-c", code), uid=uid, gid=uid if uid == NOBODY else None)
            await shim.go(order)
            await box.says("made")
            assert box.text().startswith(f"({uid}, {uid}, {uid}) / True\n")
            assert stat.S_IMODE((run_dir / "shim").stat().st_mode) == 0o700
            if end == "stop":
                await shim.stop(5)
                assert (await within(3, shim.wait())).signal == signal.SIGTERM
            else:
                os.kill(shim.handle.identity.pid, signal.SIGKILL)
            await all_dead([shim.engine.pid])

    run(main())


def test_two_daemons_never_both_own_a_gpu(box):
    other = Box(box.folder / "other")
    gpu = {"lock_dir": str(box.locks), "gpu_locks": ("GPU-b", "GPU-a"), "lock_owner": box.state_id}
    theirs = {**gpu, "lock_owner": other.state_id, "gpu_locks": ("GPU-b", "GPU-c")}

    async def main():
        async with box.shim() as shim, other.shim() as rival:
            await shim.go(box.order(SLEEP, **gpu))
            with pytest.raises(ShimRefused, match=f"GPU-b is held by launch {LAUNCH} of another daemon") as caught:
                await rival.go(other.order(SLEEP, **theirs))
            assert caught.value.kind == "gpu_locked"
            await eventually(lambda: orphans.locked(box.locks) == ["GPU-a.lock", "GPU-b.lock"])
            os.kill(shim.handle.identity.pid, signal.SIGKILL)
            await box.host.kill_marked(LAUNCH, 1)
            assert orphans.locked(box.locks) == []
        async with other.shim(2) as rival:
            await rival.go(other.order(SLEEP, 2, **theirs))

    run(main())


def test_launches_of_one_daemon_share_a_gpu_when_told_so(box):
    gpu = {"lock_dir": str(box.locks), "gpu_locks": ("GPU-a",), "lock_owner": box.state_id, "shared": True}

    async def main():
        async with box.shim(1) as first, box.shim(2) as second, box.shim(3) as alone, box.shim(4) as stranger:
            await first.go(box.order(SLEEP, 1, **gpu))
            await second.go(box.order(SLEEP, 2, **gpu))
            with pytest.raises(ShimRefused, match="of this daemon"):
                await alone.go(box.order(SLEEP, 3, **{**gpu, "shared": False}))
            with pytest.raises(ShimRefused, match="of another daemon"):
                await stranger.go(box.order(SLEEP, 4, **{**gpu, "lock_owner": "another"}))

    run(main())


def test_a_sleeping_engines_gpus_may_be_anothers_until_it_wakes(box):
    other = Box(box.folder / "other")
    gpu = {"lock_dir": str(box.locks), "gpu_locks": ("GPU-a", "GPU-b"), "lock_owner": box.state_id}
    theirs = {**gpu, "lock_owner": other.state_id, "gpu_locks": ("GPU-b",)}

    async def main():
        async with box.shim() as shim, other.shim() as rival:
            await shim.go(box.order(SLEEP, **gpu))
            assert shim.can_unlock
            assert (await shim.status())["locked"] is True
            await shim.unlock_gpus()
            await shim.unlock_gpus()
            assert (await shim.status())["locked"] is False
            assert orphans.locked(box.locks) == []
            await rival.go(other.order(SLEEP, **theirs))
            with pytest.raises(ShimRefused, match=f"GPU-b is held by launch {LAUNCH} of another daemon") as caught:
                await shim.lock_gpus()
            assert caught.value.kind == "gpu_locked"
            assert orphans.locked(box.locks) == ["GPU-b.lock"]
            await rival.stop(0, force=True)
            await within(5, rival.wait())
            await shim.lock_gpus()
            await shim.lock_gpus()
            assert orphans.locked(box.locks) == ["GPU-a.lock", "GPU-b.lock"]

    run(main())


def test_a_shim_does_not_wait_for_others_that_take_locks(box):
    gpu = {"lock_dir": str(box.locks), "gpu_locks": ("GPU-a",), "lock_owner": box.state_id}

    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(SLEEP, **gpu))
            await shim.unlock_gpus()
            gate = os.open(box.locks / "gate", os.O_RDWR)
            fcntl.flock(gate, fcntl.LOCK_EX)
            locking = asyncio.create_task(shim.lock_gpus())
            assert (await within(1, shim.status()))["locked"] is False
            os.close(gate)
            await within(3, locking)
            assert (await shim.status())["locked"] is True

    run(main())


# -- the control socket -----------------------------------------------------------------------------------------------


def ask_for_ever(sock: socket.socket) -> None:
    while True:
        sock.sendall(b'{"id": 1, "op": "status"}\n')


def connect(box: Box) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(box.host.run_dir(LAUNCH, 1) / "shim" / "control.sock"))
    sock.settimeout(5)
    return sock


def test_a_peer_that_never_reads_costs_its_connection_only(box):
    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(SLEEP))
            with connect(box) as frozen:
                frozen.settimeout(0.2)
                with pytest.raises(OSError):  # the shim hangs up
                    ask_for_ever(frozen)
                assert (await within(1, shim.status()))["phase"] == "running"

    run(main())


def test_malformed_and_unknown_requests_harm_nothing(box):
    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(SLEEP))
            for text in (b"no JSON\n", b"[1]\n", b"[" * 100_000 + b"\n"):
                with connect(box) as sock:
                    sock.sendall(text)
                    assert sock.recv(100) == b""
            with connect(box) as sock:
                sock.sendall(b'{"id": 1, "op": "dance"}\n{"id": 2, "op": "stop", "grace_s": 1e999}\n')
                with sock.makefile() as lines:
                    answers = [json.loads(lines.readline()) for _ in range(2)]
            assert (answers[0]["ok"], answers[0]["kind"]) == (False, "unknown_op")
            assert (answers[1]["id"], answers[1]["ok"]) == (2, True)
            assert (await within(3, shim.wait())).stop_requested

    run(main())


def test_only_the_same_user_gets_through(box):
    if os.geteuid() != 0:
        return  # the modes, tested above, are all that another user can be tried with from here

    async def main():
        async with box.shim():
            control = box.host.run_dir(LAUNCH, 1) / "shim"
            for path in (control, *control.parents):
                if path.stat().st_mode & 0o001 == 0:
                    path.chmod(0o755)
            (control / "control.sock").chmod(0o666)
            code = (
                f"import os, socket; os.setuid({NOBODY}); s = socket.socket(socket.AF_UNIX); "
                f"s.connect({str(control / 'control.sock')!r}); s.sendall(b'{{}}'); print(s.recv(10))"
            )
            process = await asyncio.create_subprocess_exec(
                "/usr/bin/python3", "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            out, _ = await process.communicate()
            assert b"b''" in out or b"Broken" in out or b"reset" in out

    run(main())


def test_too_many_connections_are_turned_away(box):
    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(SLEEP))
            socks = [connect(box) for _ in range(20)]
            assert any(sock.recv(1) == b"" for sock in socks[-3:])
            for sock in socks:
                sock.close()
            assert (await within(1, shim.status()))["phase"] == "running"

    run(main())


def test_procfs_never_signals_a_process_with_another_start_time(box):
    async def main():
        async with box.shim() as shim:
            engine = await shim.go(box.order(python(TREE, "die", "stay")))
            assert not procfs.send_signal(engine.pid, engine.start_ticks + 1, signal.SIGKILL)
            assert procfs.is_alive(engine.pid, engine.start_ticks)
            assert not procfs.send_signal(2**22 + 1, 1, signal.SIGKILL)

    run(main())
