from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from vllm_bootstrap.engines.base import Gpu
from vllm_bootstrap.errors import BadRequest, GpuUnknown
from vllm_bootstrap.gpus.ledger import Claim, Ledger
from vllm_bootstrap.gpus.placement import PlacementWish
from vllm_bootstrap.gpus.readings import GpuProcess, GpuReading, Snapshot
from vllm_bootstrap.gpus.replicas import place_replicas
from vllm_bootstrap.models.rooms import Need, Rooms

GIB = 1024**3


def gpu(index: int, gib: int = 80, used: int | None = 0) -> GpuReading:
    return GpuReading(Gpu(f"GPU-{index}", index, "H", gib * GIB), None if used is None else used * GIB)


class Here:
    def __init__(self, *gpus: GpuReading, kind: Any = "cuda", **options: Any) -> None:
        self.ledger, self.snapshot = Ledger(), Snapshot(kind, gpus or (gpu(0), gpu(1)), **options)
        self.needs: dict[str, Need] = {}

    def runs(self, name: str, *uuids: str, milli: int = 1000) -> None:
        self.ledger.claim(f"l-{name}", uuids, milli, milli < 1000)
        self.needs[name] = Need(launches=frozenset({f"l-{name}"}))

    def wants(self, name: str, count: int | None = 1, **fields: Any) -> None:
        share = fields.pop("share", None)
        self.needs[name] = Need(PlacementWish(gpu_count=count, gpu_share=share), **fields)

    @property
    def rooms(self) -> Rooms:
        return Rooms(self.needs, self.snapshot, self.ledger, {}, busy_bytes=GIB, replicas_max=8)

    def fits(self, name: str, *gone: str, coming: tuple[str, ...] = ()) -> bool:
        return self.rooms.fits(name, frozenset(gone), coming)


def test_a_free_gpu_is_room_and_an_owned_one_is_not() -> None:
    here = Here()
    here.wants("a")
    assert here.fits("a")
    assert here.rooms.refusal("a") is None
    here.runs("x", "GPU-0", "GPU-1")
    assert not here.fits("a")
    assert "owned" in here.rooms.refusal("a").message  # type: ignore[union-attr]
    assert here.fits("a", "x")
    assert not here.fits("a", "nobody")


def test_what_an_engine_that_goes_uses_comes_back() -> None:
    here = Here(gpu(0, used=70))
    here.wants("a")
    assert not here.fits("a"), "strangers"
    here.runs("x", "GPU-0")
    assert here.fits("a", "x")


def test_what_strangers_use_beside_an_engine_does_not_come_back() -> None:
    ours, stranger = GpuProcess(7, used_bytes=60 * GIB), GpuProcess(8, used_bytes=10 * GIB)
    here = Here(replace(gpu(0, used=70), processes=(ours, stranger)))
    here.runs("x", "GPU-0")
    here.wants("a")
    rooms = partial(Rooms, here.needs, here.snapshot, here.ledger, {}, busy_bytes=GIB, replicas_max=8)
    assert not rooms(own_pids=frozenset({7})).fits("a", frozenset({"x"}), ()), "x would go for nothing"
    assert rooms(own_pids=frozenset({7, 8})).fits("a", frozenset({"x"}), ())
    assert rooms(own_pids=None).fits("a", frozenset({"x"}), ()), "whose they are is not known"


def test_strangers_beside_what_stays_are_seen_too() -> None:
    processes = (
        GpuProcess(6, used_bytes=30 * GIB),
        GpuProcess(7, used_bytes=30 * GIB),
        GpuProcess(8, used_bytes=10 * GIB),
    )
    here = Here(replace(gpu(0, used=70), processes=processes))
    here.runs("x", "GPU-0", milli=500)
    here.runs("y", "GPU-0", milli=400)
    here.wants("half", share=0.5)
    rooms = partial(Rooms, here.needs, here.snapshot, here.ledger, {}, busy_bytes=GIB, replicas_max=8)
    assert not rooms(own_pids=frozenset({6, 7})).fits("half", frozenset({"x"}), ())
    assert rooms(own_pids=frozenset({6, 7, 8})).fits("half", frozenset({"x"}), ())


