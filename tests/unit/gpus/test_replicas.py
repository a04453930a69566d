from __future__ import annotations

from typing import Any

import pytest

from tests.support.gpus import GIB, box, cpu_box, reading
from vllm_bootstrap.engines.base import Placement
from vllm_bootstrap.errors import BadRequest, GpuConflict, GpuUnknown
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.placement import PlacementWish
from vllm_bootstrap.gpus.readings import Snapshot
from vllm_bootstrap.gpus.replicas import place_replicas

LOST = "nvmlDeviceGetHandleByIndex: GPU is lost"


def put(
    snapshot: Snapshot,
    replicas: Any,
    claims: dict[str, tuple[list[str], int]] | None = None,
    *,
    heads: int | None = None,
    most: int = 64,
    unsettled: dict[str, str] | None = None,
    **wish: Any,
) -> list[Placement]:
    ledger = Ledger()
    for owner, (uuids, milli) in (claims or {}).items():
        ledger.claim(owner, uuids, milli, milli < 1000)
    return place_replicas(
        PlacementWish(**wish), replicas, snapshot, ledger, unsettled or {}, busy_bytes=GIB, most=most, heads=heads
    )


def indices(placements: list[Placement]) -> list[list[int]]:
    return [[gpu.index for gpu in placement.gpus] for placement in placements]


# Which GPUs


@pytest.mark.parametrize(
    ("replicas", "wish", "taken", "sizes"),
    [
        (2, {}, [[0, 1], [2, 3]], (2, 1)),
        (4, {}, [[0], [1], [2], [3]], (1, 1)),
        (2, {"gpu_count": 1}, [[0], [1]], (1, 1)),
        (2, {"tensor_parallel_size": 1}, [[0], [1]], (1, 1)),
        (2, {"tensor_parallel_size": 2}, [[0, 1], [2, 3]], (2, 1)),
        (2, {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}, [[0, 1], [2, 3]], (1, 2)),
        (2, {"pipeline_parallel_size": 2}, [[0, 1], [2, 3]], (1, 2)),
        (2, {"gpu_count": 2, "pipeline_parallel_size": 2}, [[0, 1], [2, 3]], (1, 2)),
        (2, {"gpu_ids": (3, 1)}, [[3], [1]], (1, 1)),
        (2, {"gpu_ids": (3, 1, 0, "GPU-2")}, [[3, 1], [0, 2]], (2, 1)),
        (2, {"gpu_ids": (3, 1), "gpu_count": 1}, [[3], [1]], (1, 1)),
        ("per_gpu", {}, [[0], [1], [2], [3]], (1, 1)),
        ("per_gpu", {"gpu_ids": (3, 1)}, [[3], [1]], (1, 1)),
        ("per_gpu", {"gpu_count": 1, "tensor_parallel_size": 1}, [[0], [1], [2], [3]], (1, 1)),
    ],
)
def test_each_replica_gets_gpus_of_its_own(replicas: Any, wish: dict[str, Any], taken: Any, sizes: Any) -> None:
    placements = put(box(count=4), replicas, **wish)
    assert indices(placements) == taken
    assert {(p.tensor_parallel_size, p.pipeline_parallel_size) for p in placements} == {sizes}
    assert {(p.kind, p.share_milli) for p in placements} == {("cuda", 1000)}


@pytest.mark.parametrize(
    ("replicas", "wish", "taken"),
    [
        (2, {"gpu_share": 0.5, "gpu_ids": (0,)}, [[0], [0]]),
        (4, {"gpu_share": 0.5, "gpu_ids": (0, 1)}, [[0], [1], [0], [1]]),
        (3, {"gpu_share": 0.5}, [[0], [1], [2]]),
        (6, {"gpu_share": 0.3}, [[0], [1], [2], [3], [0], [1]]),
        (4, {"gpu_share": 0.5, "gpu_count": 2}, [[0, 1], [2, 3], [0, 1], [2, 3]]),
        (2, {"gpu_share": 0.5, "pipeline_parallel_size": 2}, [[0, 1], [2, 3]]),
        ("per_gpu", {"gpu_share": 0.5}, [[0], [1], [2], [3]]),
        (2, {"gpu_share": 1.0, "gpu_ids": (0, 1)}, [[0], [1]]),
    ],
)
def test_replicas_that_share_are_spread_over_the_gpus(replicas: Any, wish: dict[str, Any], taken: Any) -> None:
    assert indices(put(box(count=4), replicas, **wish)) == taken


def test_what_others_own_is_left_alone_and_what_they_share_is_filled_last() -> None:
    claims = {"whole": (["GPU-0"], 1000), "half": (["GPU-1"], 500)}
    assert indices(put(box(count=4), 2, claims, gpu_count=1)) == [[2], [3]]
    assert indices(put(box(count=4), 5, claims, gpu_share=0.5)) == [[2], [3], [1], [2], [3]]
    assert indices(put(box(count=4), "per_gpu", claims)) == [[2], [3]]
    assert indices(put(box(count=4), "per_gpu", claims, gpu_share=0.5)) == [[1], [2], [3]]


def test_one_on_each_gpu_takes_what_is_free_and_nothing_else() -> None:
    snapshot = box(reading(0, 40), reading(1), reading(2, None, unknown=LOST), reading(3), reading(4))
    assert indices(put(snapshot, "per_gpu", unsettled={"GPU-3": "memory stays"})) == [[1], [4]]
    assert indices(put(snapshot, "per_gpu", gpu_ids=(0, 1))) == [[1]]


