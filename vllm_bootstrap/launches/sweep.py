"""Finds and kills what is left of an attempt whose shim cannot be asked any more. Blocking; run it in a thread.

Invariant: a process is killed only when one of these says that it is ours: the marker in its environment, the session
that our shim founded, the cgroup leaf that our shim made, or descent from one of those. Never because its pid was
written down. This daemon itself is never among them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_bootstrap.launches.shim import procfs, protocol, shm
from vllm_bootstrap.launches.shim.cgroup import Leaf

Attempt = tuple[str, int]


@dataclass(slots=True)
class Remains:
    """Living processes of one attempt: pid → start time. ``shim`` is the shim's pid when it lives. ``shared_memory`` is
    what the tree was seen to use, and what is its own."""

    tree: dict[int, int] = field(default_factory=dict)
    shim: int | None = None
    leaf: Leaf | None = None
    shared_memory: set[str] = field(default_factory=set)

    @property
    def engine(self) -> dict[int, int]:
        """The tree without the shim."""
        return {pid: ticks for pid, ticks in self.tree.items() if pid != self.shim}


def attempt_of(marker: str, state_id: str) -> Attempt | None:
    """The launch and attempt a marker names, None when it is another daemon's or none."""
    owner, _, rest = marker.partition("/")
    launch_id, _, number = rest.rpartition("/")
    if owner != state_id or not launch_id or not number.isdigit():
        return None
    return launch_id, int(number)


def marked(state_id: str, table: dict[int, procfs.Stat]) -> dict[Attempt, set[int]]:
    """Living processes that carry our marker, by attempt."""
    found: dict[Attempt, set[int]] = {}
    for pid, state in table.items():
        if state.state in procfs.DEAD or pid == os.getpid():
            continue
        value = procfs.environ_value(pid, protocol.MARKER)
        attempt = attempt_of(value, state_id) if value is not None else None
        if attempt is not None:
            found.setdefault(attempt, set()).add(pid)
    return found


def remains(state_id: str, attempt: Attempt, run_dir: Path) -> Remains:
    """What lives of one attempt now."""
    table = procfs.all_processes()
    control_dir = run_dir / protocol.CONTROL_DIR
    identity = _of_this_boot(control_dir / protocol.IDENTITY)
    engine = _of_this_boot(control_dir / protocol.ENGINE)
    found = marked(state_id, table).get(attempt, set())
    leaf = Leaf.existing(engine.get("cgroup")) or Leaf.unnoted(f"{attempt[0]}.{attempt[1]}")
    result = Remains(leaf=leaf)
    if identity:
        pid, ticks = int(identity["pid"]), int(identity["start_ticks"])
        known = table.get(pid)
        if known is not None and known.start_ticks == ticks and known.state not in procfs.DEAD:
            result.shim = pid
            found.add(pid)
        # The kernel gives a pid out again only when no session bears its number any more: while the shim's pid is
        # the shim's or nobody's, that session is the shim's.
        if known is None or known.start_ticks == ticks:
            found |= {other for other, state in table.items() if state.session == pid}
    if result.leaf is not None:
        found |= _with_states(result.leaf.pids(), table)
    found |= procfs.descendants(found, table)
    result.tree = {
        pid: table[pid].start_ticks for pid in found if table[pid].state not in procfs.DEAD and pid != os.getpid()
    }
    if engine:  # else nobody knows what was there before
        seen = shm.mapped(result.tree) | set(engine.get("shared_memory", ()))
        result.shared_memory = seen - set(engine.get("shared_before", ()))
    return result


def _with_states(pids: set[int], table: dict[int, procfs.Stat]) -> set[int]:
    """Those of ``pids`` that exist, after adding to the table what was born after it was made."""
    for pid in pids - table.keys():
        state = procfs.stat(pid)
        if state is not None:
            table[pid] = state
    return pids & table.keys()


def _of_this_boot(path: Path) -> dict[str, Any]:
    found = protocol.read_json(str(path)) or {}
    return found if found.get("boot_id") == procfs.boot_id() else {}


def kill(found: Remains) -> None:
    """One round of SIGKILL, the shim first."""
    for pid in sorted(found.tree, key=lambda pid: pid != found.shim):
        procfs.send_signal(pid, found.tree[pid], signal.SIGKILL)
    if found.leaf is not None:
        found.leaf.kill()


def run_dirs(runtime_dir: Path, state_id: str) -> Iterator[tuple[Attempt | None, Path]]:
    """Run directories of this daemon. None for one that was never finished."""
    try:
        entries = sorted(runtime_dir.iterdir())
    except FileNotFoundError:
        return
    for path in entries:
        if path.name.startswith(unfinished_prefix(state_id)):
            yield None, path
            continue
        launch_id, _, number = path.name.rpartition(".")
        if launch_id and number.isdigit() and _owner(path) == state_id:
            yield (launch_id, int(number)), path


def unfinished_prefix(state_id: str) -> str:
    """How a run directory's name begins until it is complete."""
    return f".new-{state_id}-"


def _owner(run_dir: Path) -> str | None:
    try:
        return (run_dir / protocol.CONTROL_DIR / protocol.OWNER).read_text()
    except OSError:
        return None
