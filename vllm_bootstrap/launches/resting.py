"""When may a launch sleep, and does it? Numbers in, a reason or None out. PURE.

**Asleep** on a GPU means: what the launch still uses there (its residue: CUDA contexts, captured graphs, buffers of
communication) is at most ``RESIDUE_SHARE`` of the GPU or ``RESIDUE_BYTES``, whichever is more, and at least half of
what it used is free. Less than that makes no room for another model, so it counts as a failure: the caller unloads.

**Host memory**: at level 1 the weights move there. They are as large as the model's files where these are known, else
as what the launch uses of the GPUs, and what is left afterwards must not be less than the operator's reserve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_bootstrap.engines.base import Gpu
from vllm_bootstrap.gpus import settle

GIB = 1024**3
RESIDUE_SHARE = 0.1
RESIDUE_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True)
class SleepFacts:
    """How a launch sleeps. ``freed`` and ``residues`` in bytes by GPU. ``answer``: what the model said first to a fixed
    prompt before (level 2 only), to be compared when it wakes."""

    level: int
    freed: Mapping[str, int] = field(default_factory=dict)
    residues: Mapping[str, int] = field(default_factory=dict)
    answer: str | None = None


def facts_in(stored: Mapping[str, Any] | None) -> SleepFacts | None:
    """What was stored of it by ``dataclasses.asdict``."""
    return None if stored is None else SleepFacts(**stored)


@dataclass(frozen=True, slots=True)
class GpuLook:
    """A GPU before and after. ``before`` and ``after`` are all that is in use, None where it could not be read;
    ``baseline`` is what is not the launch's, ``others_milli`` and ``others_bytes`` what living and sleeping neighbours
    may use."""

    gpu: Gpu
    baseline: int | None
    before: int | None
    after: int | None
    others_milli: int = 0
    others_bytes: int = 0

    def used(self, reading: int) -> int:
        """What of a reading is the launch's own."""
        baseline = (self.baseline or 0) + self.others_bytes
        return settle.residue(baseline, reading, others_milli=self.others_milli, total_bytes=self.gpu.total_bytes)


def not_asleep(look: GpuLook) -> str | None:
    """Why the launch does not count as asleep on this GPU.

    1. unreadable, or nobody knows what was in use before the launch → cannot be told
    2. the residue is too large  3. too little was freed  4. it sleeps
    """
    name = f"GPU {look.gpu.index}"
    if look.before is None or look.after is None or look.baseline is None:  # 1
        return f"the memory of {name} cannot be read"
    before, residue = look.used(look.before), look.used(look.after)
    allowed = max(RESIDUE_BYTES, int(look.gpu.total_bytes * RESIDUE_SHARE))
    if residue > allowed:  # 2
        return f"{residue / GIB:.1f} GiB of {name} are still in use, more than {allowed / GIB:.1f} GiB"
    if before - residue < before / 2:  # 3
        return f"only {(before - residue) / GIB:.1f} of {before / GIB:.1f} GiB of {name} became free"
    return None  # 4


def too_little_host_memory(level: int, weights_bytes: int, available_bytes: int, reserve_bytes: int) -> str | None:
    """Why the host cannot take the weights; None when it can. At level 2 it takes none."""
    needed = weights_bytes if level == 1 else 0
    if available_bytes - needed >= reserve_bytes:
        return None
    return (
        f"the host has {available_bytes / GIB:.1f} GiB of memory left and {needed / GIB:.1f} GiB would be taken, "
        f"which leaves less than the reserve of {reserve_bytes / GIB:.1f} GiB"
    )


def weights_bytes(on_disk: int | None, on_gpus: int) -> int:
    """How large the weights are, at most: the model's files where known, never more than is in use on the GPUs."""
    return min(on_disk, on_gpus) if on_disk else on_gpus
