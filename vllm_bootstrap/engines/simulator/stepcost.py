"""Profiles: what a step of an engine takes, and what its API server adds. Values read from JSON files. PURE.

A step's time is a sum: a base, so much for each decoding sequence, for each token in their contexts, for each prompt
of which some is read, for each of these tokens, and for each pair of one of them and one it looks back on. A profile
that is ``measured`` was fitted to an engine (``python -m bench.simfit fit``); others are estimates, and ``source`` says
from what.

Invariant: a profile is whole and sane or it is refused, with the field's name.
It must not know files: ``profile_of`` takes text.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, fields
from typing import Any


class BadProfile(ValueError):
    """A profile that cannot be used; the text names the field."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Times in seconds. The API server is one worker, busy ``api_request_s`` and ``api_prompt_token_s`` with a request,
    ``api_step_s`` and ``api_token_s`` with what a step brought; ``latency_s`` passes between it and the engine and
    keeps nobody busy."""

    name: str
    source: str
    measured: bool
    step_base_s: float
    step_sequence_s: float = 0.0
    step_context_token_s: float = 0.0
    step_prompt_s: float = 0.0
    step_prefill_token_s: float = 0.0
    step_prefill_pair_s: float = 0.0
    api_request_s: float = 0.0
    api_prompt_token_s: float = 0.0
    api_step_s: float = 0.0
    api_token_s: float = 0.0
    latency_s: float = 0.0
    block_size: int = 16
    kv_blocks: int = 4096
    max_num_batched_tokens: int = 2048

    def step_s(self, decodes: int, context: int, prompts: int, prefill: int, pairs: float) -> float:
        """Seconds of one step. ``context``: tokens that the decoding sequences look back on; ``prompts``: how many
        are read, ``prefill`` tokens of them; ``pairs``: these tokens times those that they look back on."""
        return (
            self.step_base_s
            + self.step_sequence_s * decodes
            + self.step_context_token_s * context
            + self.step_prompt_s * prompts
            + self.step_prefill_token_s * prefill
            + self.step_prefill_pair_s * pairs
        )


def profile_of(text: str) -> Profile:
    """Read a profile. Raises ``BadProfile``."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadProfile(f"a profile is a JSON object: {exc}") from None
    if not isinstance(given, dict):
        raise BadProfile("a profile is a JSON object")
    known = {f.name: f for f in fields(Profile)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise BadProfile(f"a profile has no field {unknown[0]!r}")
    missing = [name for name, f in known.items() if f.default is MISSING and name not in given]
    if missing:
        raise BadProfile(f"the field {missing[0]!r} is missing")
    return Profile(**{name: _checked(name, str(known[name].type), value) for name, value in given.items()})


def _checked(name: str, kind: str, value: Any) -> Any:
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str) and value:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "int" and number and isinstance(value, int) and value >= 1:
        return value
    if kind == "float" and number and math.isfinite(value) and value >= 0:
        return float(value)
    wanted = {"bool": "true or false", "str": "text", "int": "a positive whole number"}.get(kind, "a number from 0")
    raise BadProfile(f"{name!r} must be {wanted}, not {value!r}")
