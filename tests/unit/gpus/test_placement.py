from __future__ import annotations

from typing import Any

import pytest

from tests.support.gpus import GIB, box, cpu_box, process, reading
from vllm_bootstrap.engines.base import Placement
from vllm_bootstrap.errors import BadRequest, GpuConflict, GpuUnknown
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.placement import PlacementWish, place
from vllm_bootstrap.gpus.readings import Snapshot

LOST = "nvmlDeviceGetHandleByIndex: GPU is lost"


def put(
    snapshot: Snapshot,
    claims: dict[str, tuple[list[str], int]] | None = None,
    *,
    heads: int | None = None,
    unsettled: dict[str, str] | None = None,
    **wish: Any,
) -> Placement:
    ledger = Ledger()
    for owner, (uuids, milli) in (claims or {}).items():
        ledger.claim(owner, uuids, milli, milli < 1000)
    return place(PlacementWish(**wish), snapshot, ledger, unsettled or {}, busy_bytes=GIB, heads=heads)


def indices(placement: Placement) -> list[int]:
    return [gpu.index for gpu in placement.gpus]


# Which GPUs


def test_a_gpu_on_which_nobody_sleeps_is_taken_first() -> None:
    ledger = Ledger()
    ledger.claim("sleeper", ["GPU-0"])
    ledger.park("sleeper", {"GPU-0": 0})
    for count, taken in ((1, [1]), (2, [1, 2]), (3, [0, 1, 2])):
        wish = PlacementWish(gpu_count=count)
        assert indices(place(wish, box(count=3), ledger, {}, busy_bytes=GIB)) == taken


def test_all_gpus_are_taken_whole_unless_something_says_fewer() -> None:
    placement = put(box(count=4))
    assert indices(placement) == [0, 1, 2, 3]
    assert (placement.kind, placement.share_milli) == ("cuda", 1000)
    assert (placement.tensor_parallel_size, placement.pipeline_parallel_size) == (4, 1)


@pytest.mark.parametrize(
    ("wish", "taken", "sizes"),
    [
        ({"gpu_count": 2}, [0, 1], (2, 1)),
        ({"gpu_ids": (3, 1)}, [3, 1], (2, 1)),
        ({"gpu_ids": ("GPU-2",)}, [2], (1, 1)),
        ({"gpu_ids": ("gpu-2", "0")}, [2, 0], (2, 1)),
        ({"tensor_parallel_size": 1}, [0], (1, 1)),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, [0, 1, 2, 3], (2, 2)),
        ({"tensor_parallel_size": 1, "pipeline_parallel_size": 2}, [0, 1], (1, 2)),
        ({"pipeline_parallel_size": 2}, [0, 1, 2, 3], (2, 2)),
        ({"pipeline_parallel_size": 2, "gpu_count": 2}, [0, 1], (1, 2)),
        ({"gpu_ids": (0, 1), "gpu_count": 2}, [0, 1], (2, 1)),
        ({"gpu_ids": (0, 1), "tensor_parallel_size": 2}, [0, 1], (2, 1)),
    ],
)
def test_ids_a_count_or_an_explicit_product_say_which(
    wish: dict[str, Any], taken: list[int], sizes: tuple[int, int]
) -> None:
    placement = put(box(count=4), **wish)
    assert indices(placement) == taken
    assert (placement.tensor_parallel_size, placement.pipeline_parallel_size) == sizes


def test_the_uuid_is_claimed_whatever_its_index_is_today() -> None:
    permuted = box(reading(0, uuid="GPU-b"), reading(1, uuid="GPU-a"))
    placement = put(permuted, gpu_ids=("GPU-a",))
    assert [(gpu.uuid, gpu.index) for gpu in placement.gpus] == [("GPU-a", 1)]


def test_a_count_takes_what_is_free() -> None:
    claims = {"l1": (["GPU-0"], 1000), "l2": (["GPU-2"], 1000)}
    assert indices(put(box(count=4), claims, gpu_count=2)) == [1, 3]
    assert indices(put(box(count=4), claims, tensor_parallel_size=2)) == [1, 3]


