"""Which GPUs does a launch get? Wish, readings and claims in, placement or refusal out. PURE.

For one launch; several at once are placed by ``replicas``. Every wish resolves to exactly one outcome, in this order:

1. no device can be judged → ``GpuUnknown``
2. the wish cannot be met on this machine, or the tensor parallel size does not fit the model → ``BadRequest`` with
   the field, and the numbers of GPUs that would fit
3. named GPUs, or all of them: each must be free → else ``GpuConflict``, or ``GpuUnknown`` when not knowing is all that
   stands against them
4. a number of GPUs: the best of those that are free → else ``GpuConflict``, or ``GpuUnknown`` when what is not known
   could make up the number

Invariant: a GPU is given out only when it is known to have room. Nothing here claims, measures or waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_bootstrap.engines.base import Placement
from vllm_bootstrap.errors import BadRequest, GpuConflict, GpuUnknown
from vllm_bootstrap.gpus.condition import Condition, GpuState, assess
from vllm_bootstrap.gpus.ledger import WHOLE, Claim, Ledger
from vllm_bootstrap.gpus.readings import CPU_UUID, GpuReading, Snapshot

UNKNOWN_RETRY_S = 10


@dataclass(frozen=True, slots=True)
class PlacementWish:
    """What was asked for; None where nothing was said. ``gpu_ids`` are indices or UUIDs, ``gpu_share`` 0 to 1."""

    gpu_ids: tuple[int | str, ...] | None = None
    gpu_count: int | None = None
    gpu_share: float | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None


def share_milli(wish: PlacementWish, snapshot: Snapshot) -> int:
    """Thousandths of each GPU the launch claims. Less than the whole means that it agrees to share."""
    if snapshot.kind == "cpu":
        return max(1, WHOLE // snapshot.cpu_slots)
    return WHOLE if wish.gpu_share is None else max(1, round(wish.gpu_share * WHOLE))


def place(
    wish: PlacementWish,
    snapshot: Snapshot,
    ledger: Ledger,
    unsettled: Mapping[str, str],
    *,
    busy_bytes: int,
    heads: int | None = None,
    own_pids: frozenset[int] | None = None,
) -> Placement:
    """Choose. ``unsettled``: UUID to reason; ``busy_bytes``: more than this in use by others makes a GPU busy;
    ``heads``: the model's attention heads where known; ``own_pids``: all processes of our launches where known.

    Raises ``GpuUnknown``, ``GpuConflict`` and ``BadRequest``.
    """
    refuse_unjudged(snapshot)  # 1
    if snapshot.kind == "cpu":
        refuse_what_cpu_has_not(wish)
    milli = share_milli(wish, snapshot)
    named = None if wish.gpu_ids is None else named_gpus(wish.gpu_ids, snapshot)  # 2
    count = _count(wish, snapshot, named)
    tensor, pipeline = parallel_sizes(wish, count, len(snapshot.gpus), heads)
    found = candidates(
        named or snapshot.gpus, snapshot, ledger, unsettled, milli, busy_bytes=busy_bytes, own_pids=own_pids
    )
    chosen = found if count == len(found) else _best(found, count)  # 4
    _refuse_unless_free(chosen)  # 3
    return Placement(snapshot.kind, tuple(c.reading.gpu for c in chosen), milli, tensor, pipeline)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A GPU and what speaks against it, None when it has room for one claim. ``unknown``: only that nothing is known
    about it. ``claimed_milli``: what launches own of it; ``sleepers``: those that sleep will want it back."""

    reading: GpuReading
    condition: Condition
    refusal: str | None
    unknown: bool
    claimed_milli: int
    sleepers: int = 0


def refuse_unjudged(snapshot: Snapshot) -> None:
    """Raise ``GpuUnknown`` when no device can be judged at all."""
    if snapshot.unknown is not None:
        raise GpuUnknown(f"The GPUs cannot be judged right now: {snapshot.unknown}.", retry_after=UNKNOWN_RETRY_S)


def candidates(
    readings: Sequence[GpuReading],
    snapshot: Snapshot,
    ledger: Ledger,
    unsettled: Mapping[str, str],
    milli: int,
    *,
    busy_bytes: int,
    own_pids: frozenset[int] | None,
) -> list[Candidate]:
    """Each of ``readings`` judged for a claim of ``milli`` thousandths, in the order given."""
    return [
        _judged(r, assess(r, snapshot, ledger, unsettled, busy_bytes=busy_bytes, own_pids=own_pids), ledger, milli)
        for r in readings
    ]


def _judged(reading: GpuReading, condition: Condition, ledger: Ledger, milli: int) -> Candidate:
    gpu = reading.gpu
    taken = ledger.claimed_milli(gpu.uuid)
    name = f"GPU {gpu.index} ({gpu.uuid})"
    unknown = False
    refusal: str | None = None
    if not ledger.fits(Claim(gpu.uuid, milli, shared=milli < WHOLE)):
        part = "" if taken == WHOLE else f" ({taken / 10:g} % of it)"
        refusal = f"{name} is owned by launch {', '.join(condition.owners)}{part}"
    elif condition.state not in {GpuState.FREE, GpuState.CLAIMED} or condition.is_busy:
        refusal = f"{name} {condition.reason}"
        unknown = condition.state is GpuState.UNKNOWN
    return Candidate(reading, condition, refusal, unknown, taken, len(ledger.parked_on(gpu.uuid)))


