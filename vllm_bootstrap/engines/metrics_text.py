"""The few numbers we read from an engine's Prometheus text. PURE.

Names changed between vLLM releases, so each number is looked up under all names it ever had. Several samples of one
name (one for each engine process of a launch) are added up. A number that is not there is unknown, not 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

ALIASES: Mapping[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    "generation_tokens": ("vllm:generation_tokens_total", "vllm:generation_tokens"),
    "prompt_tokens": ("vllm:prompt_tokens_total", "vllm:prompt_tokens"),
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "preemptions": ("vllm:num_preemptions_total", "vllm:num_preemptions"),
    "inter_token_s": ("vllm:inter_token_latency_seconds_sum", "vllm:time_per_output_token_seconds_sum"),
    "inter_tokens": ("vllm:inter_token_latency_seconds_count", "vllm:time_per_output_token_seconds_count"),
    "prefill_s": ("vllm:request_prefill_time_seconds_sum",),
    "prefills": ("vllm:request_prefill_time_seconds_count",),
}


@dataclass(frozen=True, slots=True)
class Counters:
    """An engine's own count of its work. ``kv_usage`` is a fraction (the fullest of several). ``inter_token_s`` are the
    seconds between a sequence's tokens, summed over ``inter_tokens`` of them; ``prefill_s`` likewise from the first
    step of a prompt to its first token. None: unknown."""

    running: float | None = None
    waiting: float | None = None
    generation_tokens: float | None = None
    prompt_tokens: float | None = None
    kv_usage: float | None = None
    preemptions: float | None = None
    inter_token_s: float | None = None
    inter_tokens: float | None = None
    prefill_s: float | None = None
    prefills: float | None = None


def parse_counters(text: str) -> Counters:
    """Read the numbers out of Prometheus text. Lines that cannot be read are passed over."""
    samples = _samples(text, {name for names in ALIASES.values() for name in names})
    found: dict[str, float | None] = {}
    for number, names in ALIASES.items():
        values = next((samples[name] for name in names if name in samples), None)
        found[number] = None if values is None else max(values) if number == "kv_usage" else sum(values)
    return Counters(**found)


def _samples(text: str, wanted: set[str]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name not in wanted:
            continue
        # The value is the first word behind the labels; a label's value may hold blanks, a timestamp may follow.
        rest = line.rpartition("}")[2] if "{" in line else line.removeprefix(name)
        words = rest.split()
        value = _number(words[0]) if words else None
        if value is not None:
            samples.setdefault(name, []).append(value)
    return samples


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
