"""Host-wide ownership of GPUs by lock files, so that two daemons with two state folders never both own one.

Protocol, for every program that wants to take part. In one folder of the host (sticky and writable to all when several
users run daemons; each file is opened without following links, and created only when missing):

* ``gate``: ``flock`` exclusively, held only while locks are being taken. Waiting for it is bounded.
* ``<uuid>.lock``, one for each GPU, with the gate held:

  1. exclusive lock obtained → nobody has this GPU. Write who we are (one line of JSON: ``owner``, ``launch``, ``pid``,
     ``uid``); keep it exclusive, or turn it into a shared lock when sharing was asked for.
  2. not obtained, and we want it for ourselves → conflict.
  3. not obtained, shared lock not obtained either → its holder does not share → conflict.
  4. shared lock obtained, the written ``owner`` is ours → we share with our own daemon's launches.
  5. shared lock obtained, another owner → conflict.

Either all wanted GPUs are locked or none. A lock lives as long as the shim, but for the time in which its engine
sleeps: files are never deleted (an unlinked file can be locked by two programs at once) and descriptors never reach
the engine. ``owner`` names a state folder. Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

GATE = "gate"
GATE_WAIT_S = 2.0
GATE_POLL_S = 0.02


class GpuLocked(Exception):
    """Somebody else has a wanted GPU; the text names them as far as known."""


class GateBusy(GpuLocked):
    """Somebody else is taking locks right now: nothing is known about the wanted GPUs."""


def take(
    folder: str, uuids: Sequence[str], *, owner: str, launch: str, shared: bool, gate_wait_s: float = GATE_WAIT_S
) -> list[int]:
    """Lock all GPUs or none; the descriptors to keep open. Blocks up to ``gate_wait_s``.

    Raises ``GpuLocked``, ``ValueError`` for a name that is no file name, ``OSError``.
    """
    for uuid in uuids:
        if not uuid or "/" in uuid or uuid.startswith("."):
            raise ValueError(f"not a GPU UUID: {uuid!r}")
    os.makedirs(folder, mode=0o777, exist_ok=True)
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    held: list[int] = []
    try:
        _open_to_all(directory)
        gate = _open_file(directory, GATE)
        try:
            _enter(gate, folder, gate_wait_s)
            for uuid in sorted(uuids):
                fd = _take_one(directory, uuid, owner=owner, launch=launch, shared=shared)
                held.append(fd)
        finally:
            os.close(gate)
    except BaseException:
        for fd in held:
            os.close(fd)
        raise
    finally:
        os.close(directory)
    return held


def _open_to_all(directory: int) -> None:
    # Only for the folder we made ourselves: its mode was cut by our umask.
    found = os.fstat(directory)
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != 0o1777:
        os.fchmod(directory, 0o1777)


def _open_file(directory: int, name: str) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        # Without O_CREAT: in a sticky folder the kernel refuses that flag on other users' files.
        fd = os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        try:
            fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=directory)
            os.fchmod(fd, 0o666)
        except FileExistsError:
            fd = os.open(name, flags, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{name} in the lock folder is not a plain file")
    return fd


def _enter(gate: int, folder: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not _try_lock(gate, fcntl.LOCK_EX):
        if time.monotonic() >= deadline:
            raise GateBusy(f"{folder}/{GATE} has been locked by another program for {wait_s:g} s")
        time.sleep(GATE_POLL_S)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take_one(directory: int, uuid: str, *, owner: str, launch: str, shared: bool) -> int:
    fd = _open_file(directory, uuid + ".lock")
    try:
        if _try_lock(fd, fcntl.LOCK_EX):  # 1
            _write_holder(fd, {"owner": owner, "launch": launch, "pid": os.getpid(), "uid": os.geteuid()})
            if shared:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return fd
        holder = _read_holder(fd)
        if shared and _try_lock(fd, fcntl.LOCK_SH) and holder.get("owner") == owner:  # 4
            return fd
        raise GpuLocked(_sentence(uuid, holder, owner))  # 2, 3, 5
    except BaseException:
        os.close(fd)
        raise


def _write_holder(fd: int, holder: dict[str, Any]) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(holder).encode() + b"\n", 0)


def _read_holder(fd: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _sentence(uuid: str, holder: dict[str, Any], owner: str) -> str:
    if not holder:
        return f"GPU {uuid} is locked by an unknown program"
    whose = "this daemon" if holder.get("owner") == owner else "another daemon"
    return (
        f"GPU {uuid} is held by launch {holder.get('launch')} of {whose} "
        f"(process {holder.get('pid')}, user {holder.get('uid')})"
    )
