"""What a model's ``config.json`` says about memory: layers, heads, windows, widths, dtype, quantisation. PURE.

Invariant: what cannot be told is said (``kv_unknown`` is a reason), never guessed. Where releases of vLLM read a
configuration in different ways, the reading that needs less memory counts, so that nothing is refused that could fit.
Knows nothing of GPUs, launches or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

_INNER = ("text_config", "llm_config", "language_config", "thinker_config")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_INNER_WIDTH = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
_VOCABULARY = ("vocab_size", "padded_vocab_size")
_EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
# Longer than what is written down: these kinds of scaling multiply it. The others leave it alone, or have come to.
_LENGTHENING = {"linear", "dynamic"}

# What the library's class for a model type assumes where published configurations are silent.
_CLASS_DEFAULTS: Mapping[str, Config] = {
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208,
        "max_position_embeddings": 131_072, "sliding_window": 4096, "sliding_window_pattern": 6,
    },
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32_000, "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 131_072,
    },
    "gemma2": {"sliding_window_pattern": 2},
}  # fmt: skip

# vLLM keeps the compressed form in the cache for these; others with the same fields are cached in full or padded.
_LATENT_TYPES = {
    "deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "longcat_flash", "pangu_ultra_moe",
}  # fmt: skip
# Fields that only models have whose cache holds more than keys and values of every layer.
_OTHER_STATE = (
    "mamba_d_state", "ssm_cfg", "ssm_state_size", "state_size", "mamba_expand", "linear_num_value_heads",
    "linear_attn_config", "attn_layer_period", "hybrid_override_pattern", "layers_block_type", "block_configs",
    "compress_ratios", "index_head_dim", "global_head_dim", "cross_attention_layers", "conv_L_cache",
)  # fmt: skip
_WHOLE = {"full_attention", "attention", "global_attention", "chunked_attention"}
_WINDOWED = {"sliding_attention", "local_attention"}
_ENCODERS = {"new", "gte", "electra", "deberta", "deberta-v2"}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that memory follows from; 0 where not known. ``kv_unknown``: why the cache cannot be told, else None.
    ``kv_width``: elements that one token has in one layer for one KV head. ``latent``: every GPU holds the cache of
    all heads. ``mlp_width``: what a token passes through in one layer, all experts it uses together. ``max_len`` is
    the length the engine takes unless told. ``method``: of quantised weights."""

    heads: int = 0
    kv_heads: int = 0
    kv_width: int = 0
    whole_layers: int = 0
    windowed_layers: int = 0
    window: int = 0
    latent: bool = False
    layers: int = 0
    hidden: int = 0
    mlp_width: int = 0
    vocabulary: int = 0
    max_len: int | None = None
    dtype: str | None = None
    method: str | None = None
    kv_is_8_bit: bool = False
    tied: bool = False
    sees: bool = False
    encoder_only: bool = False
    kv_unknown: str | None = None


def read_shape(config: Config) -> ModelShape:
    """The shape of a model with this configuration. Never raises: what is missing is 0, None or a reason."""
    text = _with_defaults(_text_part(config))
    layers, heads, hidden = _first(text, _LAYERS), _first(text, _HEADS), _first(text, _HIDDEN)
    kinds = _layer_kinds(text, layers)
    width, latent = _kv_width(text, heads, hidden)
    unknown = _kv_unknown(config, text, kinds, heads, width)
    whole, windowed = kinds if kinds is not None else (0, 0)
    quantised = _quantisation(config) or _quantisation(text) or {}
    return ModelShape(
        heads=heads,
        kv_heads=1 if latent else _kv_heads(text, heads),
        kv_width=width,
        whole_layers=whole,
        windowed_layers=windowed,
        window=_number(text, "sliding_window"),
        latent=latent,
        layers=layers,
        hidden=hidden,
        mlp_width=_mlp_width(text, hidden),
        vocabulary=_first(text, _VOCABULARY),
        max_len=_max_len(text),
        dtype=_dtype(text) or _dtype(config),
        method=_method(quantised),
        kv_is_8_bit=_has_8_bit_cache(quantised),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        sees=any(isinstance(config.get(name), Mapping) for name in ("vision_config", "audio_config")),
        encoder_only=_is_encoder(config, text),
        kv_unknown=unknown,
    )


def _text_part(config: Config, depth: int = 0) -> Config:
    """The language model of a multimodal one, itself otherwise."""
    for name in _INNER:
        inner = config.get(name)
        if isinstance(inner, Mapping) and inner and depth < 3:
            return _text_part(inner, depth + 1)
    return config


def _with_defaults(text: Config) -> Config:
    defaults = _CLASS_DEFAULTS.get(str(text.get("model_type")), {})
    return {**defaults, **text}


