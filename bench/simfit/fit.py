"""From samples to a profile: least squares on relative errors, no coefficient below zero. Nothing but arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float], rounds: int = 20_000) -> list[float]:
    """Coefficients >= 0 that make ``rows · x`` relatively nearest to ``values`` (coordinate descent)."""
    scaled = [[cell / value for cell in row] for row, value in zip(rows, values, strict=True)]
    size = len(scaled[0])
    widths = [max(row[i] for row in scaled) or 1.0 for i in range(size)]
    scaled = [[cell / width for cell, width in zip(row, widths, strict=True)] for row in scaled]
    gram = [[sum(row[i] * row[j] for row in scaled) for j in range(size)] for i in range(size)]
    aims = [sum(row[i] for row in scaled) for i in range(size)]
    x = [0.0] * size
    for _ in range(rounds):
        before = list(x)
        for i in range(size):
            rest = sum(gram[i][j] * x[j] for j in range(size) if j != i)
            x[i] = max(0.0, (aims[i] - rest) / gram[i][i])
        if max(abs(a - b) for a, b in zip(x, before, strict=True)) < 1e-12:
            break
    return [coefficient / width for coefficient, width in zip(x, widths, strict=True)]


# Of a step; ``passage`` is what a request waits beside its step: the way through the API server, there and back.
TERMS = (
    "step_base_s", "step_sequence_s", "step_context_token_s", "step_prompt_s", "step_prefill_token_s",
    "step_prefill_pair_s", "passage",
)  # fmt: skip


# A busy engine is what a profile is for: its few samples count as much as many.
BUSY_WEIGHT = 6


@dataclass(frozen=True, slots=True)
class Row:
    """A sample: how often each of ``TERMS`` is in it, and what was measured."""

    text: str
    terms: tuple[float, ...]
    seconds: float

    def said(self, coefficients: Mapping[str, float]) -> float:
        return sum(coefficients[name] * times for name, times in zip(TERMS, self.terms, strict=True))


def rows(swept: Mapping[str, Any]) -> list[Row]:
    found = []
    for s in swept["decode"]:
        text = f"{s['decodes']} decoding, {s['context'] / s['decodes']:.0f} tokens each"
        found.append(Row(text, (1, s["decodes"], s["context"], 0, 0, 0, 0), s["step_s"]))
    for s in swept["mixed"]:
        prompt = s["prompt"]
        terms = (1, s["decodes"], s["context"], 1, prompt, prompt**2 / 2, 0)
        found.append(Row(f"prompt of {prompt} beside {s['decodes']} decoding", terms, s["step_s"]))
    for s in swept["busy"]:
        n = s["steps"]
        totals = (s["decodes"], s["context"], s["requests"], s["prefill"], s["pairs"])
        row = Row(f"{s['streams']} streams of mixed traffic", (1, *(t / n for t in totals), 0), s["seconds"] / n)
        found += [row] * BUSY_WEIGHT
    for s in swept["prefill"]:
        prompt = s["prompt"]
        found.append(Row(f"prompt of {prompt}, first token", (1, 0, 0, 1, prompt, prompt**2 / 2, 1), s["ttft_s"]))
    return found


def coefficients(swept: Mapping[str, Any]) -> dict[str, float]:
    """Seconds for each of ``TERMS``."""
    samples = rows(swept)
    return dict(zip(TERMS, least_squares([r.terms for r in samples], [r.seconds for r in samples]), strict=True))


def profile(swept: Mapping[str, Any], *, name: str, source: str, budget: int) -> dict[str, Any]:
    """A profile file's content from a sweep (``measure.sweep``)."""
    found = coefficients(swept)
    passage = found.pop("passage")
    api_request, api_prompt = least_squares(
        [(1.0, s["prompt"]) for s in swept["prefill"]], [s["request_cpu_s"] for s in swept["prefill"]]
    )
    api_step, api_token = least_squares(
        [(1.0, s["decodes"]) for s in swept["decode"]],
        [
            max(1e-6, s["step_cpu_s"] - (api_request + api_prompt * s["prompt"]) * s["requests_a_step"])
            for s in swept["decode"]
        ],
    )
    found |= {
        "step_prefill_token_s": max(0.0, found["step_prefill_token_s"] - api_prompt),
        "api_request_s": api_request,
        "api_prompt_token_s": api_prompt,
        "api_step_s": api_step,
        "api_token_s": api_token,
        "latency_s": max(0.0, passage - api_request - api_step - api_token),
    }
    return {
        "name": name,
        "source": source,
        "measured": True,
        **{key: float(f"{value:.3g}") for key, value in found.items()},
        "block_size": swept["block_size"],
        "kv_blocks": swept["kv_blocks"],
        "max_num_batched_tokens": budget,
    }
