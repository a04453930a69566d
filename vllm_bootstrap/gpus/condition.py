"""What may be said about one GPU right now: free, claimed, busy, unsettled or unknown, and because of whom. PURE.

Others' use is what makes a free GPU busy. It is judged so:

1. nobody of ours is on the GPU, not even asleep: all memory in use but that of processes which only draw
2. ours are there, processes are seen, their ids mean something and all of ours are known: the memory of the others
3. ours are there otherwise: memory in use minus our own claims, and nobody is named

A launch that sleeps claims nothing and still uses a little. It is one of ours in 2; in 3 what it was seen to
use (its residue) is taken off.

In a pid namespace the driver's process ids mean nothing, so nobody is named there (``Snapshot.pids_trusted``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.readings import GpuProcess, GpuReading, Snapshot

GIB, MIB = 1024**3, 1024**2


class GpuState(StrEnum):
    """The values of ``state`` in ``GET /gpus``."""

    FREE = "free"
    CLAIMED = "claimed"
    BUSY = "busy"
    UNSETTLED = "unsettled"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Condition:
    """``reason`` completes the sentence "GPU 0 …", None when there is nothing to say. ``owners`` are launches of
    ours, ``others`` the foreign processes that could be named, ``is_busy`` also when the GPU is claimed as well."""

    state: GpuState
    reason: str | None
    owners: tuple[str, ...] = ()
    others: tuple[GpuProcess, ...] = ()
    others_bytes: int = 0
    is_busy: bool = False


def assess(
    reading: GpuReading,
    snapshot: Snapshot,
    ledger: Ledger,
    unsettled: Mapping[str, str],
    *,
    busy_bytes: int,
    own_pids: frozenset[int] | None = None,
) -> Condition:
    """Judge one GPU. What is worst is said first: unknown, unsettled, claimed, busy, free.

    ``own_pids``: every process of our launches, None when not known.
    """
    uuid = reading.gpu.uuid
    owners = ledger.owners(uuid)
    why = reading.unknown or snapshot.unknown
    if why is not None:
        return Condition(GpuState.UNKNOWN, f"cannot be judged: {why}", owners)
    claimed = ledger.claimed_milli(uuid)
    used, others = others_use(
        reading, claimed,
        own_pids=own_pids, pids_trusted=snapshot.pids_trusted,
        residue_bytes=ledger.residue_bytes(uuid), sleepers=bool(ledger.parked_on(uuid)),
    )  # fmt: skip
    is_busy = used > busy_bytes
    ours = bool(claimed or ledger.parked_on(uuid))
    sentence = _held(used, others, pids_trusted=snapshot.pids_trusted, claimed=ours) if is_busy else None
    if uuid in unsettled:
        return Condition(GpuState.UNSETTLED, f"is unsettled: {unsettled[uuid]}", owners, others, used, is_busy)
    if owners:
        said = f"is owned by launch {', '.join(owners)}"
        reason = f"{said} and {sentence}" if sentence else said
        return Condition(GpuState.CLAIMED, reason, owners, others, used, is_busy)
    state = GpuState.BUSY if is_busy else GpuState.FREE
    return Condition(state, sentence, owners, others, used, is_busy)


def others_use(
    reading: GpuReading,
    claimed_milli: int,
    *,
    own_pids: frozenset[int] | None,
    pids_trusted: bool,
    residue_bytes: int = 0,
    sleepers: bool = False,
) -> tuple[int, tuple[GpuProcess, ...]]:
    """Bytes that others use, and the processes that can be named. The numbers are those of the module's docstring.
    ``sleepers``: ours that claim nothing now are there, and use ``residue_bytes`` as far as was seen."""
    drawing = sum(p.used_bytes or 0 for p in reading.processes if p.graphics)
    computing = [p for p in reading.processes if not p.graphics]
    in_use = max(0, (reading.used_bytes or 0) - drawing)
    named = tuple(computing) if pids_trusted else ()
    if not claimed_milli and not sleepers:
        return in_use, named  # 1
    if computing and pids_trusted and own_pids is not None and all(p.used_bytes is not None for p in computing):
        foreign = tuple(p for p in computing if p.pid not in own_pids)
        return sum(p.used_bytes or 0 for p in foreign), foreign  # 2
    return max(0, in_use - reading.gpu.total_bytes * claimed_milli // 1000 - residue_bytes), ()  # 3


def _held(used: int, others: tuple[GpuProcess, ...], *, pids_trusted: bool, claimed: bool) -> str:
    who = ", ".join(describe(process) for process in others)
    size = f"has {used / GIB:.1f} GiB held by"
    if who:
        return f"{size} {who} (not ours)"
    if not pids_trusted:
        basis = "memory in use minus our own claims" if claimed else "memory in use"
        return f"{size} others; who they are cannot be seen from inside this pid namespace ({basis})"
    if claimed:
        return f"{size} others (memory in use minus our own claims)"
    return f"{size} processes that cannot be seen from here"


def describe(process: GpuProcess) -> str:
    """A process for people, as far as it is visible."""
    parts = ["an unnamed process" if process.pid is None else f"pid {process.pid}"]
    if process.name is not None:
        parts.append(process.name)
    if process.user is not None:
        parts.append(f"of {process.user}")
    if process.used_bytes is not None:
        parts.append(f"with {process.used_bytes // MIB} MiB")
    return " ".join(parts)
