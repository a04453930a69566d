"""What must be true of the state directory before a database in it is opened: one daemon, and a known file system.

Invariant: at most one process holds a ``StateLock`` on a path, and the kernel gives it back when that process dies,
however it dies. Nothing here knows what the state is.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Self

# Where locks, shared memory maps or fsync cannot be relied on as on a local disk. All of FUSE is among them: most
# mounts of that kind on rented machines are network volumes, and nothing tells the others apart.
NETWORK_TYPES = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2",
    "prl_fs", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs",
})  # fmt: skip


class AlreadyRunning(Exception):
    """Another process holds the state directory. ``pid`` is None when it has not written its number yet."""

    def __init__(self, path: Path, pid: int | None) -> None:
        holder = f"process {pid}" if pid is not None else "another process"
        super().__init__(f"{path.parent} is in use by {holder}: one daemon for each state directory")
        self.path = path
        self.pid = pid


class StateLock:
    """An exclusive lock on a file that names its holder. Taken by the constructor, never waited for.

    Raises ``AlreadyRunning``, or ``OSError`` when the file cannot be made. The file stays behind on release: removing
    it would let two processes lock two files of one name. Children do not inherit the lock (close-on-exec).
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._fd: int | None = None
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).strip()
            os.close(fd)
            raise AlreadyRunning(path, int(holder) if holder.isdigit() else None) from None
        except OSError:
            os.close(fd)
            raise
        self._fd = fd

    def release(self) -> None:
        """Give the lock back. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


def filesystem_type(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The type of the file system ``path`` lies on, None where the kernel does not tell. ``path`` need not exist."""
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    target = path.resolve()
    best: tuple[int, str | None] = (-1, None)
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = Path(_unescaped(fields.split()[4]))
        # A later mount on the same point hides an earlier one, hence >=.
        if target.is_relative_to(point) and len(point.parts) >= best[0]:
            best = (len(point.parts), rest.split()[0])
    return best[1]


def is_network_type(fs_type: str | None) -> bool:
    """Whether a file system of this type must be treated as remote. An unknown type counts as local."""
    return fs_type is not None and (fs_type in NETWORK_TYPES or fs_type.startswith("fuse"))


def _unescaped(text: str) -> str:
    """mountinfo writes blanks, tabs, newlines and backslashes as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)
