"""What would fit instead? Single changes to a launch, each tried before it is named. PURE.

Invariant: a typed suggestion (``field`` and ``value``) makes ``fit.judge`` say yes when it alone is applied. Knows what
changes are possible, not who asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from vllm_bootstrap.models import fit
from vllm_bootstrap.models.fit import Room, Wish
from vllm_bootstrap.models.shape import ModelShape
from vllm_bootstrap.models.tensors import WeightFacts
from vllm_bootstrap.models.types import FitReport

Suggestion = Mapping[str, Any]

MOST_GPUS = 64
MOST_FRACTION = 0.95
SHARE_STEPS = 20
LEAST_LENGTH = 512


class Case(NamedTuple):
    """Everything about one question. ``share``: of each GPU, 1 for the whole; ``whole_fraction``: what an engine takes
    of a whole one. ``gpus_here``: how many there are."""

    shape: ModelShape
    weights: WeightFacts | None
    wish: Wish
    room: Room
    gpus_here: int
    share: float = 1.0
    whole_fraction: float = 0.9

    def fits(self, wish: Wish) -> bool:
        return fit.judge(self.shape, self.weights, wish, self.room).fits is True


def report(case: Case) -> FitReport:
    """The answer, with what would fit instead where it is not yes."""
    plain = fit.judge(case.shape, case.weights, case.wish, case.room)
    return plain if plain.fits else replace(plain, suggestions=tuple(suggestions(case)))


def suggestions(case: Case) -> list[Suggestion]:
    """What would fit, the least intrusive first."""
    return [
        *_shorter(case),
        *_smaller_numbers(case),
        *_more_of_the_gpu(case),
        *_more_gpus(case),
        *_smaller_weights(case),
    ]


def counts(gpus: int, heads: int, pipeline: int = 1) -> Sequence[int]:
    """Numbers of GPUs to try, fewest first: powers of two that divide the heads, times the pipeline's stages."""
    sizes = [2**power for power in range(MOST_GPUS.bit_length())]
    return [size * pipeline for size in sizes if size * pipeline <= gpus and (not heads or heads % size == 0)]


def with_gpus(wish: Wish, count: int) -> Wish:
    """The same on so many GPUs, split within the layers."""
    return replace(wish, tensor=count // wish.pipeline)


def _shorter(case: Case) -> Iterator[Suggestion]:
    length = fit.longest(case.shape, case.weights, case.wish, case.room)
    if length is None or length < LEAST_LENGTH or case.shape.encoder_only:
        return
    length -= length % (256 if length >= 1024 else fit.BLOCK)
    asked = case.wish.max_model_len
    if (isinstance(asked, int) and asked <= length) or not case.fits(replace(case.wish, max_model_len=length)):
        return
    yield _typed("max_model_len", length, f"max_model_len {length} would fit.")


def _smaller_numbers(case: Case) -> Iterator[Suggestion]:
    wish = case.wish
    if wish.dtype in {"float32", "float"} and case.fits(replace(wish, dtype="bfloat16")):
        yield _typed("dtype", "bfloat16", "dtype bfloat16 would fit: it halves weights and cache.")
    auto = (wish.kv_cache_dtype or "auto") == "auto" and not case.shape.kv_is_8_bit
    if auto and case.fits(replace(wish, kv_cache_dtype="fp8")):
        yield _typed("kv_cache_dtype", "fp8", "kv_cache_dtype fp8 would fit: it halves the cache or better.")


def _more_of_the_gpu(case: Case) -> Iterator[Suggestion]:
    """1. a larger share of it  2. more of a whole one  3. less, where others have taken some of it."""
    wish, room = case.wish, case.room
    if case.share < 1:  # 1
        steps = [step / SHARE_STEPS for step in range(1, SHARE_STEPS + 1)]
        for share in (step for step in steps if step > case.share):
            if case.fits(replace(wish, fraction=round(share * case.whole_fraction, 3))):
                yield _typed("gpu_share", share, f"gpu_share {share:g} would fit.")
                return
        return
    fraction = fit.DEFAULT_FRACTION if wish.fraction is None else wish.fraction
    tried = [] if wish.cache_bytes is not None else [MOST_FRACTION] if fraction < MOST_FRACTION else []  # 2
    if room.free_bytes is not None and room.free_bytes < fraction * room.total_bytes:  # 3
        tried = [int(room.free_bytes / room.total_bytes * 100) / 100]
    for value in tried:
        if value > 0 and case.fits(replace(wish, fraction=value)):
            yield _typed("gpu_memory_utilization", value, f"gpu_memory_utilization {value:g} would fit.")


def _more_gpus(case: Case) -> Iterator[Suggestion]:
    now = case.wish.tensor * case.wish.pipeline
    for count in counts(MOST_GPUS, case.shape.heads, case.wish.pipeline):
        if count > now and case.fits(with_gpus(case.wish, count)):
            if count <= case.gpus_here:
                yield _typed("gpu_count", count, f"{count} GPUs would fit.")
            else:
                yield {"message": f"It would take {count} such GPUs, {case.gpus_here} are here."}
            return


def _smaller_weights(case: Case) -> Iterator[Suggestion]:
    wish, weights = case.wish, case.weights
    if case.shape.method is not None or wish.quantization is not None or weights is None:
        return
    if case.fits(replace(wish, quantization="fp8")):
        text = "quantization fp8 would fit: it halves the weights while they are loaded (GPUs from Ada and Hopper on)."
        yield _typed("quantization", "fp8", text)
    quarter = replace(wish, quantization="bitsandbytes")
    if case.fits(quarter):
        size = fit.weights_of(weights, case.shape, quarter) or 0
        yield {"message": f"Weights quantised to 4 bits (AWQ, GPTQ) would fit: about {fit.gib(size)} on each GPU."}


def _typed(field: str, value: object, text: str) -> Suggestion:
    return {"field": field, "value": value, "message": text}
