"""How much memory the host has left for us. Two small files of the kernel, nothing else."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def available_bytes(root: Path = ROOT) -> int | None:
    """What can be taken without swapping: the kernel's estimate, or less where our control group allows less. None when
    it cannot be read. ``root`` is where ``proc`` and ``sys`` are looked for. Blocks for two small reads."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if not found:
        return None
    group = _left_in_group(root)
    return found[0] if group is None else min(found[0], group)


def _left_in_group(root: Path) -> int | None:
    # In a container the root of this tree is the container's own group; outside it has no limit.
    folder = root / "sys/fs/cgroup"
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        cached = [
            line.split()[1] for line in (folder / "memory.stat").read_text().splitlines() if line.startswith("file ")
        ]
    except (OSError, ValueError):
        return None
    return max(0, limit - used + sum(map(int, cached)))
