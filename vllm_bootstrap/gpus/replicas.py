"""Which GPUs do the replicas of one launch request get? All of them a place, or none. PURE.

Every wish resolves to exactly one outcome, in this order:

1. no device can be judged → ``GpuUnknown``
2. ``per_gpu``: one replica on each GPU that has room, among those named or all (on ``cpu``: in each free slot). A
   number of GPUs or a parallel size above 1 contradicts it → ``BadRequest``; no GPU has room → as in 6
3. a number: the GPUs of one replica are ``gpu_count``, else tensor x pipeline parallel size, else one where GPUs are
   shared, else the GPUs named (or all) divided evenly; not even → ``BadRequest``
4. named GPUs that would be left over, or more replicas than this machine could ever hold → ``BadRequest`` with the
   number that fits
5. all have room → placements. A replica takes the GPUs with the most room, in the order named or by index, so that
   replicas that share GPUs are spread over them; two parts of one replica never share a GPU
6. not all have room → ``GpuConflict`` with the number that fits now, or ``GpuUnknown`` when what is not known could
   make up the number

Invariant: as in ``placement``, a GPU is given out only when it is known to have room. Nothing here claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vllm_bootstrap.engines.base import Placement
from vllm_bootstrap.errors import BadRequest, GpuConflict, GpuUnknown
from vllm_bootstrap.gpus.ledger import WHOLE, Ledger
from vllm_bootstrap.gpus.placement import (
    UNKNOWN_RETRY_S,
    Candidate,
    PlacementWish,
    candidates,
    details_of,
    named_gpus,
    parallel_sizes,
    refuse_unjudged,
    refuse_what_cpu_has_not,
    share_milli,
)
from vllm_bootstrap.gpus.readings import Snapshot

Replicas = int | Literal["per_gpu"]


def place_replicas(
    wish: PlacementWish,
    replicas: Replicas,
    snapshot: Snapshot,
    ledger: Ledger,
    unsettled: Mapping[str, str],
    *,
    busy_bytes: int,
    most: int,
    heads: int | None = None,
    own_pids: frozenset[int] | None = None,
) -> list[Placement]:
    """Choose for each replica. ``most``: so many the operator allows; the rest as in ``placement.place``.

    Raises ``GpuUnknown``, ``GpuConflict`` and ``BadRequest``.
    """
    refuse_unjudged(snapshot)  # 1
    if snapshot.kind == "cpu":
        refuse_what_cpu_has_not(wish)
    milli = share_milli(wish, snapshot)
    readings = snapshot.gpus if wish.gpu_ids is None else named_gpus(wish.gpu_ids, snapshot)
    pool = candidates(readings, snapshot, ledger, unsettled, milli, busy_bytes=busy_bytes, own_pids=own_pids)
    named = wish.gpu_ids is not None
    room = [_room(one, milli) for one in pool]
    if replicas == "per_gpu":  # 2
        _refuse_more_than_one_gpu(wish)
        room = room if snapshot.kind == "cpu" else [min(1, claims) for claims in room]
        group = _Group(sum(room), 1, milli, snapshot.kind, named=named, per_gpu=True)
    else:
        size = 1 if snapshot.kind == "cpu" else _size(wish, replicas, len(pool), milli)  # 3
        group = _Group(replicas, size, milli, snapshot.kind, named=named)
    _refuse_more_than(most, group.replicas)
    tensor, pipeline = parallel_sizes(wish, group.size, len(pool), heads)
    _refuse_impossible(group, pool)  # 4
    chosen = _spread(group, pool, room)
    if not chosen or len(chosen) < group.replicas:  # 6
        raise _no_room(group, pool, fit=len(chosen))
    return [Placement(snapshot.kind, tuple(c.reading.gpu for c in each), milli, tensor, pipeline) for each in chosen]


def refuse_contradictions(wish: PlacementWish, replicas: Replicas, *, most: int | None = None) -> None:
    """Raise ``BadRequest`` for a wish that no machine at all could meet, whatever GPUs it has. ``most``: so many
    replicas the operator allows."""
    seen = set[str]()
    for one in wish.gpu_ids or ():
        if str(one).lower() in seen:
            raise BadRequest(f"GPU {one!r} is named twice.", param="gpu_ids")
        seen.add(str(one).lower())
    if replicas == "per_gpu":
        _refuse_more_than_one_gpu(wish)
        return
    _refuse_more_than(most, replicas)
    count = wish.gpu_count
    if replicas == 1 and wish.gpu_ids is not None:
        if count not in {None, len(seen)}:
            raise BadRequest(f"gpu_count is {count}, but gpu_ids names {len(seen)}.", param="gpu_count")
        count = len(seen)
    if count is not None:
        parallel_sizes(wish, count, count, None)


@dataclass(frozen=True, slots=True)
class _Group:
    """``size``: the GPUs of each replica. ``named``: they were asked for by name. ``per_gpu``: ``replicas`` is what was
    found free."""

    replicas: int
    size: int
    milli: int
    kind: str
    named: bool
    per_gpu: bool = False

    @property
    def what(self) -> str:
        if self.per_gpu:
            return "One replica on each free GPU"
        if self.kind == "cpu":
            return f"{self.replicas} replicas"
        part = f"{self.milli / 10:g} % of " if self.milli < WHOLE else ""
        return f"{self.replicas} replicas on {part}{self.size} GPU{'s' if self.size > 1 else ''} each"


def _refuse_more_than_one_gpu(wish: PlacementWish) -> None:
    for field in ("gpu_count", "tensor_parallel_size", "pipeline_parallel_size"):
        if (getattr(wish, field) or 1) != 1:
            raise BadRequest(
                f"replicas 'per_gpu' puts one engine on each GPU: {field} must be 1, or replicas a number.", param=field
            )


def _size(wish: PlacementWish, replicas: int, gpus: int, milli: int) -> int:
    """GPUs of one replica."""
    pipeline = wish.pipeline_parallel_size or 1
    if wish.gpu_count is not None:
        return wish.gpu_count
    if wish.tensor_parallel_size is not None:
        return wish.tensor_parallel_size * pipeline
    if milli < WHOLE:
        return pipeline
    if gpus % replicas:
        message = (
            f"{gpus} GPUs cannot be divided evenly among {replicas} replicas: give gpu_count, the number for each."
        )
        if replicas > gpus:
            message = f"{replicas} replicas take a GPU each, and there are {gpus}: ask for fewer, or give gpu_share."
        raise BadRequest(message, param="replicas")
    return gpus // replicas


def _refuse_more_than(most: int | None, replicas: int) -> None:
    if most is not None and replicas > most:
        raise BadRequest(
            f"{replicas} replicas are wanted, VLLM_BOOTSTRAP_REPLICAS_MAX allows {most}.", param="replicas"
        )


def _refuse_impossible(group: _Group, pool: Sequence[Candidate]) -> None:
    if group.per_gpu:
        return
    wanted = group.replicas * group.size
    idle = [WHOLE // group.milli for _ in pool]
    could = len(_spread(group, pool, idle))
    if could < group.replicas:
        where = "VLLM_BOOTSTRAP_CPU_SLOTS allows" if group.kind == "cpu" else f"on {len(pool)} GPUs there is room for"
        raise BadRequest(f"{group.what} are wanted: {where} {could}.", param="replicas")
    if group.named and (wanted < len(pool) or (group.milli == WHOLE and wanted != len(pool))):
        raise BadRequest(f"{group.what} take {wanted} GPUs, but gpu_ids names {len(pool)}.", param="gpu_ids")


def _room(candidate: Candidate, milli: int) -> int:
    """How many claims of ``milli`` a GPU has room for now."""
    return 0 if candidate.refusal is not None else (WHOLE - candidate.claimed_milli) // milli


def _spread(group: _Group, pool: Sequence[Candidate], room: Sequence[int]) -> list[list[Candidate]]:
    """As many replicas as there is room for, at most those wanted. Taking the GPUs with the most room each time fits
    as many as any other way."""
    left = list(room)
    chosen: list[list[Candidate]] = []
    while len(chosen) < group.replicas:
        best = sorted((i for i, n in enumerate(left) if n), key=lambda i: (-left[i], i))[: group.size]
        if len(best) < group.size:
            break
        for i in best:
            left[i] -= 1
        chosen.append([pool[i] for i in sorted(best)])
    return chosen


def _no_room(group: _Group, pool: Sequence[Candidate], *, fit: int) -> GpuConflict | GpuUnknown:
    full = [one for one in pool if one.refusal is not None or one.claimed_milli]
    why = "; ".join(one.refusal or f"GPU {one.reading.gpu.index} {one.condition.reason}" for one in full)
    message = f"{group.what}: {'none is' if group.per_gpu else f'{fit} fit'}. {why}."
    details = {"gpus": details_of(full), "replicas_that_fit": fit}
    whole, wanted = WHOLE // group.milli, max(1, group.replicas)
    perhaps = [whole if one.unknown else _room(one, group.milli) for one in pool]
    if len(_spread(replace(group, replicas=wanted), pool, perhaps)) >= wanted:
        return GpuUnknown(message, retry_after=UNKNOWN_RETRY_S, details=details)
    return GpuConflict(message, param="gpu_ids" if group.named else "replicas", details=details)
