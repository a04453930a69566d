"""The estimate against published models, captured figures, and its own margin."""

from dataclasses import replace

import pytest

from tests.support.published_models import (
    BGE_M3,
    DEEPSEEK_LITE,
    GEMMA3_27B,
    LLAMA2_7B_GPTQ,
    LLAMA_8B,
    LLAMA_70B,
    MISTRAL_7B,
    PUBLISHED,
    QWEN3_235B,
    QWEN_3B,
    QWEN_7B_AWQ,
    QWEN_32B,
    TINY,
)  # fmt: skip
from vllm_bootstrap.models import fit
from vllm_bootstrap.models.fit import GIB, Room, Wish, cache_of, judge
from vllm_bootstrap.models.shape import read_shape
from vllm_bootstrap.models.tensors import WeightFacts

H100 = Room(80 * GIB)
L4 = Room(int(22.5 * GIB))


def weights(name_or_count, dtype="BF16"):
    count = PUBLISHED[name_or_count][1] if isinstance(name_or_count, str) else name_or_count
    return WeightFacts({dtype: count * {"BF16": 2, "F32": 4}[dtype]})


def ask(name, room=H100, stored="BF16", **wish):
    return judge(read_shape(PUBLISHED[name][0]), weights(name, stored), Wish(**wish), room)


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_and_a_tokens_cache_of_published_models(name):
    config, count, kv_bytes, _, _ = PUBLISHED[name]
    found = judge(read_shape(config), weights(name), Wish(), H100)
    assert found.weights_bytes == 2 * count
    assert found.kv_bytes_per_token == kv_bytes


@pytest.mark.parametrize(
    ("name", "room", "wish", "fits"),
    [
        ("Llama-3.1-8B", H100, {}, True),
        ("Llama-3.1-8B", L4, {"max_model_len": 16384}, True),
        ("Llama-3.1-8B", L4, {}, False),  # its own length is 131,072: 16 GiB of cache
        ("Llama-3.1-8B", Room(16 * GIB), {"max_model_len": 4096}, False),
        ("Llama-3.1-70B", H100, {"max_model_len": 4096}, False),
        ("Llama-3.1-70B", H100, {"max_model_len": 4096, "tensor": 2}, True),
        ("Llama-3.1-70B", H100, {"tensor": 2}, False),
        ("Llama-3.1-70B", H100, {"tensor": 4}, True),
        ("Llama-3.1-70B", H100, {"tensor": 2, "pipeline": 2}, True),
        ("Qwen2.5-3B", L4, {}, True),
        ("Qwen2.5-32B", H100, {"max_model_len": 8192}, True),
        ("Qwen2.5-32B", Room(48 * GIB), {"max_model_len": 8192}, False),
        ("Qwen2.5-32B", Room(48 * GIB), {"max_model_len": 8192, "quantization": "fp8"}, True),
        ("Mixtral-8x7B", H100, {}, False),
        ("Mixtral-8x7B", H100, {"tensor": 2}, True),
        ("DeepSeek-V2-Lite", H100, {}, True),
        ("gemma-3-27b", H100, {"max_model_len": 32768}, True),
        ("bge-m3", Room(4 * GIB), {}, True),
    ],
)
def test_known_to_fit_and_known_not_to(name, room, wish, fits):
    assert ask(name, room, **wish).fits is fits


def test_the_cache_of_the_tiny_model_is_what_the_engine_said():
    """Captured from vLLM 0.32 with VLLM_CPU_KVCACHE_SPACE=1, --dtype float32 and --max-model-len 1024:
    "CPU KV cache size: 262,144 tokens, Maximum concurrency for 1,024 tokens per request: 256.00x"."""
    cache = cache_of(read_shape(TINY), Wish(dtype="float32"))
    assert cache is not None
    assert cache.token_bytes == 4096
    assert fit.cache_tokens(cache, 1 * GIB, 1024, 0) == 262_144


def test_the_cache_of_a_large_model_is_what_an_engine_said():
    """From a public report of Qwen3-235B-A22B-FP8 on four H100: 8.11 GiB of cache were 178,880 tokens."""
    cache = cache_of(read_shape(QWEN3_235B), Wish(tensor=4))
    assert cache is not None
    assert fit.cache_tokens(cache, int(8.11 * GIB), 40960, 0) == pytest.approx(178_880, rel=0.02)


def test_layers_with_a_window_keep_no_more_than_it_and_the_running_steps():
    cache = cache_of(read_shape(MISTRAL_7B), Wish())
    assert cache is not None
    assert cache.need(32768, 0) == 4096 * cache.token_bytes
    assert cache.need(32768, 2048) == (4095 + 2048 + 1) * cache.token_bytes
    assert cache.need(1024, 8192) == 1024 * cache.token_bytes
    mixed = cache_of(read_shape(GEMMA3_27B), Wish())
    assert mixed is not None
    layer = 16 * 256 * 2
    assert mixed.need(32768, 0, least=True) == (32768 * 10 + 1024 * 52) * layer
    assert mixed.need(32768, 0) == (32768 * 10 + 1024 * 60) * layer  # six groups of ten, the last filled up


