"""Whatever is wished for on whatever host: a placement can be claimed and only names GPUs known to have room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.gpus import GIB, box, process, reading
from vllm_bootstrap.errors import BadRequest, GpuConflict, GpuUnknown
from vllm_bootstrap.gpus.condition import others_use
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.placement import PlacementWish, place

SHARES = st.sampled_from([None, 0.2, 0.5, 0.7, 1.0])
READINGS = st.one_of(
    st.builds(lambda used: (used, None), st.integers(0, 80)), st.just((None, "cannot be read")), st.just((0, None))
)
WISHES = st.builds(
    PlacementWish,
    gpu_ids=st.none() | st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple),
    gpu_count=st.none() | st.integers(1, 5),
    gpu_share=SHARES,
    tensor_parallel_size=st.none() | st.integers(1, 4),
    pipeline_parallel_size=st.none() | st.integers(1, 3),
)


@given(
    seen=st.lists(READINGS, min_size=1, max_size=4),
    claims=st.lists(st.tuples(st.integers(0, 3), SHARES), max_size=4),
    unsettled=st.sets(st.integers(0, 3), max_size=1),
    wish=WISHES,
    heads=st.none() | st.integers(1, 16),
    trusted=st.booleans(),
)
def test_every_wish_has_one_outcome(
    seen: list[tuple[int | None, str | None]],
    claims: list[tuple[int, float | None]],
    unsettled: set[int],
    wish: PlacementWish,
    heads: int | None,
    trusted: bool,
) -> None:
    readings = [
        reading(i, used, *([process(5, used)] if used else []), unknown=why) for i, (used, why) in enumerate(seen)
    ]
    snapshot = box(*readings, pids_trusted=trusted)
    ledger = Ledger()
    for number, (index, share) in enumerate(claims):
        free = not ledger.owners(f"GPU-{index}")
        if index < len(seen) and free:
            milli = round((share or 1) * 1000)
            ledger.claim(f"l{number}", [f"GPU-{index}"], milli, milli < 1000)
    held = {f"GPU-{index}": "memory is not back" for index in unsettled}
    try:
        placement = place(wish, snapshot, ledger, held, busy_bytes=GIB, heads=heads)
    except (BadRequest, GpuConflict, GpuUnknown):
        return  # each of them an honest outcome; which one when is the unit tests' matter
    for gpu in placement.gpus:
        found = snapshot.reading(gpu.uuid)
        assert found is not None
        assert found.unknown is None
        assert gpu.uuid not in held
        claimed = ledger.claimed_milli(gpu.uuid)
        assert others_use(found, claimed, own_pids=None, pids_trusted=trusted)[0] <= GIB
    assert placement.tensor_parallel_size * placement.pipeline_parallel_size == len(placement.gpus)
    assert heads is None or heads % placement.tensor_parallel_size == 0
    if wish.gpu_ids is not None:
        assert [gpu.index for gpu in placement.gpus] == list(wish.gpu_ids)
    ledger.claim("new", [gpu.uuid for gpu in placement.gpus], placement.share_milli, placement.share_milli < 1000)
