"""The engine's processes as its shim sees them: descendants of the shim, and members of the cgroup leaf.

Invariant: nothing here signals a process that is neither. Standard library only.
"""

from __future__ import annotations

import os
import signal

from . import procfs, shm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cgroup import Leaf


class Tree:
    """``shared_before`` are the files in ``/dev/shm`` when nothing of the tree ran yet: not its."""

    def __init__(self, leaf: Leaf | None, shared_before: set[str]) -> None:
        self.leaf, self.shared_before = leaf, shared_before
        self.shared_memory: set[str] = set()

    def members(self) -> dict[int, int]:
        """pid → start time of all that live."""
        table = procfs.all_processes()
        pids = procfs.descendants([os.getpid()], table)
        if self.leaf is not None:
            pids |= self.leaf.pids() & table.keys()
        return {pid: table[pid].start_ticks for pid in pids if table[pid].state not in procfs.DEAD}

    def is_left(self, *, childless: bool) -> bool:
        """Whether anything lives. A subreaper inherits every orphan below it: without children, no descendants."""
        return not childless or bool(self.leaf and self.leaf.pids())

    def look(self, members: dict[int, int] | None = None) -> bool:
        """Note which shared-memory files are in use, for the time after. Whether there was a new one."""
        found = shm.mapped(self.members() if members is None else members) - self.shared_before
        is_new = not found <= self.shared_memory
        self.shared_memory |= found
        return is_new

    def kill(self) -> bool:
        """One round of SIGKILL. Whether there was anybody."""
        members = self.members()
        self.look(members)
        if self.leaf is not None:
            self.leaf.kill()
        for pid, start_ticks in members.items():
            procfs.send_signal(pid, start_ticks, signal.SIGKILL)
        return bool(members)

    def clear(self) -> None:
        """Remove what a dead tree leaves: its cgroup, its shared memory."""
        if self.leaf is not None:
            self.leaf.remove()
        shm.remove_unused(self.shared_memory)