def test_nearly_as_many_of_both_kinds_are_grouped_by_the_larger():
    config = GEMMA3_27B["text_config"] | {"layer_types": ["sliding_attention"] * 12 + ["full_attention"] * 13}
    cache = cache_of(read_shape(config), Wish())
    assert cache is not None
    assert cache.whole == cache.windowed


def test_parallel_sizes_divide_weights_and_cache():
    two = ask("Llama-3.1-70B", tensor=2)
    four = ask("Llama-3.1-70B", tensor=2, pipeline=2)
    many = ask("Llama-3.1-70B", tensor=16)
    assert two.kv_bytes_per_token == 327_680 // 2
    assert four.kv_bytes_per_token == 327_680 // 4
    assert many.kv_bytes_per_token == 327_680 // 8  # one head at least on each
    assert (two.gpu_count, four.gpu_count, four.weights_bytes) == (2, 4, 70_553_706_496 // 2)
    latent = cache_of(read_shape(DEEPSEEK_LITE), Wish(tensor=4))
    assert latent is not None
    assert latent.token_bytes == 31_104  # not divided
    assert cache_of(read_shape(QWEN_3B), Wish(pipeline=8)).token_bytes == 5 * 1024  # ceil(36 / 8) layers


@pytest.mark.parametrize(
    ("asked", "bytes_"),
    [("auto", 131_072), (None, 131_072), ("fp8", 65_536), ("fp8_e5m2", 65_536), ("bfloat16", 131_072)],
)
def test_dtypes_of_the_cache(asked, bytes_):
    assert ask("Llama-3.1-8B", kv_cache_dtype=asked).kv_bytes_per_token == bytes_


def test_a_checkpoint_may_ask_for_an_8_bit_cache():
    config = LLAMA_8B | {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}}
    assert judge(read_shape(config), weights(8), Wish(), H100).kv_bytes_per_token == 65_536


@pytest.mark.parametrize(
    ("stored", "dtype", "factor"),
    [("F32", None, 2), ("F32", "float32", 4), ("BF16", None, 2), ("BF16", "float32", 4), ("BF16", "half", 2)],
)
def test_weights_take_what_they_run_in_not_what_they_are_stored_in(stored, dtype, factor):
    found = ask("Qwen2.5-3B", stored=stored, dtype=dtype)
    assert found.weights_bytes == factor * 3_085_938_688


def test_quantised_weights_are_taken_as_stored():
    stored = WeightFacts({"I32": 3_500_000_000, "F16": 400_000_000})
    for config in (LLAMA2_7B_GPTQ, QWEN_7B_AWQ):
        found = judge(read_shape(config), stored, Wish(), Room(12 * GIB))
        assert found.weights_bytes == 3_900_000_000


def test_weights_quantised_while_loading_keep_their_vocabulary():
    known = WeightFacts({"F32": 4000}, vocabulary_bytes=1000)
    shape = read_shape(LLAMA_8B)
    assert fit.weights_of(known, shape, Wish(quantization="fp8")) == 500 + 750
    assert fit.weights_of(known, shape, Wish(quantization="bitsandbytes")) == 500 + 375
    assert fit.weights_of(WeightFacts(), shape, Wish(quantization="fp8")) == 0
    assert fit.weights_of(known, shape, Wish(quantization="something-new")) is None


@pytest.mark.parametrize(
    ("config", "known", "wish", "why"),
    [
        (LLAMA_8B, None, {}, "sizes of its weights"),
        (LLAMA_8B, 10, {"quantization": "x"}, "what x leaves"),
        (LLAMA_8B | {"mamba_d_state": 1}, 10, {}, "KV cache cannot be told"),
        (LLAMA_8B, 10, {"kv_cache_dtype": "turboquant_k8v4"}, "kv_cache_dtype turboquant_k8v4"),
        (LLAMA_8B | {"max_position_embeddings": None}, 10, {}, "name max_model_len"),
    ],
)
def test_what_is_missing_is_said(config, known, wish, why):
    found = judge(read_shape(config), known and weights(known), Wish(**wish), H100)
    assert found.fits is None
    assert why in found.why
    assert found.max_tokens_in_cache is None
    assert found.margin_bytes is None


def test_what_is_known_may_settle_it():
    """Weights alone are too much, whatever the cache needs."""
    mamba = LLAMA_70B | {"mamba_d_state": 1}
    assert judge(read_shape(mamba), weights("Llama-3.1-70B"), Wish(), H100).fits is False


