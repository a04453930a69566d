"""Shared-memory files that a killed tree leaves in ``/dev/shm``. Standard library only.

Invariant: a file is removed only when a member of the tree was seen to have it mapped, it was not there before the tree
was, and no living process has it mapped now. Everything else is left alone: it may be a stranger's, or meant to stay.
"""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

FOLDER = "/dev/shm/"  # noqa: S108 - the kernel's place for it


def existing() -> set[str]:
    """Paths of all files there now."""
    try:
        return {FOLDER + name for name in os.listdir(FOLDER)}
    except OSError:
        return set()


def mapped(pids: Iterable[int]) -> set[str]:
    """Paths below ``/dev/shm`` whose files any of these processes has mapped, under whatever name it knows them.

    By inode: libc makes a named semaphore under another name first, and that is the one its maker's mapping shows.
    """
    inodes: set[int] = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps", "rb") as file:
                inodes.update(int(line.split(None, 5)[4]) for line in file if b" /dev/shm/" in line)
        except OSError:
            continue
    return {path for path in existing() if _inode(path) in inodes} if inodes else set()


def _inode(path: str) -> int | None:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return None


def remove_unused(paths: Iterable[str]) -> None:
    """Unlink those of ``paths`` that no living process has mapped."""
    candidates = {path for path in paths if path.startswith(FOLDER) and "/../" not in path}
    if not candidates:
        return
    living = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    for path in candidates - mapped(living):
        with contextlib.suppress(OSError):
            os.unlink(path)
