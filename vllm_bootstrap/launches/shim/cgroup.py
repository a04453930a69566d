"""One cgroup v2 leaf for one engine tree, where there really is cgroup v2. Standard library only.

Invariant: a leaf is used only when its file system is cgroup2 by magic number and it has ``cgroup.kill``; the shim
itself stays outside of it. Without one, everything works by descendants of the subreaper.
"""

from __future__ import annotations

import contextlib
import os

from . import syscalls

PREFIX = "vbs-"


def own_directory(cgroup_text: str, mountinfo_text: str) -> str | None:
    """The directory of this process's cgroup v2, from the texts of ``/proc/self/cgroup`` and ``mountinfo``."""
    own = next((line[3:] for line in cgroup_text.splitlines() if line.startswith("0::")), None)
    if own is None:
        return None
    for line in mountinfo_text.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if after.split(" ")[0] == "cgroup2" and len(fields) > 4:
            root, mount = fields[3].rstrip("/"), fields[4]
            if own == root or own.startswith(root + "/"):
                return (mount + own[len(root) :]).rstrip("/")
    return None


def _parent() -> str | None:
    try:
        with open("/proc/self/cgroup") as own, open("/proc/self/mountinfo") as mounts:
            return own_directory(own.read(), mounts.read())
    except OSError:
        return None


class Leaf:
    """A cgroup directory made by a shim. All methods are harmless when it has vanished meanwhile."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def create(cls, name: str) -> Leaf | None:
        """Make the leaf below our own cgroup, or None where that is not possible."""
        parent = _parent()
        return cls.below(parent, name) if parent is not None else None

    @classmethod
    def unnoted(cls, name: str) -> Leaf | None:
        """A leaf that a shim made below the cgroup it shares with us and was killed before it wrote that down."""
        parent = _parent()
        return cls.existing(f"{parent}/{PREFIX}{name}") if parent is not None else None

    @classmethod
    def below(cls, parent: str, name: str) -> Leaf | None:
        """Make the leaf in ``parent`` if that is cgroup2 and lets us."""
        if syscalls.filesystem_magic(parent) != syscalls.CGROUP2_MAGIC:
            return None
        leaf = cls(f"{parent}/{PREFIX}{name}")
        try:
            os.mkdir(leaf.path, 0o755)
        except OSError:
            return None
        if os.access(leaf.path + "/cgroup.kill", os.W_OK) and os.access(leaf.path + "/cgroup.procs", os.W_OK):
            return leaf
        leaf.remove()
        return None

    @classmethod
    def existing(cls, path: object) -> Leaf | None:
        """A leaf an earlier shim wrote down, if it is still one."""
        if not isinstance(path, str) or not os.path.basename(path).startswith(PREFIX):
            return None
        return cls(path) if syscalls.filesystem_magic(path) == syscalls.CGROUP2_MAGIC else None

    def enter(self) -> None:
        """Move the calling process into the leaf. Raises ``OSError``."""
        self._write("cgroup.procs", b"0")

    def pids(self) -> set[int]:
        """Living members, those of nested cgroups included."""
        found: set[int] = set()
        for directory, _, _ in os.walk(self.path):
            with contextlib.suppress(OSError), open(directory + "/cgroup.procs", encoding="ascii") as file:
                found.update(int(line) for line in file)
        return found - {0}  # how the kernel shows members outside of our pid namespace

    def kill(self) -> None:
        """SIGKILL to all members at once; the kernel keeps forks from escaping."""
        with contextlib.suppress(OSError):
            self._write("cgroup.kill", b"1")

    def remove(self) -> bool:
        """Delete the leaf and what was made below it. False when something still lives in it."""
        for directory, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        return not os.path.isdir(self.path)

    def _write(self, name: str, data: bytes) -> None:
        fd = os.open(f"{self.path}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