def test_no_comes_only_beyond_the_margin_and_yes_only_within_the_budget():
    answers = []
    for tenths in range(150, 320):
        found = ask("Llama-3.1-8B", Room(tenths * GIB // 10), max_model_len=8192)
        needed = found.weights_bytes + found.kv_bytes + found.overhead_bytes
        if found.fits is False:
            assert needed - found.margin_bytes > found.budget_bytes
        else:
            assert (needed <= found.budget_bytes) == bool(found.fits)
        answers.append(found.fits)
    assert set(answers) == {False, None, True}
    assert answers == sorted(answers, key=[False, None, True].index)


def test_an_encoder_needs_no_cache():
    found = judge(read_shape(BGE_M3), weights("bge-m3", "F32"), Wish(fraction=0.27), Room(24 * GIB))
    assert (found.fits, found.kv_bytes, found.kv_bytes_per_token, found.max_tokens_in_cache) == (True, 0, 0, None)
    assert "KV cache" not in found.why


def test_auto_takes_the_length_that_fits():
    found = ask("Llama-3.1-8B", L4, max_model_len="auto")
    assert found.fits
    assert 16_384 < found.max_model_len < 65_536
    assert ask("Llama-3.1-8B", L4, max_model_len=found.max_model_len).fits
    nothing = judge(
        read_shape(LLAMA_8B | {"max_position_embeddings": None}), weights(8), Wish(max_model_len="auto"), L4
    )
    assert (nothing.fits, nothing.max_model_len) == (True, None)


def test_the_length_that_fits_never_exceeds_the_models_own():
    assert fit.longest(read_shape(QWEN_3B), weights("Qwen2.5-3B"), Wish(), H100) == 32_768
    assert fit.longest(read_shape(LLAMA_70B), weights("Llama-3.1-70B"), Wish(), H100) is None
    shape = read_shape(LLAMA_8B | {"max_position_embeddings": None})
    assert fit.longest(shape, weights("Llama-3.1-8B"), Wish(max_model_len=4000), H100) == 4000


def test_a_cache_of_given_size_is_the_limit_itself():
    fits = ask("Llama-3.1-8B", cache_bytes=2 * GIB, max_model_len=8192)
    assert fits.fits
    assert fits.max_tokens_in_cache == 16_384
    small = ask("Llama-3.1-8B", cache_bytes=GIB, max_model_len=16_384)
    assert small.fits is False
    assert "kv_cache_memory_bytes" in small.why
    assert ask("Llama-3.1-8B", cache_bytes=70 * GIB, max_model_len=8192).fits is False
    assert fit.longest(read_shape(LLAMA_8B), weights("Llama-3.1-8B"), Wish(cache_bytes=GIB), H100) == 8192
    unknown = judge(read_shape(LLAMA_8B | {"mamba_d_state": 1}), weights(8), Wish(cache_bytes=GIB), H100)
    assert unknown.fits is None


def test_what_the_engine_wants_must_be_free():
    """It looks at all it may use, before it knows what it needs."""
    taken = replace(H100, free_bytes=60 * GIB)
    found = ask("Qwen2.5-3B", taken)
    assert found.fits is False
    assert "60.0 GiB are free now" in found.why
    assert ask("Qwen2.5-3B", taken, fraction=0.7).fits
    assert ask("Qwen2.5-3B", replace(H100, free_bytes=int(79.2 * GIB))).fits
    assert ask("Qwen2.5-3B", replace(H100, free_bytes=20 * GIB), cache_bytes=2 * GIB).fits
    assert ask("Qwen2.5-3B", replace(H100, free_bytes=4 * GIB), cache_bytes=2 * GIB).fits is False


def test_a_share_is_the_budget():
    whole = ask("Qwen2.5-3B", Room(24 * GIB), fraction=0.9)
    part = ask("Qwen2.5-3B", Room(24 * GIB), fraction=0.27)
    assert (whole.fits, part.fits) == (True, False)
    assert part.budget_bytes == int(24 * GIB * 0.27)


def test_what_a_step_needs():
    shape, room = read_shape(LLAMA_8B), H100
    plain = fit.step_of(shape, Wish(), room)
    assert GIB < plain < 3 * GIB
    assert plain - fit.step_of(shape, Wish(enforce_eager=True), room) == fit.GRAPHS
    assert fit.step_of(replace(shape, sees=True), Wish(), room) - plain == fit.SENSES
    assert fit.step_of(shape, Wish(max_num_batched_tokens=512, max_num_seqs=8), room) < plain
    assert fit.batched_tokens(Wish(), L4) == 2048


def test_sizes_from_files_alone_widen_the_margin():
    shape = read_shape(LLAMA_8B)
    exact = judge(shape, weights("Llama-3.1-8B"), Wish(), H100)
    rough = judge(shape, replace(weights("Llama-3.1-8B"), exact=False), Wish(), H100)
    assert rough.margin_bytes - exact.margin_bytes == pytest.approx(0.07 * exact.weights_bytes, rel=0.01)


def test_the_sentence():
    assert ask("Llama-3.1-8B", max_model_len=8192, tensor=2).why == (
        "On each of 2 GPUs it needs about 7.5 GiB of weights, 0.5 GiB of KV cache for max_model_len 8192, "
        "1.8 GiB to run: 9.8 GiB (give or take 2.3 GiB); 73.6 GiB may be used."
    )
    assert "On one GPU" in ask("Qwen2.5-3B").why
    assert judge(read_shape(QWEN_32B), None, Wish(), Room(GIB)).why.startswith("On one GPU it needs about 8.0 GiB")
