"""Whatever is claimed and whatever is asked for: all replicas fit where they are put, or it is said how many would."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.gpus import GIB, box, reading
from vllm_bootstrap.errors import BadRequest, GpuConflict, GpuUnknown
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.placement import PlacementWish
from vllm_bootstrap.gpus.replicas import place_replicas

CLAIMS = st.lists(st.sampled_from([None, None, 250, 500, 1000]), min_size=1, max_size=6)
SHARES = st.sampled_from([None, 0.25, 0.5, 0.6, 1.0])


@given(
    CLAIMS,
    st.integers(2, 9) | st.just("per_gpu"),
    SHARES,
    st.none() | st.integers(1, 3),
    st.sets(st.integers(0, 5)),
    st.sets(st.integers(0, 5)),
)
def test_all_have_room_or_it_is_said_how_many_have(claims, replicas, share, count, busy, unknown):
    seen = box(*[
        reading(n, None, unknown="lost") if n in unknown else reading(n, 40 if n in busy else 0)
        for n in range(len(claims))
    ])  # fmt: skip
    ledger = Ledger()
    for number, milli in enumerate(claims):
        if milli is not None:
            ledger.claim(f"other-{number}", [f"GPU-{number}"], milli, milli < 1000)
    wish = PlacementWish(gpu_count=count, gpu_share=share)

    def placed(wanted):
        return place_replicas(wish, wanted, seen, ledger, {}, busy_bytes=GIB, most=64)

    try:
        found = placed(replicas)
    except BadRequest:
        return
    except (GpuConflict, GpuUnknown) as refused:
        fit = refused.details["replicas_that_fit"]
        assert fit == 0 if replicas == "per_gpu" else 0 <= fit < replicas
        if fit > 1 and (count is not None or (share or 1) < 1):  # else their number decides how large they are
            assert len(placed(fit)) == fit
        return
    if replicas != "per_gpu":
        assert len(found) == replicas
    for number, placement in enumerate(found):  # the ledger takes them all, or the test ends here
        uuids = [gpu.uuid for gpu in placement.gpus]
        ledger.claim(f"replica-{number}", uuids, placement.share_milli, placement.share_milli < 1000)
        assert not {int(uuid.removeprefix("GPU-")) for uuid in uuids} & unknown
        assert placement.tensor_parallel_size * placement.pipeline_parallel_size == len(uuids)
    if replicas == "per_gpu":
        used = [gpu.uuid for placement in found for gpu in placement.gpus]
        assert len(used) == len(set(used)) >= 1
