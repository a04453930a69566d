"""Does a model fit on these GPUs? An estimate with its margin of error, from shape, weights and wishes. PURE.

Per GPU: weights + the cache of one request of the full length + what a step needs, against the engine's part of the
memory. The answer is

1. unknown, when a part cannot be told and the parts that can do not settle it
2. no, when even the least that it can need (``need - margin``) is more than there is
3. close: unknown again, when only the margin decides
4. yes

Invariant: ``fits`` is False only where the margin cannot save it, so nothing is refused that could fit. The margin is
made of: 3 % of the weights (10 % where only file sizes are known), 70 % of what a step needs, 1 % of the GPU, and what
releases of vLLM differ by for layers with a window. What a step needs is estimated as: workspaces (512 MiB), the widest
layer for ``max_num_batched_tokens`` tokens, logits for all sequences, CUDA graphs (512 MiB unless eager), 1 GiB for
images or sound. Nothing here reads a file or asks a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vllm_bootstrap.models.shape import ModelShape
from vllm_bootstrap.models.tensors import ELEMENT_BYTES, WeightFacts
from vllm_bootstrap.models.types import FitReport

GIB, MIB = 1024**3, 1024**2
BLOCK = 16
# vLLM's newest default; 0.9 in older releases, which the margin covers.
DEFAULT_FRACTION = 0.92
LARGE_GPU_BYTES, TOKENS_LARGE, TOKENS_SMALL = 70 * GIB, 8192, 2048
WORKSPACES, GRAPHS, SENSES = 512 * MIB, 512 * MIB, GIB
# Steps on their way at once, each of which keeps the tokens of its own: two where scheduling overlaps with running.
STEPS_LIKELY, STEPS_LEAST = 2, 1
# A logit as the sampler holds it: 2 bytes from the model, 4 as float32, 4 while it sorts.
LOGIT_BYTES = 10

_FLOATS = {"F64", "F32", "F16", "BF16"}
_RUNS_IN = {"float16": 2, "half": 2, "bfloat16": 2, "float32": 4, "float": 4}
_CACHE_BYTES = {
    "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "fp8_inc": 1.0, "fp8_per_token_head": 1.0,
    "int8_per_token_head": 1.0, "float16": 2.0, "half": 2.0, "bfloat16": 2.0, "float32": 4.0,
}  # fmt: skip
# What is left of a layer's weights when the engine quantises them itself while loading: bytes of a parameter.
ONLINE = {"fp8": 1.0, "fp8_per_tensor": 1.0, "fp8_per_block": 1.0, "experts_int8": 1.0, "bitsandbytes": 0.5}


@dataclass(frozen=True, slots=True)
class Wish:
    """How the model is to run: engine fields, None where nothing was said. ``fraction``: the engine's part of each
    GPU, None for the engine's default. ``cache_bytes``: of the KV cache, given instead of measured."""

    dtype: str | None = None
    quantization: str | None = None
    max_model_len: int | Literal["auto"] | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    kv_cache_dtype: str | None = None
    cache_bytes: int | None = None
    enforce_eager: bool = False
    fraction: float | None = None
    tensor: int = 1
    pipeline: int = 1


@dataclass(frozen=True, slots=True)
class Room:
    """What there is on each GPU, in bytes. ``free_bytes`` None: whoever is in the way can be put away."""

    total_bytes: int
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Cache:
    """The KV cache of one GPU. ``token_bytes``: what a token takes in all layers while none has forgotten it. The
    other two are bytes for one token in all layers of that kind; ``least_windowed`` without padding."""

    token_bytes: int
    whole: float
    windowed: float
    least_windowed: float
    window: int

    def need(self, length: int, in_flight: int, *, least: bool = False) -> int:
        """Bytes that a request of ``length`` tokens takes, with so many tokens of running steps."""
        kept = min(length, self.window - 1 + in_flight) if self.window else length
        windowed = self.least_windowed if least else self.windowed
        return int(_blocks(length) * self.whole + _blocks(kept) * windowed)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