def test_slots_are_the_gpus_of_a_cpu() -> None:
    assert indices(put(cpu_box(3), 2)) == [[0], [0]]
    assert {p.share_milli for p in put(cpu_box(3), 2)} == {333}
    assert len(put(cpu_box(3), "per_gpu")) == 3
    assert len(put(cpu_box(3), "per_gpu", {"other": (["cpu"], 333)})) == 2
    assert len(put(cpu_box(1), "per_gpu")) == 1


# What cannot be


@pytest.mark.parametrize(
    ("replicas", "wish", "param", "said"),
    [
        (3, {}, "replicas", "4 GPUs cannot be divided evenly among 3 replicas: give gpu_count"),
        (5, {}, "replicas", "5 replicas take a GPU each, and there are 4: ask for fewer"),
        (5, {"gpu_count": 1}, "replicas", "on 4 GPUs there is room for 4"),
        (3, {"gpu_count": 2}, "replicas", "there is room for 2"),
        (2, {"gpu_count": 5}, "replicas", "there is room for 0"),
        (9, {"gpu_share": 0.5}, "replicas", "9 replicas on 50 % of 1 GPU each are wanted: on 4 GPUs"),
        (2, {"gpu_share": 0.6, "gpu_ids": (0,)}, "replicas", "room for 1"),
        (2, {"gpu_ids": (0, 1, 2)}, "replicas", "divided evenly"),
        (2, {"gpu_ids": (0, 1, 2), "gpu_count": 1}, "gpu_ids", "take 2 GPUs, but gpu_ids names 3"),
        (2, {"gpu_ids": (0, 1, 2), "gpu_share": 0.5}, "gpu_ids", "take 2 GPUs, but gpu_ids names 3"),
        (2, {"gpu_ids": (0, 9)}, "gpu_ids", "no GPU 9"),
        (2, {"gpu_count": 2, "tensor_parallel_size": 1}, "tensor_parallel_size", "do not fit"),
        ("per_gpu", {"gpu_count": 2}, "gpu_count", "one engine on each GPU"),
        ("per_gpu", {"tensor_parallel_size": 2}, "tensor_parallel_size", "one engine on each GPU"),
        ("per_gpu", {"pipeline_parallel_size": 2}, "pipeline_parallel_size", "one engine on each GPU"),
    ],
)
def test_what_can_never_be_is_a_bad_request(replicas: Any, wish: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(BadRequest) as refused:
        put(box(count=4), replicas, **wish)
    assert (refused.value.param, said in refused.value.message) == (param, True), refused.value.message


def test_the_operator_bounds_the_number() -> None:
    for replicas in (4, "per_gpu"):
        with pytest.raises(BadRequest, match="VLLM_BOOTSTRAP_REPLICAS_MAX allows 3") as refused:
            put(box(count=4), replicas, most=3)
        assert refused.value.param == "replicas"
        assert len(put(box(count=4), replicas, most=4)) == 4


def test_heads_are_divided_by_each_replica() -> None:
    assert indices(put(box(count=4), 2, heads=14)) == [[0, 1], [2, 3]]
    with pytest.raises(BadRequest, match="15 attention heads"):
        put(box(count=4), 2, heads=15)


def test_a_cpu_has_no_gpus_to_divide() -> None:
    with pytest.raises(BadRequest, match="VLLM_BOOTSTRAP_CPU_SLOTS allows 1"):
        put(cpu_box(), 2)
    with pytest.raises(BadRequest, match="gpu_count must be 1"):
        put(cpu_box(4), 2, gpu_count=2)


# What cannot be now


@pytest.mark.parametrize(
    ("replicas", "wish", "fit", "param"),
    [
        (4, {}, 2, "replicas"),
        (3, {"gpu_count": 1}, 2, "replicas"),
        (2, {"gpu_count": 2}, 1, "replicas"),
        (2, {"gpu_ids": (0, 2)}, 1, "gpu_ids"),
        (7, {"gpu_share": 0.5}, 5, "replicas"),
        ("per_gpu", {"gpu_ids": (0, 1)}, 0, "gpu_ids"),
    ],
)
def test_too_few_free_gpus_say_how_many_replicas_fit(replicas: Any, wish: dict[str, Any], fit: int, param: str) -> None:
    claims = {"whole": (["GPU-0"], 1000), "half": (["GPU-1"], 500)}
    with pytest.raises(GpuConflict) as refused:
        put(box(count=4), replicas, claims, **wish)
    error = refused.value
    assert (error.details["replicas_that_fit"], error.param, error.should_retry) == (fit, param, False)
    assert "whole" in error.message
    assert {gpu["uuid"] for gpu in error.details["gpus"]} <= {"GPU-0", "GPU-1"}


def test_a_full_cpu_is_a_conflict() -> None:
    claims = {"a": (["cpu"], 500), "b": (["cpu"], 500)}
    for replicas in (2, "per_gpu"):
        with pytest.raises(GpuConflict) as refused:
            put(cpu_box(2), replicas, claims)
        assert refused.value.details["replicas_that_fit"] == 0


def test_not_knowing_is_no_conflict() -> None:
    snapshot = box(reading(0), reading(1, None, unknown=LOST))
    with pytest.raises(GpuUnknown, match="is lost"):
        put(snapshot, 2)
    with pytest.raises(GpuUnknown):
        put(box(reading(0, None, unknown=LOST)), "per_gpu")
    with pytest.raises(GpuConflict):
        put(snapshot, 2, {"whole": (["GPU-0"], 1000)})
    with pytest.raises(GpuUnknown, match="NVML"):
        put(Snapshot("cuda", unknown="NVML does not answer"), 2)
