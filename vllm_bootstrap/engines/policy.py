"""What a launch may ask of vLLM's flags: an allow-list over every recorded flag. Reads one data file.

Invariant: a flag that is not classified counts as guarded, so a newly recorded version opens nothing by itself.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from vllm_bootstrap.engines.capabilities import DATA


class Policy(StrEnum):
    """``FIELD``: has a typed field. ``OURS``: set by the daemon. ``GUARDED``: only when the operator names it.
    ``WORD``: allowed with a plain word as value. ``SAFE``: allowed."""

    FIELD = "field"
    OURS = "ours"
    GUARDED = "guarded"
    WORD = "word"
    SAFE = "safe"


@functools.cache
def _classes() -> Mapping[str, Policy]:
    data: dict[str, Any] = json.loads((DATA / "vllm_policy.json").read_text())
    return {name: policy for policy in Policy for name in data[policy.value]}


def policy_of(name: str) -> Policy:
    """The policy of a flag, given without its dashes in front."""
    return _classes().get(name, Policy.GUARDED)
