"""Has a GPU's memory come back after its launch died? Readings in, verdict out. PURE.

The driver gives memory back some time after the last process is gone, and a start that measures too early fails or
takes too little. So a GPU is free again when its use is near what it was before the start.

**Sharing.** Another launch on the same GPU moves the memory while this one lives, so its use before and after cannot
be compared as it stands. What counts is only what nobody of ours may use: the baseline is taken without the others'
shares (``baseline``), and afterwards the others that remain may use up to their shares (``judge``). Memory that this
launch leaves behind can then hide in a share its neighbour does not fill. That is harmless: that share is not given
out, and the part that is given out is free.

**Sleepers.** A launch that sleeps there holds no share but still uses some memory, its residue. It counts like a
share: the baseline is taken without it, and afterwards whoever sleeps there may use as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GIB = 1024**3


class Verdict(StrEnum):
    SETTLED = "settled"
    WAITING = "waiting"
    UNSETTLED = "unsettled"


@dataclass(frozen=True, slots=True)
class Settlement:
    """``reason`` says what is missing, for people; None when settled."""

    verdict: Verdict
    reason: str | None = None


def baseline(used_bytes: int, *, others_milli: int = 0, total_bytes: int = 0, residue_bytes: int = 0) -> int:
    """Memory in use before a start that is not ours to give back: without the shares and residues of other launches
    there."""
    return max(0, used_bytes - _share(others_milli, total_bytes) - residue_bytes)


def is_settled(
    baseline_bytes: int,
    used_bytes: int | None,
    tolerance_bytes: int,
    *,
    others_milli: int = 0,
    total_bytes: int = 0,
    residue_bytes: int = 0,
) -> bool:
    """Whether the memory is back. A reading that is missing (None) proves nothing."""
    allowed = baseline_bytes + _share(others_milli, total_bytes) + residue_bytes + tolerance_bytes
    return used_bytes is not None and used_bytes <= allowed


def judge(
    baseline_bytes: int,
    used_bytes: int | None,
    *,
    tolerance_bytes: int,
    elapsed_s: float,
    timeout_s: float,
    others_milli: int = 0,
    total_bytes: int = 0,
    residue_bytes: int = 0,
) -> Settlement:
    """One look at one GPU, ``elapsed_s`` after its processes were seen dead.

    1. memory is back → settled
    2. not back, time is left → waiting
    3. not back, time is over → unsettled

    ``others_milli`` is what other living launches hold of this GPU now, ``residue_bytes`` what those use that sleep
    there, ``total_bytes`` its memory.
    """
    allowed = baseline_bytes + _share(others_milli, total_bytes) + residue_bytes
    if is_settled(allowed, used_bytes, tolerance_bytes):
        return Settlement(Verdict.SETTLED)  # 1
    if used_bytes is None:
        reason = "its memory cannot be read"
    else:
        excess = used_bytes - allowed
        reason = f"{excess / GIB:.1f} GiB more in use than before the start"
    if elapsed_s < timeout_s:
        return Settlement(Verdict.WAITING, reason)  # 2
    return Settlement(Verdict.UNSETTLED, f"{reason}, {elapsed_s:.0f} s after its processes were gone")  # 3


def residue(baseline_bytes: int, used_bytes: int, *, others_milli: int = 0, total_bytes: int = 0) -> int:
    """What a launch that fell asleep still uses: all that is in use but the baseline and the others' shares."""
    return max(0, used_bytes - baseline_bytes - _share(others_milli, total_bytes))


def _share(milli: int, total_bytes: int) -> int:
    return total_bytes * milli // 1000