def _number(config: Config, name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _first(config: Config, names: tuple[str, ...]) -> int:
    return next((value for name in names if (value := _number(config, name))), 0)


def _kv_heads(text: Config, heads: int) -> int:
    """1. said so  2. one for all heads, as older models say it  3. one each."""
    if said := _first(text, _KV_HEADS):  # 1
        return said
    return 1 if text.get("multi_query") is True and not text.get("new_decoder_architecture") else heads  # 2, 3


def _kv_width(text: Config, heads: int, hidden: int) -> tuple[int, bool]:
    """Elements a token has for one KV head in one layer, and whether they are the compressed form of all heads."""
    latent = _number(text, "kv_lora_rank")
    if latent and text.get("model_type") in _LATENT_TYPES:
        return latent + _number(text, "qk_rope_head_dim"), True
    key = _number(text, "head_dim") or _number(text, "hidden_size_per_head") or (hidden // heads if heads else 0)
    return key + (_number(text, "v_head_dim") or key), False


def _layer_kinds(text: Config, layers: int) -> tuple[int, int] | None:
    """Numbers of layers that keep every token, and that keep a window; None where a layer is of another kind."""
    types = text.get("layer_types")
    if isinstance(types, list) and types:
        own = types[: len(types) - _number(text, "num_kv_shared_layers")]
        if not all(isinstance(kind, str) and kind in _WHOLE | _WINDOWED for kind in own):
            return None
        windowed = sum(kind in _WINDOWED for kind in own) if _number(text, "sliding_window") else 0
        return len(own) - windowed, windowed
    windowed = _windowed(text, layers) if _number(text, "sliding_window") else 0
    return layers - windowed, windowed


def _windowed(text: Config, layers: int) -> int:
    """How many layers see a window only, for a model that has one: 1. switched off  2. those after the first so many
    3. all but every n-th  4. all."""
    qwen = str(text.get("model_type", "")).startswith(("qwen2", "qwen3"))
    if not text.get("use_sliding_window", not qwen):  # 1
        return 0
    if qwen:  # 2
        return max(0, layers - _number(text, "max_window_layers"))
    pattern = _number(text, "sliding_window_pattern") or _number(text, "_sliding_window_pattern")
    return layers - layers // pattern if pattern else layers  # 3, 4


def _kv_unknown(config: Config, text: Config, kinds: tuple[int, int] | None, heads: int, width: int) -> str | None:
    if config.get("is_encoder_decoder"):
        return "it has an encoder and a decoder"
    if other := next((name for name in _OTHER_STATE if text.get(name)), None):
        return f"its layers keep other state than keys and values ({other})"
    if kinds is None:
        return "its layers are of kinds that are not known here"
    if _number(text, "kv_lora_rank") and text.get("model_type") not in _LATENT_TYPES:
        return "how its compressed attention is cached is not known here"
    if not heads or not width or not sum(kinds):
        return "config.json does not give its layers and heads"
    return None


def _mlp_width(text: Config, hidden: int) -> int:
    plain = _first(text, _INNER_WIDTH) or 4 * hidden
    used = _first(text, _EXPERTS_USED)
    return max(plain, used * (_number(text, "moe_intermediate_size") or plain) if used else 0)


def _max_len(text: Config) -> int | None:
    """1. what the tokenizer was made for  2. trained to be longer, but kept at the original  3. the smallest of what
    is written down, times its scaling."""
    if stated := _number(text, "model_max_length"):  # 1
        return stated
    written = [value for name in _LENGTHS if (value := _number(text, name))]
    if not written:
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    kind = str(scaling.get("rope_type") or scaling.get("type")) if isinstance(scaling, Mapping) else ""
    if kind in {"longrope", "su"} and (original := _number(text, "original_max_position_embeddings")):  # 2
        return min(original, *written)
    factor = scaling.get("factor") if isinstance(scaling, Mapping) and kind in _LENGTHENING else 1
    gemma3 = str(text.get("model_type", "")).startswith("gemma3")
    longer = factor if isinstance(factor, int | float) and factor > 1 and not gemma3 else 1
    return int(min(written) * longer)  # 3


def _dtype(config: Config) -> str | None:
    value = config.get("dtype") or config.get("torch_dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else None


def _quantisation(config: Config) -> Config | None:
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, Mapping) else None


def _method(quantised: Config) -> str | None:
    return str(quantised.get("quant_method") or "an unnamed method").lower() if quantised else None


def _has_8_bit_cache(quantised: Config) -> bool:
    inner = quantised.get("quantization")
    algorithm = inner.get("kv_cache_quant_algo") if isinstance(inner, Mapping) else None
    return bool(quantised.get("kv_cache_scheme") or quantised.get("kv_cache_quant_algo") or algorithm)


def _is_encoder(config: Config, text: Config) -> bool:
    """Whether each token sees the whole text at once, so that nothing is kept from one step to the next."""
    names = config.get("architectures")
    architectures = [str(name).lower() for name in names] if isinstance(names, list) else []
    if any("bert" in name for name in architectures) or text.get("is_causal") is False:
        return True
    kind = str(text.get("model_type", "")).lower()
    return "bert" in kind or kind in _ENCODERS
