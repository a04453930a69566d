"""Suggestions: named only when they help, the least intrusive first."""

import pytest

from tests.support.published_models import PUBLISHED
from vllm_bootstrap.models import advice
from vllm_bootstrap.models.advice import Case, counts, report
from vllm_bootstrap.models.fit import GIB, Room, Wish
from vllm_bootstrap.models.shape import read_shape
from vllm_bootstrap.models.tensors import WeightFacts


def case(name, room_gib=80, gpus_here=1, share=1.0, **wish):
    config, count = PUBLISHED[name][:2]
    return Case(
        read_shape(config), WeightFacts({"BF16": 2 * count}, int(0.1 * count)), Wish(**wish),
        Room(int(room_gib * GIB)), gpus_here, share,
    )  # fmt: skip


def fields(found):
    return {one["field"]: one["value"] for one in found.suggestions if "field" in one}


def test_what_fits_needs_no_advice():
    assert report(case("Qwen2.5-3B")).suggestions == ()


def test_a_shorter_length():
    found = report(case("Llama-3.1-8B", 24))
    assert found.fits is False
    assert fields(found)["max_model_len"] % 256 == 0
    assert 8192 < fields(found)["max_model_len"] < 65_536
    assert report(case("Llama-3.1-8B", 24, max_model_len=fields(found)["max_model_len"])).fits


def test_a_length_below_a_thousand_is_rounded_less():
    found = report(case("Phi-3-mini-4k", 9.15, max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=64))
    assert fields(found)["max_model_len"] < 1024
    assert fields(found)["max_model_len"] % 16 == 0


def test_more_gpus_here_and_elsewhere():
    found = report(case("Llama-3.1-70B", gpus_here=8, max_model_len=8192))
    assert fields(found)["gpu_count"] == 2
    alone = report(case("Llama-3.1-70B", gpus_here=1, max_model_len=8192))
    assert "gpu_count" not in fields(alone)
    assert any("such GPUs, 1 are here" in one["message"] for one in alone.suggestions)
    assert not any("such GPUs" in one["message"] for one in report(case("Llama-3.1-70B", 0.5)).suggestions)


def test_smaller_numbers():
    assert fields(report(case("Qwen2.5-7B", 24, dtype="float32", max_model_len=8192)))["dtype"] == "bfloat16"
    found = report(case("Llama-3.1-8B", 27, max_model_len=80_000))
    assert fields(found)["kv_cache_dtype"] == "fp8"
    assert "kv_cache_dtype" not in fields(report(case("Llama-3.1-8B", 24, kv_cache_dtype="fp8")))


def test_smaller_weights():
    found = report(case("Qwen2.5-32B", 48, max_model_len=4096))
    assert fields(found)["quantization"] == "fp8"
    assert any("4 bits" in one["message"] for one in found.suggestions)
    assert "quantization" not in fields(report(case("Llama-2-7B-GPTQ", 4)))
    assert "quantization" not in fields(report(case("Qwen2.5-32B", 48, quantization="fp8", max_model_len=100_000)))
    assert fields(report(case("Qwen2.5-32B", 8)._replace(weights=None))) == {}


def test_a_larger_share():
    found = report(case("Qwen2.5-7B", 24, share=0.5, fraction=0.45, max_model_len=4096))
    assert found.fits is False
    share = fields(found)["gpu_share"]
    assert 0.5 < share <= 1
    assert report(case("Qwen2.5-7B", 24, share=share, fraction=round(share * 0.9, 3), max_model_len=4096)).fits
    assert "gpu_share" not in fields(report(case("Llama-3.1-70B", 24, share=0.5, fraction=0.45)))


def test_more_of_a_whole_gpu():
    found = report(case("Llama-3.1-8B", 24, fraction=0.7, max_model_len=8192))
    assert fields(found)["gpu_memory_utilization"] == 0.95
    assert "gpu_memory_utilization" not in fields(report(case("Llama-3.1-8B", 16, fraction=0.95)))
    assert "gpu_memory_utilization" not in fields(report(case("Llama-3.1-8B", cache_bytes=70 * GIB)))


def test_less_where_others_have_taken_some():
    base = case("Qwen2.5-3B")
    found = report(base._replace(room=Room(80 * GIB, 60 * GIB)))
    assert found.fits is False
    assert fields(found) == {"gpu_memory_utilization": 0.75}
    assert fields(report(base._replace(room=Room(80 * GIB, 0)))) == {}


@pytest.mark.parametrize(
    ("gpus", "heads", "pipeline", "expected"),
    [(8, 32, 1, [1, 2, 4, 8]), (8, 28, 1, [1, 2, 4]), (6, 32, 1, [1, 2, 4]), (8, 40, 2, [2, 4, 8]), (3, 0, 1, [1, 2])],
)
def test_numbers_of_gpus_to_try(gpus, heads, pipeline, expected):
    assert list(counts(gpus, heads, pipeline)) == expected


def test_with_gpus_keeps_the_pipeline():
    assert advice.with_gpus(Wish(pipeline=2), 8).tensor == 4