def _refuse_unless_free(chosen: Sequence[Candidate]) -> None:
    refused = [c for c in chosen if c.refusal is not None]
    if not refused:
        return
    message = "; ".join(str(c.refusal) for c in refused)
    if all(c.unknown for c in refused):
        raise GpuUnknown(f"{message}.", retry_after=UNKNOWN_RETRY_S, details={"gpus": details_of(refused)})
    raise GpuConflict(f"{message}.", param="gpu_ids", details={"gpus": details_of(refused)})


def _best(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The ``count`` GPUs to take: fullest first among those with room, so that whole ones stay whole; then those where
    fewer sleep, so that they can wake; then by index."""
    free = sorted(
        (c for c in candidates if c.refusal is None),
        key=lambda c: (-c.claimed_milli, c.sleepers, c.reading.gpu.index),
    )
    if len(free) >= count:
        return sorted(free[:count], key=lambda c: c.reading.gpu.index)
    refused = [c for c in candidates if c.refusal is not None]
    message = f"{count} GPUs are wanted, {len(free)} free: " + "; ".join(str(c.refusal) for c in refused)
    details = {"gpus": details_of(refused)}
    if len(free) + sum(c.unknown for c in refused) >= count:
        raise GpuUnknown(f"{message}.", retry_after=UNKNOWN_RETRY_S, details=details)
    raise GpuConflict(f"{message}.", param="gpu_count", details=details)


def details_of(refused: Sequence[Candidate]) -> list[dict[str, object]]:
    """What speaks against GPUs, for the error object."""
    return [
        {
            "uuid": c.reading.gpu.uuid,
            "index": c.reading.gpu.index,
            "state": c.condition.state.value,
            "reason": c.refusal,
            "owners": list(c.condition.owners),
            "others": [
                {"pid": p.pid, "user": p.user, "name": p.name, "used_bytes": p.used_bytes} for p in c.condition.others
            ],
        }
        for c in refused
    ]


def named_gpus(gpu_ids: Sequence[int | str], snapshot: Snapshot) -> list[GpuReading]:
    """The GPUs of these indices and UUIDs, in that order. Raises ``BadRequest``."""
    by_name = {str(r.gpu.index): r for r in snapshot.gpus} | {r.gpu.uuid.lower(): r for r in snapshot.gpus}
    found = []
    for wanted in gpu_ids:
        reading = by_name.get(str(wanted).lower())
        if reading is None:
            known = ", ".join(f"{r.gpu.index} ({r.gpu.uuid})" for r in snapshot.gpus)
            raise BadRequest(f"There is no GPU {wanted!r} here. Known: {known}.", param="gpu_ids")
        if reading in found:
            raise BadRequest(f"GPU {wanted!r} is named twice.", param="gpu_ids")
        found.append(reading)
    return found


def _count(wish: PlacementWish, snapshot: Snapshot, named: Sequence[GpuReading] | None) -> int:
    """How many GPUs are wanted: those named, a number, an explicit tensor (x pipeline) size, or all of them."""
    if named is not None:
        if wish.gpu_count not in {None, len(named)}:
            raise BadRequest(f"gpu_count is {wish.gpu_count}, but gpu_ids names {len(named)}.", param="gpu_count")
        return len(named)
    if wish.gpu_count is not None:
        count, field = wish.gpu_count, "gpu_count"
    elif wish.tensor_parallel_size is not None:
        count, field = wish.tensor_parallel_size * (wish.pipeline_parallel_size or 1), "tensor_parallel_size"
    else:
        return len(snapshot.gpus)
    if count > len(snapshot.gpus):
        raise BadRequest(f"{count} GPUs are wanted, this daemon may use {len(snapshot.gpus)}.", param=field)
    return count


def parallel_sizes(wish: PlacementWish, gpus: int, available: int, heads: int | None) -> tuple[int, int]:
    """Tensor and pipeline parallel size. Their product is the number of GPUs, and tensor divides the heads."""
    pipeline = wish.pipeline_parallel_size or 1
    tensor = wish.tensor_parallel_size or gpus // pipeline
    if tensor * pipeline != gpus:
        field = "pipeline_parallel_size" if wish.tensor_parallel_size is None else "tensor_parallel_size"
        asked = f"{tensor} x {pipeline}" if wish.tensor_parallel_size else f"a multiple of {pipeline}"
        raise BadRequest(f"{gpus} GPUs do not fit: tensor x pipeline parallel size asks for {asked}.", param=field)
    if heads is not None and heads % tensor:
        fitting = [t * pipeline for t in range(1, available // pipeline + 1) if heads % t == 0]
        field = "gpu_count" if wish.tensor_parallel_size is None else "tensor_parallel_size"
        counts = ", ".join(str(n) for n in fitting)
        raise BadRequest(
            f"The model has {heads} attention heads, which {tensor} does not divide. Numbers of GPUs that fit"
            f"{f' with pipeline_parallel_size {pipeline}' if pipeline > 1 else ''}: {counts}.",
            param=field,
        )
    return tensor, pipeline


def refuse_what_cpu_has_not(wish: PlacementWish) -> None:
    """Raise ``BadRequest`` for a wish that only GPUs could meet."""
    if wish.gpu_share is not None:
        raise BadRequest("This machine has no NVIDIA GPU: gpu_share means nothing here.", param="gpu_share")
    for field in ("gpu_count", "tensor_parallel_size", "pipeline_parallel_size"):
        if (getattr(wish, field) or 1) != 1:
            raise BadRequest(f"This machine has no NVIDIA GPU: {field} must be 1 on '{CPU_UUID}'.", param=field)
