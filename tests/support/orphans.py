"""Finds what launches left behind, from the kernel's view: marks in environments, lock files still locked, cgroups,
shared memory. Complements ``leftovers``, which finds processes by the folder they refer to.

Invariant: it trusts no list of the product and uses none of its code.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from tests.support import leftovers

MARK = b"VBS_LAUNCH="


def marked(state_id: str) -> list[int]:
    """Living processes whose environment says that they belong to a launch of that daemon."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            entries = (entry / "environ").read_bytes().split(b"\0")
            if any(e.startswith(MARK + state_id.encode() + b"/") for e in entries) and not is_dead(int(entry.name)):
                found.append(int(entry.name))
    return sorted(found)


def is_dead(pid: int) -> bool:
    """Whether no process with that pid runs (a zombie does not run)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}
    except OSError:
        return True


def locked(folder: Path) -> list[str]:
    """Lock files below ``folder`` that some process holds."""
    found = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path.name)
    return found


def cgroups(*names: str) -> list[Path]:
    """Directories of launches whose name contains one of ``names`` (launch ids), in any cgroup v2 hierarchy."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"]
    # os.walk takes it as it comes when groups of other runs vanish under it; rglob does not.
    found = [Path(folder) / name for root in roots for folder, below, _ in os.walk(root) for name in below]
    return [path for path in found if path.name.startswith("vbs-") and any(name in path.name for name in names)]


def shared_memory(name: str) -> list[str]:
    return [entry.name for entry in Path("/dev/shm").iterdir() if name in entry.name]


def everything_left(folder: Path, state_id: str, locks: Path | None = None) -> list[str]:
    """A sentence for each thing that is left of a daemon with that state id and temp folder."""
    found = [f"process {pid} bears the mark" for pid in marked(state_id)]
    found += [f"process {p.pid} refers to {folder} by {p.because}" for p in leftovers.processes_referring_to(folder)]
    found += [f"{name} is locked" for name in (locked(locks) if locks else [])]
    return found