def runtime_bytes(wish: Wish) -> int:
    """Bytes of one number as the engine computes: what was asked for, else two (vLLM halves what is stored in four)."""
    return _RUNS_IN.get(wish.dtype or "auto", 2)


def cache_of(shape: ModelShape, wish: Wish) -> Cache | None:
    """The KV cache's sizes on each GPU, None where they cannot be told."""
    if shape.encoder_only:
        return Cache(0, 0, 0, 0, 0)
    if shape.kv_unknown is not None:
        return None
    asked = wish.kv_cache_dtype or "auto"
    auto = 1.0 if shape.kv_is_8_bit else float(runtime_bytes(wish))
    element = auto if asked == "auto" else _CACHE_BYTES.get(asked)
    if element is None:
        return None
    heads = 1 if shape.latent else max(1, shape.kv_heads // wish.tensor)
    layers = shape.whole_layers + shape.windowed_layers
    part = -(-layers // wish.pipeline) / layers
    one = heads * shape.kv_width * element * part
    whole, windowed = _padded(shape.whole_layers, shape.windowed_layers)
    return Cache(
        int(layers * one), whole * one, windowed * one, shape.windowed_layers * one,
        shape.window if shape.windowed_layers else 0,
    )  # fmt: skip


def _padded(whole: int, windowed: int) -> tuple[int, int]:
    """Layers of both kinds as vLLM counts them: in groups of equal size, the last of a kind filled up."""
    if not whole or not windowed:
        return whole, windowed
    few, many = sorted((whole, windowed))
    group = many if many < few * 1.5 else few
    return -(-whole // group) * group, -(-windowed // group) * group


def cache_tokens(cache: Cache, cache_bytes: int, length: int, in_flight: int) -> int:
    """Tokens that fit in a cache of that size, as vLLM counts them: full-length requests times their length."""
    need = cache.need(length, in_flight)
    return max(0, int(cache_bytes / need * length)) if need else 0


def weights_of(weights: WeightFacts, shape: ModelShape, wish: Wish) -> int | None:
    """Bytes of weights on each GPU: 1. quantised already, as stored  2. as stored, in the dtype it runs in
    3. quantised while loading, all but the vocabulary  4. by a method nobody knows here: None."""
    split = wish.tensor * wish.pipeline
    if shape.method is not None:  # 1
        return weights.stored_bytes // split
    runs = runtime_bytes(wish)
    loaded = sum(_loaded(dtype, size, runs) for dtype, size in weights.by_dtype.items())
    if wish.quantization is None:  # 2
        return loaded // split
    left = ONLINE.get(wish.quantization)
    if left is None:  # 4
        return None
    scale = loaded / weights.stored_bytes if weights.stored_bytes else 1.0
    kept = int(weights.vocabulary_bytes * scale)
    return int(kept + (loaded - kept) * left / runs) // split  # 3


def _loaded(dtype: str, size: int, runs: int) -> int:
    return int(size * runs / ELEMENT_BYTES[dtype]) if dtype in _FLOATS else size


def step_of(shape: ModelShape, wish: Wish, room: Room) -> int:
    """Bytes that a step needs beside weights and cache: see the module."""
    tokens = batched_tokens(wish, room)
    width = 3 * shape.hidden + 3 * shape.mlp_width // wish.tensor
    layer = tokens * width * 2
    logits = min(wish.max_num_seqs, tokens) * shape.vocabulary * LOGIT_BYTES
    graphs = 0 if wish.enforce_eager else GRAPHS
    return WORKSPACES + layer + (0 if shape.encoder_only else logits) + graphs + (SENSES if shape.sees else 0)


def batched_tokens(wish: Wish, room: Room) -> int:
    """Tokens of one step: what was asked for, else vLLM's default for a GPU of this size."""
    return wish.max_num_batched_tokens or (TOKENS_LARGE if room.total_bytes >= LARGE_GPU_BYTES else TOKENS_SMALL)


@dataclass(frozen=True, slots=True)
class Parts:
    """The estimate in its parts, bytes per GPU. ``cache_need`` None: not known. ``least``: what it needs in any case
    of all that is known; ``likely`` None where a part is missing. ``length`` None: as long as there is room."""

    weights: int | None
    step: int
    cache: Cache | None
    length: int | None
    cache_need: int | None
    likely: int | None
    least: int
    budget: int
    missing: str | None

    @property
    def margin(self) -> int | None:
        return None if self.likely is None else self.likely - self.least


def parts_of(shape: ModelShape, weights: WeightFacts | None, wish: Wish, room: Room) -> Parts:
    """Everything the answer and the suggestions follow from."""
    loaded = weights_of(weights, shape, wish) if weights is not None else None
    step, cache = step_of(shape, wish, room), cache_of(shape, wish)
    length = shape.max_len if wish.max_model_len is None else wish.max_model_len
    auto = length == "auto"
    counted = BLOCK if length == "auto" else length
    sure = 0.97 if weights is not None and weights.exact else 0.9
    budget = int(room.total_bytes * (DEFAULT_FRACTION if wish.fraction is None else wish.fraction))
    if wish.cache_bytes is not None:  # then nothing is measured, and all of the GPU is there to be used
        budget = room.total_bytes
    likely_cache, least_cache = _cache_needs(cache, counted, wish, room)
    missing = _missing(shape, weights, loaded, cache, counted, wish)
    least = int((loaded or 0) * sure) + int(step * 0.3) + least_cache - room.total_bytes // 100
    likely = None if missing is not None else (loaded or 0) + step + likely_cache
    return Parts(
        loaded, step, cache, None if auto else counted, likely_cache if cache is not None and counted else None,
        likely, least, budget, missing,
    )  # fmt: skip


def _cache_needs(cache: Cache | None, length: int | None, wish: Wish, room: Room) -> tuple[int, int]:
    """What the cache takes in all likelihood, and at least."""
    if wish.cache_bytes is not None:
        return wish.cache_bytes, wish.cache_bytes
    if cache is None or length is None:
        return 0, 0
    tokens = batched_tokens(wish, room)
    least = wish.max_num_batched_tokens or min(tokens, TOKENS_SMALL)
    return cache.need(length, STEPS_LIKELY * tokens), cache.need(length, STEPS_LEAST * least, least=True)


def _missing(
    shape: ModelShape,
    weights: WeightFacts | None,
    loaded: int | None,
    cache: Cache | None,
    length: int | None,
    wish: Wish,
) -> str | None:
    """Why the whole cannot be told, None where it can."""
    if weights is None:
        return "the sizes of its weights are not known"
    if loaded is None:
        return f"what {wish.quantization} leaves of its weights is not known here"
    if shape.kv_unknown is not None and not shape.encoder_only:
        return f"its KV cache cannot be told: {shape.kv_unknown}"
    if cache is None:
        return f"the size of kv_cache_dtype {wish.kv_cache_dtype} is not known here"
    if length is None and not shape.encoder_only:
        return "config.json does not give its length: name max_model_len"
    return None


def judge(shape: ModelShape, weights: WeightFacts | None, wish: Wish, room: Room) -> FitReport:
    """The answer, without suggestions."""
    parts = parts_of(shape, weights, wish, room)
    fits, why = _verdict(parts, wish, room)
    cache_room = parts.budget - (parts.weights or 0) - parts.step if wish.cache_bytes is None else wish.cache_bytes
    tokens = None
    if parts.missing is None and parts.cache is not None and parts.cache.token_bytes:
        length, in_flight = parts.length, STEPS_LIKELY * batched_tokens(wish, room)
        tokens = cache_tokens(parts.cache, cache_room, length or shape.max_len or BLOCK, in_flight)
    return FitReport(
        fits=fits,
        why=why,
        weights_bytes=parts.weights,
        kv_bytes_per_token=parts.cache.token_bytes if parts.cache is not None else None,
        kv_bytes=parts.cache_need,
        overhead_bytes=parts.step,
        margin_bytes=parts.margin,
        budget_bytes=parts.budget,
        free_bytes=room.free_bytes,
        gpu_count=wish.tensor * wish.pipeline,
        max_model_len=parts.length if parts.length is not None else longest(shape, weights, wish, room),
        max_tokens_in_cache=tokens,
    )


def _verdict(parts: Parts, wish: Wish, room: Room) -> tuple[bool | None, str]:
    said = _said(parts, wish)
    if parts.least > parts.budget:
        return False, f"{said}; {gib(parts.budget)} may be used."
    if _cache_is_too_small(parts, wish, room):
        return False, f"{said}, but kv_cache_memory_bytes gives the cache {gib(wish.cache_bytes or 0)}."
    wanted = _wanted_free(parts, wish, room)
    if room.free_bytes is not None and room.free_bytes < wanted:
        return False, f"The engine wants {gib(wanted)} of each GPU, of which {gib(room.free_bytes)} are free now."
    if parts.likely is None:
        return None, f"Cannot be told: {parts.missing}."
    if parts.likely > parts.budget:
        over = gib(parts.likely - parts.budget)
        return None, f"Too close to tell: {said}; {gib(parts.budget)} may be used, {over} less."
    return True, f"{said}; {gib(parts.budget)} may be used."


def _wanted_free(parts: Parts, wish: Wish, room: Room) -> int:
    """What must be free at least when the engine starts: it checks for all it may use, not for what it needs. What
    the driver keeps for itself and an unnamed default make up to 1 and 3 % of the GPU."""
    if wish.cache_bytes is not None:
        return parts.least
    return parts.budget - room.total_bytes * (3 if wish.fraction is None else 1) // 100


def _cache_is_too_small(parts: Parts, wish: Wish, room: Room) -> bool:
    if wish.cache_bytes is None or parts.cache is None or parts.length is None:
        return False
    return _cache_needs(parts.cache, parts.length, replace(wish, cache_bytes=None), room)[1] > wish.cache_bytes


def _said(parts: Parts, wish: Wish) -> str:
    pieces = []
    if parts.weights is not None:
        pieces.append(f"{gib(parts.weights)} of weights")
    if parts.cache_need:
        of = "" if parts.length is None else f" for max_model_len {parts.length}"
        pieces.append(f"{gib(parts.cache_need)} of KV cache{of}")
    pieces.append(f"{gib(parts.step)} to run")
    count = wish.tensor * wish.pipeline
    where = "one GPU" if count == 1 else f"each of {count} GPUs"
    total = "" if parts.likely is None else f": {gib(parts.likely)}"
    margin = "" if parts.margin is None else f" (give or take {gib(parts.margin)})"
    return f"On {where} it needs about {', '.join(pieces)}{total}{margin}"


def longest(shape: ModelShape, weights: WeightFacts | None, wish: Wish, room: Room) -> int | None:
    """The largest ``max_model_len`` that fits beyond doubt, None where there is none or it cannot be told."""
    most = shape.max_len or (wish.max_model_len if isinstance(wish.max_model_len, int) else None)
    if most is None:
        return None
    low, high = 0, most // BLOCK
    while low < high:
        middle = (low + high + 1) // 2
        shorter = replace(wish, max_model_len=middle * BLOCK)
        parts = parts_of(shape, weights, shorter, room)
        enough = parts.likely is not None and parts.likely <= parts.budget
        enough = enough and not _cache_is_too_small(parts, shorter, room)
        low, high = (middle, high) if enough else (low, middle - 1)
    return low * BLOCK or None


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
