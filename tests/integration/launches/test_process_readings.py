"""What is read from ``/proc`` and ``/dev/shm``, with real and badly named processes."""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import signal
import uuid
from pathlib import Path

import pytest

from tests.support import orphans
from tests.support.aio import eventually, run
from tests.support.shims import LAUNCH, Box, python, within
from vllm_bootstrap.launches.shim import cgroup, procfs, protocol, shm, syscalls

SHARED = """
import mmap, os, sys, time
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
if sys.argv[2] == "exit": os._exit(1)
time.sleep(60)
"""


def test_names_full_of_brackets_and_spaces(tmp_path):
    program = tmp_path / "a) Z 1 (b"
    shutil.copy("/bin/sleep", program)

    async def main():
        process = await asyncio.create_subprocess_exec(str(program), "60")
        await eventually(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "a) Z 1 (b\n")
        found = procfs.stat(process.pid)
        assert (found.state, found.ppid, found.session) in {
            ("S", os.getpid(), os.getsid(0)),
            ("R", os.getpid(), os.getsid(0)),
        }
        assert process.pid in procfs.descendants([os.getpid()], procfs.all_processes())
        process.kill()
        await process.wait()

    run(main())


def test_zombies_are_dead():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    run(eventually(lambda: procfs.stat(pid).state == "Z"))
    assert not procfs.is_alive(pid, procfs.stat(pid).start_ticks)
    os.waitpid(pid, 0)
    assert procfs.stat(pid) is None


def test_what_is_not_there():
    assert procfs.stat(2**22 + 1) is None
    assert procfs.environ_value(2**22 + 1, "PATH") is None
    assert procfs.environ_value(os.getpid(), "NO_SUCH_NAME_HERE") is None
    assert protocol.read_json("/no/such/file") is None
    assert syscalls.filesystem_magic("/no/such/file") is None
    assert shm.mapped([2**22 + 1]) == set()
    with pytest.raises(OSError, match="prctl"):
        syscalls.prctl(-1, 0)


def test_without_pidfds_signals_are_sent_by_pid(monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)

    async def main():
        process = await asyncio.create_subprocess_exec("sleep", "60")
        assert procfs.open_pidfd(process.pid) is None
        assert procfs.send_signal(process.pid, procfs.stat(process.pid).start_ticks, signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL

    run(main())


def test_leaves_exist_only_on_cgroup_v2(tmp_path):
    assert cgroup.Leaf.below(str(tmp_path), "x") is None
    assert cgroup.Leaf.below("/no/such", "x") is None
    for path in (None, 5, "/etc", str(tmp_path / "vbs-x"), "/sys"):
        assert cgroup.Leaf.existing(path) is None
    gone = cgroup.Leaf(str(tmp_path / "vbs-gone"))
    gone.kill()
    assert gone.pids() == set()
    assert gone.remove()
    leaf = cgroup.Leaf.create("l.twice")
    if leaf is not None:  # else this machine has none that we may write to
        assert cgroup.Leaf.create("l.twice") is None
        assert cgroup.Leaf.existing(leaf.path).path == leaf.path
        Path(leaf.path, "nested").mkdir()
        assert leaf.remove()
    assert orphans.cgroups("l.twice") == []


def test_shared_memory_is_removed_only_when_seen_mapped_and_unused_now():
    path = Path(f"/dev/shm/psm_test_{uuid.uuid4().hex}")
    name = str(path)
    with path.open("w+b") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
    assert name in shm.mapped([os.getpid()])
    assert name in shm.existing()
    shm.remove_unused({name})
    assert path.exists()
    memory.close()
    shm.remove_unused(set())
    shm.remove_unused({"/dev/shm/../../etc/hostname", "/etc/hostname", "/dev/shm/no_such_file"})
    assert path.exists()
    shm.remove_unused({name})
    assert not path.exists()


def test_shared_memory_is_known_by_its_file_not_by_its_name():
    made, name = (Path(f"/dev/shm/{kind}_test_{uuid.uuid4().hex}") for kind in ("made", "sem.mp"))
    with made.open("w+b") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
    name.hardlink_to(made)
    made.unlink()
    assert str(name) in shm.mapped([os.getpid()])
    memory.close()
    assert str(name) not in shm.mapped([os.getpid()])
    name.unlink()


def test_shared_memory_that_was_there_before_an_engine_stays(tmp_path):
    box, path = Box(tmp_path / "b"), Path(f"/dev/shm/psm_test_{uuid.uuid4().hex}")
    path.write_bytes(b"0" * 4096)

    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(python(SHARED, str(path), "stay")))
            await box.says("mapped")
            os.kill(shim.handle.identity.pid, signal.SIGKILL)
            await shim.wait()
            await box.host.kill_marked(LAUNCH, 1)
            assert path.exists()

    run(main())
    path.unlink()


@pytest.mark.parametrize("how", ["stop", "kill the engine", "kill the shim"])
def test_shared_memory_of_killed_trees_is_removed(tmp_path, how):
    box, name = Box(tmp_path / "b"), f"psm_test_{uuid.uuid4().hex}"

    async def main():
        async with box.shim() as shim:
            path = f"/dev/shm/{name}"
            # The main process starts a child that has the memory mapped, as an engine's workers do.
            code = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
            await shim.go(box.order(python(code, *python(SHARED, path, "stay"))))
            await box.says("mapped")
            assert orphans.shared_memory(name) == [name]
            if how == "stop":
                await shim.stop(0, force=True)
            else:
                os.kill(shim.engine.pid if how == "kill the engine" else shim.handle.identity.pid, signal.SIGKILL)
            await within(5, shim.wait())
            await box.host.kill_marked(LAUNCH, 1)
            assert orphans.shared_memory(name) == []

    run(main())
    assert box.left() == []


def test_files_are_replaced_whole_and_reserved_space_is_used(tmp_path):
    path = str(tmp_path / "file.json")
    protocol.reserve(path)
    protocol.write_json(path, {"a": 1}, durable=True)
    protocol.write_json(path, {"b": "longer than before"})
    assert protocol.read_json(path) == {"b": "longer than before"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    Path(path).write_text('{"torn": ')
    assert protocol.read_json(path) is None
