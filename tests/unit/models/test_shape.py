"""What configurations of published and of unusual models say about memory."""

import pytest

from tests.support.published_models import BGE_M3, DEEPSEEK_LITE, GEMMA3_4B, LLAMA_8B, PUBLISHED, QWEN_7B
from vllm_bootstrap.models.shape import ModelShape, read_shape


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    config, _, kv_bytes, whole, windowed = PUBLISHED[name]
    shape = read_shape(config)
    assert (shape.whole_layers, shape.windowed_layers) == (whole, windowed)
    if kv_bytes:
        assert 2 * (whole + windowed) * shape.kv_heads * shape.kv_width == kv_bytes
        assert shape.kv_unknown is None
    assert shape.encoder_only == (not kv_bytes)


def test_a_compressed_cache_is_one_for_all_heads():
    shape = read_shape(DEEPSEEK_LITE)
    assert (shape.latent, shape.kv_heads, shape.kv_width) == (True, 1, 576)
    assert shape.mlp_width == 10944
    assert shape.max_len == 163840  # yarn: written down as scaled already


def test_a_multimodal_model_is_its_text_part_with_what_its_class_assumes():
    shape = read_shape(GEMMA3_4B)
    assert (shape.heads, shape.kv_heads, shape.kv_width, shape.vocabulary) == (8, 4, 512, 262208)
    assert (shape.sees, shape.max_len, shape.dtype) == (True, 131072, "bfloat16")
    deep = {"thinker_config": {"text_config": {"text_config": {"text_config": {"num_hidden_layers": 2}}}}}
    assert read_shape(deep).layers == 0  # no endless descent


def test_an_empty_configuration_says_nothing_and_says_so():
    shape = read_shape({})
    assert shape == ModelShape(kv_unknown="config.json does not give its layers and heads")
    odd = {"num_hidden_layers": [1], "num_attention_heads": True, "hidden_size": "x", "architectures": 3}
    assert read_shape(odd).heads == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"mamba_d_state": 16}, "mamba_d_state"),
        ({"linear_num_value_heads": 32}, "linear_num_value_heads"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "kinds that are not known"),
        ({"layer_types": [None]}, "kinds that are not known"),
        ({"kv_lora_rank": 256, "model_type": "minicpm3"}, "compressed attention"),
        ({"num_attention_heads": None, "num_key_value_heads": None, "model_type": "x"}, "layers and heads"),
        ({"model_type": "x", "num_hidden_layers": None}, "layers and heads"),
    ],
)
def test_what_cannot_be_told_has_a_reason(changes, reason):
    assert reason in (read_shape(LLAMA_8B | changes).kv_unknown or "")


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"n_head": 71, "multi_query": True}, 1),
        ({"n_head": 71, "multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 8}, 8),
        ({"n_head": 71, "multi_query": True, "new_decoder_architecture": True}, 71),
        ({"num_attention_heads": 32, "multi_query_group_num": 2}, 2),
        ({"n_head": 12}, 12),
    ],
)
def test_heads_of_the_cache(config, heads):
    assert read_shape({"n_layer": 2, "n_embd": 768, **config}).kv_heads == heads


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"use_sliding_window": True}, (28, 0)),
        ({"use_sliding_window": True, "max_window_layers": 20}, (20, 8)),
        ({"model_type": "cohere2", "use_sliding_window": True, "sliding_window_pattern": 4}, (7, 21)),
        ({"model_type": "x", "use_sliding_window": None}, (28, 0)),
        ({"layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 4, "num_kv_shared_layers": 2}, (4, 2)),
        ({"layer_types": ["chunked_attention"] * 3 + ["full_attention"]}, (4, 0)),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, (4, 0)),
    ],
)
def test_layers_with_a_window(changes, layers):
    shape = read_shape(QWEN_7B | changes)
    assert (shape.whole_layers, shape.windowed_layers) == layers


def test_keys_and_values_of_different_widths():
    assert read_shape(LLAMA_8B | {"head_dim": 192, "v_head_dim": 128}).kv_width == 320
    assert read_shape(LLAMA_8B | {"hidden_size_per_head": 100}).kv_width == 200


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"model_max_length": 9000}, 9000),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 4 * 131072),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": None}}, 131072),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, 4096),
        ({"rope_scaling": {"type": "longrope"}}, 131072),
        ({"rope_scaling": None, "rope_parameters": None}, 131072),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_the_length_it_takes_by_itself(changes, length):
    assert read_shape(LLAMA_8B | changes).max_len == length


@pytest.mark.parametrize(
    ("quantised", "method", "kv_is_8_bit"),
    [
        ({"quant_method": "AWQ", "bits": 4}, "awq", False),
        ({"bits": 4}, "an unnamed method", False),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, "compressed-tensors", True),
        ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}, "modelopt", True),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "modelopt", True),
        ("odd", None, False),
    ],
)
def test_quantised_weights(quantised, method, kv_is_8_bit):
    for config in (
        LLAMA_8B | {"quantization_config": quantised},
        LLAMA_8B | {"compression_config": quantised},
        {"text_config": LLAMA_8B | {"quantization_config": quantised}},
    ):
        shape = read_shape(config)
        assert (shape.method, shape.kv_is_8_bit) == (method, kv_is_8_bit)


def test_dtype_in_both_spellings():
    assert read_shape({"dtype": "torch.float16"}).dtype == "float16"
    assert read_shape({"torch_dtype": 3}).dtype is None


@pytest.mark.parametrize(
    "changes",
    [{}, {"architectures": None}, {"architectures": ["NewModel"], "model_type": "new"}, {"is_causal": False}],
)
def test_encoders_keep_no_cache(changes):
    assert read_shape(BGE_M3 | changes).encoder_only


def test_a_mixture_of_experts_is_as_wide_as_what_a_token_uses():
    assert read_shape(PUBLISHED["Mixtral-8x7B"][0]).mlp_width == 2 * 14336
    assert read_shape({"hidden_size": 100}).mlp_width == 400