@pytest.mark.parametrize(
    ("wish", "param", "message"),
    [
        ({"gpu_ids": (4,)}, "gpu_ids", "There is no GPU 4 here. Known: 0 (GPU-0), 1 (GPU-1)."),
        ({"gpu_ids": ("GPU-x",)}, "gpu_ids", "There is no GPU 'GPU-x' here"),
        ({"gpu_ids": (0, "GPU-0")}, "gpu_ids", "named twice"),
        ({"gpu_ids": (0,), "gpu_count": 2}, "gpu_count", "gpu_count is 2, but gpu_ids names 1"),
        ({"gpu_count": 3}, "gpu_count", "3 GPUs are wanted, this daemon may use 2"),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size", "4 GPUs are wanted"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "tensor_parallel_size", "4 GPUs are wanted"),
        ({"gpu_ids": (0, 1), "tensor_parallel_size": 1}, "tensor_parallel_size", "2 GPUs do not fit"),
        ({"gpu_count": 1, "tensor_parallel_size": 2}, "tensor_parallel_size", "asks for 2 x 1"),
        ({"pipeline_parallel_size": 3}, "pipeline_parallel_size", "asks for a multiple of 3"),
        ({"gpu_ids": (0,), "pipeline_parallel_size": 2}, "pipeline_parallel_size", "asks for a multiple of 2"),
    ],
)
def test_wishes_that_cannot_be_met_here_name_the_field(wish: dict[str, Any], param: str, message: str) -> None:
    for claims in ({}, {"l1": (["GPU-0", "GPU-1"], 1000)}):
        with pytest.raises(BadRequest) as caught:
            put(box(count=2), claims, **wish)
        assert caught.value.param == param
        assert message in caught.value.message


# Heads


def test_tensor_parallel_size_must_divide_the_heads() -> None:
    assert put(box(count=4), heads=32).tensor_parallel_size == 4
    with pytest.raises(BadRequest, match=r"28 attention heads, which 8 does not divide.* fit: 1, 2, 4, 7\.") as caught:
        put(box(count=8), heads=28)
    assert caught.value.param == "gpu_count"
    assert put(box(count=8), heads=28, gpu_count=7).tensor_parallel_size == 7


def test_counts_that_fit_reckon_with_the_pipeline() -> None:
    with pytest.raises(BadRequest, match=r"Numbers of GPUs that fit with pipeline_parallel_size 2: 2, 4, 8\."):
        put(box(count=8), heads=4, gpu_count=6, pipeline_parallel_size=2)


def test_an_explicit_tensor_size_is_checked_as_well() -> None:
    with pytest.raises(BadRequest, match="14 attention heads") as caught:
        put(box(count=4), heads=14, tensor_parallel_size=4)
    assert caught.value.param == "tensor_parallel_size"


def test_unknown_heads_are_not_checked() -> None:
    assert put(box(count=3)).tensor_parallel_size == 3


# Conflicts


def test_an_owned_gpu_names_its_owner() -> None:
    with pytest.raises(GpuConflict) as caught:
        put(box(count=2), {"l1": (["GPU-1"], 1000)})
    error = caught.value
    assert error.message == "GPU 1 (GPU-1) is owned by launch l1."
    assert error.headers() == {"x-should-retry": "false"}
    assert error.details["gpus"] == [
        {"uuid": "GPU-1", "index": 1, "state": "claimed", "reason": "GPU 1 (GPU-1) is owned by launch l1",
         "owners": ["l1"], "others": []},
    ]  # fmt: skip


def test_foreign_use_is_named_as_far_as_visible() -> None:
    engine = process(4711, 23, user="bob", name="VLLM::EngineCore")
    with pytest.raises(GpuConflict) as caught:
        put(box(reading(0, 23.5, engine)))
    assert caught.value.message == (
        "GPU 0 (GPU-0) has 23.5 GiB held by pid 4711 VLLM::EngineCore of bob with 23552 MiB (not ours)."
    )
    others = caught.value.details["gpus"][0]["others"]
    assert others == [{"pid": 4711, "user": "bob", "name": "VLLM::EngineCore", "used_bytes": 23 * GIB}]


def test_in_a_pid_namespace_the_memory_speaks() -> None:
    with pytest.raises(GpuConflict, match="cannot be seen from inside this pid namespace"):
        put(box(reading(0, 23.5, process(None, 23)), pids_trusted=False))


def test_an_unsettled_gpu_is_not_given_out() -> None:
    with pytest.raises(GpuConflict, match=r"GPU 0 \(GPU-0\) is unsettled: memory of l9 is not back"):
        put(box(count=1), unsettled={"GPU-0": "memory of l9 is not back"})
    assert indices(put(box(count=2), unsettled={"GPU-0": "x"}, gpu_count=1)) == [1]


def test_too_few_free_gpus_say_who_has_the_others() -> None:
    snapshot = box(reading(0), reading(1, 9, process(7, 9)), reading(2))
    with pytest.raises(GpuConflict) as caught:
        put(snapshot, {"l1": (["GPU-0"], 1000)}, gpu_count=2)
    assert caught.value.param == "gpu_count"
    assert caught.value.message.startswith("2 GPUs are wanted, 1 free: GPU 0 (GPU-0) is owned by launch l1; GPU 1")


# Not known


def test_nothing_is_given_out_while_nothing_is_known() -> None:
    with pytest.raises(GpuUnknown, match="nvmlInit: Driver Not Loaded") as caught:
        put(box(count=2, unknown="nvmlInit: Driver Not Loaded"), gpu_ids=(0,))
    assert caught.value.status == 503
    assert caught.value.retry_after == 10