def sleeper(here: Here, uuid: str, **fields: Any) -> None:
    here.ledger.claim("l-s", [uuid])
    here.ledger.park("l-s", {uuid: GIB // 2})
    claims = tuple(each.claim for each in here.ledger.parked("l-s"))
    here.needs["s"] = Need(PlacementWish(gpu_count=1), launches=frozenset({"l-s"}), claims=claims, **fields)


def test_a_sleeper_wakes_where_it_was_if_nothing_else_is_there() -> None:
    here = Here(gpu(0, used=1), gpu(1))
    sleeper(here, "GPU-0")
    assert here.fits("s")
    strangers = Here(gpu(0, used=40), gpu(1))
    sleeper(strangers, "GPU-0")
    assert not strangers.fits("s")
    assert strangers.rooms.fits_elsewhere("s", frozenset(), ())
    vanished = Here(gpu(1))
    sleeper(vanished, "GPU-0")
    assert "cannot be seen" in vanished.rooms.refusal("s").message  # type: ignore[union-attr]
    for why in ({"unsettled": {"GPU-0": "slow"}}, {}):
        snapshot = here.snapshot if why else replace(here.snapshot, unknown="NVML is gone")
        rooms = Rooms(here.needs, snapshot, here.ledger, why.get("unsettled", {}), busy_bytes=GIB, replicas_max=8)
        assert not rooms.fits("s", frozenset(), ())


def test_a_sleeper_whose_gpu_is_taken_for_good_finds_place_elsewhere() -> None:
    here = Here()
    sleeper(here, "GPU-0")
    here.runs("x", "GPU-0")
    assert not here.fits("s")
    assert here.rooms.fits_elsewhere("s", frozenset(), ())
    here.wants("y")
    assert not here.rooms.fits_elsewhere("s", frozenset(), ("y",))


def test_a_part_of_a_gpu_comes_back_in_part() -> None:
    here = Here(gpu(0, used=60))
    here.runs("x", "GPU-0", milli=500)
    here.runs("y", "GPU-0", milli=400)
    here.wants("half", share=0.5)
    here.wants("most", share=0.8)
    assert here.fits("half", "x")
    assert not here.fits("most", "x")
    assert here.fits("most", "x", "y")


def test_a_gpu_that_does_not_tell_its_use_is_left_as_it_is() -> None:
    here = Here(replace(gpu(0), used_bytes=None))
    here.runs("x", "GPU-0", milli=500)
    here.wants("half", share=0.5)
    assert here.fits("half", "x")


def test_those_that_come_first_take_their_place() -> None:
    here = Here()
    for name in ("a", "b", "c"):
        here.wants(name)
    assert here.fits("c", coming=("a",))
    assert not here.fits("c", coming=("a", "b"))
    here.wants("huge", 9)
    assert here.fits("c", coming=("huge", "a")), "one that cannot be placed takes nothing"


def test_replicas() -> None:
    here = Here()
    here.wants("two", 1, replicas=2)
    here.wants("each", None, replicas="per_gpu")
    here.wants("a")
    assert here.fits("two")
    assert not here.fits("a", coming=("two",))
    assert here.fits("each")
    assert not here.fits("each", coming=("each",))


def test_a_sleeping_model_wants_exactly_what_it_had() -> None:
    here = Here()
    here.runs("x", "GPU-0")
    here.needs["z"] = Need(claims=(Claim("GPU-0", 1000, shared=False),), launches=frozenset({"l-z"}))
    assert not here.fits("z")
    assert here.fits("z", "x")
    here.needs["z"] = Need(claims=(Claim("GPU-1", 1000, shared=False),))
    assert here.fits("z")


def test_what_sleeping_engines_still_use_is_not_strangers_use() -> None:
    here = Here(gpu(0, used=3))
    here.ledger.claim("l-z", ["GPU-0"])
    here.ledger.park("l-z", {"GPU-0": 3 * GIB})
    here.wants("a")
    assert here.fits("a")
    here.needs["z"] = Need(claims=(Claim("GPU-0", 1000, shared=False),), launches=frozenset({"l-z"}))
    assert here.fits("z")


def test_engines_that_run_elsewhere_need_nothing() -> None:
    here = Here()
    here.runs("x", "GPU-0", "GPU-1")
    here.wants("far", 1, anywhere=True)
    assert here.fits("far")
    here.wants("a")
    assert not here.fits("a", coming=("far",))
    assert here.rooms.named("far") is None


def test_a_minimum_of_memory_names_gpus() -> None:
    here = Here(gpu(0, 24), gpu(1, 80))
    here.wants("a", 1, min_memory=40 * GIB)
    assert here.fits("a")
    assert here.rooms.named("a") == ("GPU-1",)
    here.runs("x", "GPU-1")
    assert not here.fits("a")
    assert here.rooms.named("a") is None
    here.wants("b", 1, min_memory=100 * GIB)
    assert not here.fits("b")
    assert "100 GiB" in here.rooms.refusal("b").message  # type: ignore[union-attr]
    here.wants("c")
    assert here.rooms.named("c") is None


def test_a_minimum_of_memory_that_no_gpu_has_can_never_be_met() -> None:
    here = Here(gpu(0, 24), gpu(1, 80))
    here.wants("a", 1, min_memory=900 * 1024 * GIB)
    refusal = here.rooms.refusal("a")
    assert isinstance(refusal, BadRequest)
    assert refusal.message == "No GPU here has 921600 GiB of memory, the largest has 80 GiB."
    assert refusal.param == "gpus.min_memory"
    here.wants("b", 1, min_memory=900 * 1024 * GIB, replicas="per_gpu")
    assert isinstance(here.rooms.refusal("b"), BadRequest)
    here.wants("c", 2, min_memory=40 * GIB)
    assert isinstance(here.rooms.refusal("c"), BadRequest)
    here.needs["d"] = Need(PlacementWish(gpu_ids=(0, "GPU-1")), min_memory=40 * GIB)
    refusal = here.rooms.refusal("d")
    assert isinstance(refusal, BadRequest)
    assert refusal.message == "GPU 0 has 24 GiB of memory, and 40 GiB are wanted of each."
    here.needs["e"] = Need(PlacementWish(gpu_ids=(1,)), min_memory=40 * GIB)
    assert here.fits("e")


def test_a_minimum_of_memory_where_sizes_are_not_known_stays_unknown() -> None:
    for here in (Here(gpu(0, 0), gpu(1, 24)), Here(gpu(0, 24), unknown="NVML is gone"), Here(gpu(0, 0))):
        here.wants("a", 1, min_memory=40 * GIB)
        assert isinstance(here.rooms.refusal("a"), GpuUnknown)
    gone = Here(gpu(0))
    gone.snapshot = replace(gone.snapshot, gpus=(), unknown="NVML does not answer")
    gone.wants("a", 1, min_memory=40 * GIB)
    assert isinstance(gone.rooms.refusal("a"), GpuUnknown)
    assert "NVML does not answer" in gone.rooms.refusal("a").message  # type: ignore[union-attr]


def test_without_gpus_memory_means_nothing() -> None:
    here = Here(gpu(0), kind="cpu")
    here.wants("a", None, min_memory=400 * GIB)
    assert here.fits("a")


def test_what_was_asked_before_changes_no_answer() -> None:
    here = Here(gpu(0), gpu(1), gpu(2))
    here.runs("x", "GPU-0")
    here.runs("y", "GPU-1")
    here.wants("a")
    here.wants("b")
    here.wants("two", 2)
    here.wants("half", share=0.5)
    questions = [
        (name, gone, coming)
        for name in ("a", "b", "two", "half")
        for gone in ((), ("x",), ("x", "y"))
        for coming in ((), ("b",), ("two",), ("half", "half"), ("two", "b"))
    ]
    asked_before = here.rooms
    answers = [asked_before.fits(name, frozenset(gone), coming) for name, gone, coming in questions]
    assert answers == [here.fits(name, *gone, coming=coming) for name, gone, coming in questions]
    assert any(answers)
    assert not all(answers)


def test_replicas_name_large_gpus_too_and_are_placed_there() -> None:
    here = Here(gpu(0, gib=24), gpu(1), gpu(2))
    here.wants("a", min_memory=40 * GIB, replicas=2)
    here.wants("shared", min_memory=40 * GIB, replicas=4, share=0.5)
    for name, replicas, share in (("a", 2, None), ("shared", 4, 0.5)):
        named = here.rooms.named(name)
        assert named == ("GPU-1", "GPU-2")
        wish = PlacementWish(gpu_ids=named, gpu_count=1, gpu_share=share)
        placed = place_replicas(wish, replicas, here.snapshot, here.ledger, {}, busy_bytes=GIB, most=8)
        assert {gpu.uuid for one in placed for gpu in one.gpus} == {"GPU-1", "GPU-2"}
