"""What holds of the estimate for every model, GPU and wish."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.support.published_models import PUBLISHED
from vllm_bootstrap.models import fit
from vllm_bootstrap.models.advice import Case, report
from vllm_bootstrap.models.fit import GIB, Room, Wish, judge
from vllm_bootstrap.models.shape import read_shape
from vllm_bootstrap.models.tensors import WeightFacts

ORDER = {False: 0, None: 1, True: 2}

models = st.sampled_from(sorted(PUBLISHED)).map(lambda name: (read_shape(PUBLISHED[name][0]), PUBLISHED[name][1]))
rooms = st.integers(4, 200).map(lambda gib: Room(gib * GIB))
wishes = st.builds(
    Wish,
    dtype=st.sampled_from([None, "bfloat16", "float32"]),
    quantization=st.sampled_from([None, "fp8"]),
    max_model_len=st.none() | st.just("auto") | st.integers(16, 40_000),
    max_num_seqs=st.integers(1, 512),
    max_num_batched_tokens=st.none() | st.integers(16, 16_384),
    kv_cache_dtype=st.sampled_from([None, "auto", "fp8"]),
    enforce_eager=st.booleans(),
    fraction=st.none() | st.floats(0.1, 1.0),
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2]),
)


def weights(count):
    return WeightFacts({"BF16": 2 * count}, count // 10)


@given(models, rooms, wishes)
def test_the_answer_follows_from_need_margin_and_budget(model, room, wish):
    shape, count = model
    found = judge(shape, weights(count), wish, room)
    need = found.weights_bytes + found.overhead_bytes + found.kv_bytes
    assert found.margin_bytes >= 0
    if found.fits is False:
        assert need - found.margin_bytes > found.budget_bytes
    elif found.fits:
        assert need <= found.budget_bytes
    else:
        assert need - found.margin_bytes <= found.budget_bytes < need


@given(models, rooms, wishes, st.integers(1, 100))
def test_more_memory_never_makes_it_worse(model, room, wish, more):
    shape, count = model
    larger = Room(room.total_bytes + more * GIB // 10)
    wish = replace(wish, max_num_batched_tokens=wish.max_num_batched_tokens or 2048)  # the default follows the GPU
    before, after = judge(shape, weights(count), wish, room), judge(shape, weights(count), wish, larger)
    assert ORDER[after.fits] >= ORDER[before.fits]


@given(models, rooms, wishes, st.integers(16, 40_000), st.integers(16, 40_000))
def test_a_shorter_length_never_makes_it_worse(model, room, wish, one, other):
    shape, count = model
    short, long = (judge(shape, weights(count), replace(wish, max_model_len=n), room) for n in sorted((one, other)))
    assert ORDER[short.fits] >= ORDER[long.fits]


@given(models, rooms, wishes)
def test_the_longest_length_fits_and_the_next_does_not(model, room, wish):
    shape, count = model
    found = fit.longest(shape, weights(count), wish, room)
    if found is None:
        return
    assert judge(shape, weights(count), replace(wish, max_model_len=found), room).fits
    if found + fit.BLOCK <= shape.max_len:
        longer = replace(wish, max_model_len=found + fit.BLOCK)
        assert not judge(shape, weights(count), longer, room).fits


@given(models, rooms, wishes, st.sampled_from([1.0, 0.5, 0.25]), st.none() | st.integers(0, 100))
def test_every_typed_suggestion_fits_when_it_alone_is_applied(model, room, wish, share, free):
    shape, count = model
    if share < 1:
        wish = replace(wish, fraction=share * 0.9)
    room = replace(room, free_bytes=None if free is None else room.total_bytes * free // 100)
    case = Case(shape, weights(count), wish, room, 8, share)
    found = report(case)
    assert not (found.fits and found.suggestions)
    for one in found.suggestions:
        assert one["message"]
        if "field" not in one:
            continue
        value = one["value"]
        changed = {
            "gpu_count": {"tensor": value // wish.pipeline} if one["field"] == "gpu_count" else {},
            "gpu_share": {"fraction": round(value * 0.9, 3)} if one["field"] == "gpu_share" else {},
            "gpu_memory_utilization": {"fraction": value},
        }.get(one["field"], {one["field"]: value})
        assert judge(shape, weights(count), replace(wish, **changed), room).fits, one
