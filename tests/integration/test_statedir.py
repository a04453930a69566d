from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_bootstrap.statedir import AlreadyRunning, StateLock, filesystem_type, is_network_type

HOLDER = """
import signal, sys
from pathlib import Path
from vllm_bootstrap.statedir import StateLock
lock = StateLock(Path(sys.argv[1]))
print("held", flush=True)
signal.pause()
"""


def test_one_holder_at_a_time_and_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state" / "daemon.lock"
    with StateLock(path):
        assert path.read_text() == f"{os.getpid()}\n"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with pytest.raises(AlreadyRunning, match=f"in use by process {os.getpid()}: one daemon") as caught:
            StateLock(path)
        assert caught.value.pid == os.getpid()
    StateLock(path).release()


def test_release_is_idempotent(tmp_path: Path) -> None:
    lock = StateLock(tmp_path / "daemon.lock")
    lock.release()
    lock.release()
    StateLock(tmp_path / "daemon.lock").release()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(AlreadyRunning) as caught:
        StateLock(path)
    assert caught.value.pid == holder.pid
    holder.send_signal(signal.SIGKILL)
    holder.wait(10)
    holder.stdout.close()
    StateLock(path).release()


def test_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    lock = StateLock(path)
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,
    )
    assert child.stdout is not None
    child.stdout.readline()
    lock.release()
    StateLock(path).release()
    child.communicate()


def test_a_holder_that_has_not_written_its_number_is_not_made_up(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    with StateLock(path):
        path.write_text("")
        with pytest.raises(AlreadyRunning, match="in use by another process") as caught:
            StateLock(path)
        assert caught.value.pid is None


def test_a_lock_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "daemon.lock").mkdir()
    with pytest.raises(IsADirectoryError):
        StateLock(tmp_path / "daemon.lock")


MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /mnt/share rw - nfs4 server:/export rw
31 22 0:27 / /mnt/share/local\040disk rw master:3 - xfs /dev/sdb rw
32 22 0:28 / /mnt/over rw - ext4 /dev/sdc rw
33 22 0:29 / /mnt/over rw - fuse.sshfs me@host: rw
34 22 0:30 / /mnt/sharex rw - btrfs /dev/sdd rw
""".lstrip()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/var/lib/state.db", "ext4"),
        ("/mnt/share/state.db", "nfs4"),
        ("/mnt/share", "nfs4"),
        ("/mnt/share/local disk/a/state.db", "xfs"),
        ("/mnt/over/state.db", "fuse.sshfs"),  # the later mount hides the earlier one
        ("/mnt/sharex/state.db", "btrfs"),
    ],
)
def test_the_mount_that_counts_is_the_longest_and_the_last(tmp_path: Path, path: str, found: str) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTS)
    assert filesystem_type(Path(path), mountinfo) == found


def test_links_are_followed(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(f"22 1 254:0 / / rw - ext4 a rw\n30 22 0:26 / {tmp_path / 'far'} rw - nfs4 b rw\n")
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    assert filesystem_type(tmp_path / "near" / "state.db", mountinfo) == "nfs4"


def test_this_machine_knows_its_own_mounts(tmp_path: Path) -> None:
    assert filesystem_type(tmp_path) is not None


def test_without_a_mount_table_nothing_is_known(tmp_path: Path) -> None:
    assert filesystem_type(tmp_path, tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("fs_type", "network"),
    [("nfs", True), ("nfs4", True), ("cifs", True), ("smb3", True), ("9p", True), ("fuse.mfs", True), ("fuse", True),
     ("ext4", False), ("xfs", False), ("overlay", False), ("tmpfs", False), ("zfs", False), (None, False)],
)  # fmt: skip
def test_network_types(fs_type: str | None, network: bool) -> None:
    assert is_network_type(fs_type) is network
