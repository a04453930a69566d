"""Lock files of GPUs: never two owners, all or none, no trust in what lies in a folder that others can write to."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_bootstrap.launches.shim.gpulocks import GpuLocked, take


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "locks")


def lock(folder, *uuids, owner="a", launch="l1", shared=False, **options):
    return take(folder, uuids, owner=owner, launch=launch, shared=shared, **options)


def release(held):
    for fd in held:
        os.close(fd)


def test_files_are_open_to_all_users_and_never_deleted(folder):
    old = os.umask(0o077)
    try:
        release(lock(folder, "GPU-1"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o1777
    assert stat.S_IMODE(Path(folder, "GPU-1.lock").stat().st_mode) == 0o666
    release(lock(folder, "GPU-1"))


def test_all_or_none(folder):
    held = lock(folder, "GPU-2")
    with pytest.raises(GpuLocked, match="GPU-2 is held by launch l1 of another daemon"):
        lock(folder, "GPU-1", "GPU-2", "GPU-3", owner="b")
    release(lock(folder, "GPU-1", "GPU-3", owner="b"))
    release(held)
    release(lock(folder, "GPU-1", "GPU-2", "GPU-3", owner="b"))


@pytest.mark.parametrize(
    ("first", "second", "works"),
    [
        ({"shared": True}, {"shared": True}, True),
        ({"shared": True}, {"shared": True, "owner": "b"}, False),
        ({"shared": True}, {"shared": False}, False),
        ({"shared": False}, {"shared": True}, False),
        ({"shared": False}, {"shared": False}, False),
    ],
)
def test_who_may_share(folder, first, second, works):
    held = lock(folder, "GPU-1", **first)
    if works:
        release(lock(folder, "GPU-1", launch="l2", **second))
    else:
        with pytest.raises(GpuLocked):
            lock(folder, "GPU-1", launch="l2", **second)
    release(held)
    release(lock(folder, "GPU-1", owner="c"))


def test_the_last_sharer_keeps_it(folder):
    first, second = lock(folder, "GPU-1", shared=True), lock(folder, "GPU-1", shared=True, launch="l2")
    release(first)
    with pytest.raises(GpuLocked):
        lock(folder, "GPU-1", owner="b")
    release(second)
    release(lock(folder, "GPU-1", owner="b"))


@pytest.mark.parametrize("shared", [True, False])
def test_races_have_one_winner(folder, shared):
    owners = [f"daemon{n}" for n in range(4)]
    for _ in range(25):
        start = threading.Barrier(len(owners))

        def attempt(owner, start=start):
            start.wait()
            try:
                return owner, lock(folder, "GPU-1", "GPU-2", owner=owner, shared=shared)
            except GpuLocked:
                return owner, None

        with ThreadPoolExecutor(len(owners)) as pool:
            results = dict(pool.map(attempt, owners))
        winners = [owner for owner, held in results.items() if held is not None]
        assert len(winners) == 1
        release(results[winners[0]])


@pytest.mark.parametrize("content", [b"", b"no json", b"[1]"])
def test_holders_that_say_nothing_are_still_respected(folder, content):
    release(lock(folder, "GPU-1"))
    with Path(folder, "GPU-1.lock").open("r+b") as file:
        file.truncate()
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)
        for shared in (True, False):
            with pytest.raises(GpuLocked, match="unknown program"):
                lock(folder, "GPU-1", shared=shared)


def test_a_gate_that_is_kept_closed_is_not_waited_for_long(folder):
    release(lock(folder, "GPU-1"))
    with Path(folder, "gate").open("rb") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        with pytest.raises(GpuLocked, match="gate"):
            lock(folder, "GPU-1", gate_wait_s=0.1)
    release(lock(folder, "GPU-1"))


def test_links_and_other_things_in_the_folder_are_not_followed(folder, tmp_path):
    release(lock(folder, "GPU-1"))
    precious = tmp_path / "precious"
    precious.write_text("content")
    Path(folder, "GPU-2.lock").symlink_to(precious)
    os.mkfifo(folder + "/GPU-3.lock")
    for uuid in ("GPU-2", "GPU-3"):
        with pytest.raises(OSError):
            lock(folder, "GPU-1", uuid)
    assert precious.read_text() == "content"
    release(lock(folder, "GPU-1"))


@pytest.mark.parametrize("uuid", ["", "../x", "a/b", ".", "..", ".hidden"])
def test_uuids_are_names(folder, uuid):
    with pytest.raises(ValueError, match="not a GPU UUID"):
        lock(folder, uuid)
