"""Would a model find place if some were gone and others had come? PURE: claims and readings in, yes or no out.

Placement itself is asked (``gpus.placement``, ``gpus.replicas``), over a copy of the claims without those of the models
that are gone, and with those of the models that come first. What the engines of those that are gone use of a GPU is
counted as coming back, but not what strangers are seen to use: nobody is put away for a GPU that is busy then. The
launch that follows measures again. Nothing here claims, waits or knows engines.

It speaks of one moment and is asked the same again and again then: most models of a long catalogue ask for the same.
So an answer is kept for all models that ask for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from vllm_bootstrap.engines.base import Placement
from vllm_bootstrap.errors import ApiError, BadRequest, GpuConflict
from vllm_bootstrap.gpus.condition import GpuState, assess, others_use
from vllm_bootstrap.gpus.ledger import WHOLE, Claim, Ledger, LedgerConflict
from vllm_bootstrap.gpus.placement import PlacementWish, named_gpus, place
from vllm_bootstrap.gpus.readings import GpuProcess, GpuReading, Snapshot
from vllm_bootstrap.gpus.replicas import place_replicas

MIN_MEMORY = "gpus.min_memory"


@dataclass(frozen=True, slots=True)
class Need:
    """What one model asks for. ``launches`` are those it has. ``claims``: it sleeps and wants exactly these back.
    ``anywhere``: its engine runs elsewhere and needs nothing here."""

    wish: PlacementWish = field(default_factory=PlacementWish)
    replicas: int | Literal["per_gpu"] = 1
    min_memory: int | None = None
    launches: frozenset[str] = frozenset()
    claims: tuple[Claim, ...] = ()
    anywhere: bool = False


class Rooms:
    """See ``planning.Room``. ``needs`` by model. What is given here must not change while it is asked."""

    def __init__(
        self,
        needs: Mapping[str, Need],
        snapshot: Snapshot,
        ledger: Ledger,
        unsettled: Mapping[str, str],
        *,
        busy_bytes: int,
        replicas_max: int,
        own_pids: frozenset[int] | None = None,
    ) -> None:
        self._needs, self._snapshot, self._ledger, self._unsettled = needs, snapshot, ledger, unsettled
        self._busy_bytes, self._replicas_max, self._own_pids = busy_bytes, replicas_max, own_pids
        self._forms: dict[str, Need] = {}
        self._known: dict[tuple[Need, frozenset[str], tuple[Need, ...]], ApiError | None] = {}

    def fits(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> bool:
        key = (self._form(name), gone, tuple([self._form(one) for one in coming]))
        if key not in self._known:
            self._known[key] = self._refusal(name, gone, coming)
        return self._known[key] is None

    def fits_elsewhere(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> bool:
        """For one that sleeps: whether it would find place if it were unloaded and loaded anew."""
        need = replace(self._needs[name], claims=())
        return self._refusal_of(need, gone | {name}, coming) is None

    def _form(self, name: str) -> Need:
        """What it asks for, whoever it is."""
        form = self._forms.get(name)
        if form is None:
            form = self._forms[name] = replace(self._needs[name], launches=frozenset())
        return form

    def refusal(self, name: str) -> ApiError | None:
        """Why there is no room for it now, None when there is."""
        return self._refusal(name, frozenset(), ())

    def _refusal(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> ApiError | None:
        """Why there would be none."""
        return self._refusal_of(self._needs[name], gone, coming)

    def _refusal_of(self, need: Need, gone: frozenset[str], coming: tuple[str, ...]) -> ApiError | None:
        owners = frozenset().union(*(self._needs[one].launches for one in gone if one in self._needs))
        ledger, snapshot = _without(self._ledger, self._snapshot, owners, self._own_pids)
        for number, one in enumerate(coming):
            try:
                self._take(f"coming {number}", self._needs[one], ledger, snapshot)
            except ApiError:
                continue  # it was decided for another state of things; its own turn tells
        try:
            self._take("wanted", need, ledger, snapshot)
        except ApiError as error:
            return error
        return None

    def named(self, name: str) -> tuple[str, ...] | None:
        """The GPUs that a launch of it must name because its wish cannot be said otherwise (a minimum of memory); None
        where it need not name any, or none would do."""
        need = self._needs[name]
        if need.min_memory is None or need.anywhere:
            return None
        try:
            placed = self._place(need, self._ledger, self._snapshot)
        except ApiError:
            return None
        return tuple(dict.fromkeys(gpu.uuid for one in placed for gpu in one.gpus))  # replicas may share one

    def _take(self, owner: str, need: Need, ledger: Ledger, snapshot: Snapshot) -> None:
        if need.anywhere:
            return
        if need.claims:
            for claim in need.claims:
                self._refuse_busy(claim.uuid, ledger, snapshot)
                _claim(ledger, f"{owner} {claim.uuid}", (claim.uuid,), claim.share_milli, shared=claim.shared)
            return
        for number, placed in enumerate(self._place(need, ledger, snapshot)):
            uuids = [gpu.uuid for gpu in placed.gpus]
            _claim(ledger, f"{owner} {number}", uuids, placed.share_milli, shared=placed.share_milli < WHOLE)

    def _refuse_busy(self, uuid: str, ledger: Ledger, snapshot: Snapshot) -> None:
        """Raise where a launch could not wake for what is on its GPU beside ours."""
        reading = snapshot.reading(uuid)
        if reading is None:
            raise GpuConflict(f"GPU {uuid} cannot be seen any more.")
        found = assess(reading, snapshot, ledger, self._unsettled, busy_bytes=self._busy_bytes, own_pids=self._own_pids)
        if found.is_busy or found.state in (GpuState.UNKNOWN, GpuState.UNSETTLED):
            raise GpuConflict(f"GPU {reading.gpu.index} {found.reason}.")

    def _place(self, need: Need, ledger: Ledger, snapshot: Snapshot) -> list[Placement]:
        seen = _large_enough(need, snapshot)
        if need.replicas == 1:
            one = place(need.wish, seen, ledger, self._unsettled, busy_bytes=self._busy_bytes, own_pids=self._own_pids)
            return [one]
        return place_replicas(
            need.wish, need.replicas, seen, ledger, self._unsettled,
            busy_bytes=self._busy_bytes, most=self._replicas_max, own_pids=self._own_pids,
        )  # fmt: skip


def _claim(ledger: Ledger, owner: str, uuids: Sequence[str], milli: int, *, shared: bool) -> None:
    try:
        ledger.claim(owner, uuids, milli, shared)
    except LedgerConflict as exc:
        raise ApiError(str(exc)) from exc


def _large_enough(need: Need, snapshot: Snapshot) -> Snapshot:
    """The GPUs it may have. One whose size is not known could be large enough. Raises ``BadRequest`` where none ever
    will be."""
    least = need.min_memory
    if least is None or snapshot.kind == "cpu" or not snapshot.gpus:
        return snapshot
    if need.wish.gpu_ids is not None:
        for reading in named_gpus(need.wish.gpu_ids, snapshot):
            if 0 < reading.gpu.total_bytes < least:
                raise BadRequest(
                    f"GPU {reading.gpu.index} has {_gib(reading.gpu.total_bytes)} of memory, and {_gib(least)} are "
                    "wanted of each.",
                    param=MIN_MEMORY,
                )
    large = tuple(_sized(reading) for reading in snapshot.gpus if not 0 < reading.gpu.total_bytes < least)
    if not large and snapshot.unknown is None:
        most = max(reading.gpu.total_bytes for reading in snapshot.gpus)
        raise BadRequest(f"No GPU here has {_gib(least)} of memory, the largest has {_gib(most)}.", param=MIN_MEMORY)
    return replace(snapshot, gpus=large)


def _sized(reading: GpuReading) -> GpuReading:
    if reading.gpu.total_bytes or reading.unknown is not None:
        return reading
    return replace(reading, unknown="it does not say how much memory it has")


def _gib(size: int) -> str:
    return f"{size / 1024**3:.6g} GiB"


def _without(
    ledger: Ledger, snapshot: Snapshot, owners: Iterable[str], own_pids: frozenset[int] | None
) -> tuple[Ledger, Snapshot]:
    """Claims and readings as they would be without these owners."""
    gone = frozenset(owners)
    held: dict[str, list[Claim]] = {}
    readings: list[GpuReading] = []
    for reading in snapshot.gpus:
        uuid = reading.gpu.uuid
        claims = ledger.claims_on(uuid)
        for owner, claim in claims.items():
            if owner not in gone:
                held.setdefault(owner, []).append(claim)
        back = sum(claim.share_milli for owner, claim in claims.items() if owner in gone)
        if back:
            _, strangers = others_use(
                reading, ledger.claimed_milli(uuid), own_pids=own_pids, pids_trusted=snapshot.pids_trusted
            )
            reading = _freed(reading, back, strangers)  # noqa: PLW2901 - as it will be
        readings.append(reading)
    copy = Ledger()
    copy.restore(held)
    sleepers = {owner for reading in snapshot.gpus for owner in ledger.parked_on(reading.gpu.uuid)} - gone
    copy.restore_parked({owner: ledger.parked(owner) for owner in sleepers})
    return copy, replace(snapshot, gpus=tuple(readings))


def _freed(reading: GpuReading, milli: int, strangers: tuple[GpuProcess, ...]) -> GpuReading:
    """A GPU after so many thousandths of it were given back. ``strangers``: processes there that are not ours."""
    if reading.used_bytes is None:
        return replace(reading, processes=strangers)
    theirs = sum(process.used_bytes or 0 for process in strangers)
    rest = 0 if milli >= WHOLE else reading.used_bytes - reading.gpu.total_bytes * milli // WHOLE
    return replace(reading, used_bytes=max(theirs, rest), processes=strangers)