def test_a_gpu_that_cannot_be_judged_is_not_given_out() -> None:
    snapshot = box(reading(0), reading(1, None, unknown=LOST))
    with pytest.raises(GpuUnknown, match="GPU is lost"):
        put(snapshot)
    with pytest.raises(GpuUnknown, match="GPU is lost"):
        put(snapshot, gpu_ids=(1,))
    assert indices(put(snapshot, gpu_count=1)) == [0]


def test_what_is_surely_taken_outweighs_what_is_not_known() -> None:
    snapshot = box(reading(0), reading(1, None, unknown=LOST))
    with pytest.raises(GpuConflict, match=r"owned by launch l1; GPU 1 \(GPU-1\) cannot be judged"):
        put(snapshot, {"l1": (["GPU-0"], 1000)})
    with pytest.raises(GpuConflict, match="owned by launch l1"):
        put(box(reading(0, None, unknown=LOST)), {"l1": (["GPU-0"], 1000)})


def test_an_unknown_gpu_could_make_up_the_number() -> None:
    snapshot = box(reading(0), reading(1, None, unknown=LOST), reading(2))
    with pytest.raises(GpuUnknown):
        put(snapshot, {"l1": (["GPU-2"], 1000)}, gpu_count=2)
    with pytest.raises(GpuConflict):
        put(snapshot, {"l1": (["GPU-0", "GPU-2"], 1000)}, gpu_count=2)


# Sharing


def test_a_share_is_claimed_in_thousandths() -> None:
    assert put(box(count=1), gpu_share=0.5).share_milli == 500
    assert put(box(count=1), gpu_share=1 / 3).share_milli == 333
    assert put(box(count=1), gpu_share=0.0001).share_milli == 1
    assert put(box(count=1), gpu_share=1.0).share_milli == 1000


def test_two_that_both_share_fit_on_one_gpu() -> None:
    claims = {"l1": (["GPU-0"], 500)}
    assert put(box(reading(0, 38)), claims, gpu_share=0.5).share_milli == 500
    with pytest.raises(GpuConflict, match=r"owned by launch l1 \(50 % of it\)"):
        put(box(count=1), claims, gpu_share=0.501)
    with pytest.raises(GpuConflict, match="owned by launch l1"):
        put(box(count=1), claims)
    with pytest.raises(GpuConflict, match="owned by launch l1"):
        put(box(count=1), {"l1": (["GPU-0"], 1000)}, gpu_share=0.1)


def test_a_share_is_refused_where_others_use_what_is_left() -> None:
    with pytest.raises(GpuConflict, match="held by others"):
        put(box(reading(0, 60)), {"l1": (["GPU-0"], 500)}, gpu_share=0.5)


def test_shares_fill_a_gpu_before_they_open_another() -> None:
    claims = {"l1": (["GPU-1"], 300), "l2": (["GPU-2"], 600)}
    assert indices(put(box(count=3), claims, gpu_share=0.4, gpu_count=1)) == [2]
    assert indices(put(box(count=3), claims, gpu_share=0.5, gpu_count=1)) == [1]
    assert indices(put(box(count=3), claims, gpu_share=0.8, gpu_count=1)) == [0]
    assert indices(put(box(count=3), claims, gpu_share=0.4, gpu_count=2)) == [1, 2]


# The cpu device


@pytest.mark.parametrize(
    "wish", [{}, {"gpu_ids": (0,)}, {"gpu_ids": ("cpu",)}, {"gpu_count": 1}, {"tensor_parallel_size": 1}]
)
def test_the_cpu_is_one_device(wish: dict[str, Any]) -> None:
    placement = put(cpu_box(), heads=7, **wish)
    assert (placement.kind, [gpu.uuid for gpu in placement.gpus]) == ("cpu", ["cpu"])
    assert (placement.share_milli, placement.tensor_parallel_size, placement.pipeline_parallel_size) == (1000, 1, 1)


def test_cpu_slots_are_shares_of_it() -> None:
    claims = {f"l{n}": (["cpu"], 333) for n in range(2)}
    assert put(cpu_box(3), claims).share_milli == 333
    with pytest.raises(GpuConflict, match="is owned by launch l0, l1, l2"):
        put(cpu_box(3), {**claims, "l2": (["cpu"], 333)})
    assert put(cpu_box(5000)).share_milli == 1


@pytest.mark.parametrize(
    "wish", [{"gpu_share": 0.5}, {"gpu_count": 2}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]
)
def test_wishes_for_gpus_are_refused_on_cpu(wish: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="no NVIDIA GPU") as caught:
        put(cpu_box(), **wish)
    assert caught.value.param == next(iter(wish))
