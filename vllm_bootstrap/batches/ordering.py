"""The order in which a batch's lines are worked off: those that begin alike lie next to each other. PURE.

Engines keep what they have computed for the beginning of a prompt, as long as there is room. Lines that share a long
prefix therefore cost less one after the other than spread over a file. All others stay in the order of the file, and so
does every group of lines among its like.

Invariant: sorting by ``Order.key`` leaves lines where they are that share less than ``BOUNDARIES[0]`` characters with
every other, and puts a group where its first line stands. Memory: one entry at most for each line. Only the beginning
of a prompt is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

BOUNDARIES = (512, 1024, 2048, 4096, 8192, 16384)
"""Prefixes of these lengths, in characters, are compared."""
_MOST = BOUNDARIES[-1]

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("tools", "messages"),
    "/v1/completions": ("prompt",),
    "/v1/embeddings": ("input",),
    "/v1/responses": ("tools", "instructions", "input"),
    "/v1/score": ("text_1", "queries", "data_1"),
    "/v1/rerank": ("query",),
}


class Order:
    """Gives each line its place; lines are to be shown in the order of the file."""

    def __init__(self, endpoint: str) -> None:
        self._fields = _FIELDS[endpoint]
        # Hash of a prefix to the line that had it first.
        self._first: dict[int, int] = {}

    def key(self, number: int, body: Mapping[str, Any]) -> bytes:
        """What to sort by."""
        text = self.beginning(body)
        key = b""
        for boundary in BOUNDARIES:
            if len(text) < boundary:
                break
            # Different texts of one hash would stand together for no good, and no harm either.
            first = self._first.setdefault(hash(text[:boundary]), number)
            if first == number:
                break
            key += first.to_bytes(8, "big")
        return key + number.to_bytes(8, "big")

    def beginning(self, body: Mapping[str, Any]) -> str:
        """How a line's prompt begins, roughly: what its engine makes of it begins differently where this does."""
        text = ""
        for name in self._fields:
            value = body.get(name)
            if isinstance(value, str):
                text += value[: _MOST - len(text)]
            elif isinstance(value, list) and value:
                text = _append(text, value)
            if len(text) >= _MOST:
                break
        return text


def _append(text: str, items: list[Any]) -> str:
    """``text`` with messages, prompts or parts behind it, as far as they matter."""
    if isinstance(items[0], int):  # one prompt, as tokens
        return (text + json.dumps(items[:_MOST]))[:_MOST]
    for item in items:
        if len(text) >= _MOST:
            break
        content = item.get("content") if isinstance(item, dict) else item
        if isinstance(content, str):
            role = item.get("role") if isinstance(item, dict) else None
            text += f"{role}\0{content[:_MOST]}\0" if isinstance(role, str) else f"{content[:_MOST]}\0"
        else:
            text += json.dumps(item[:_MOST] if isinstance(item, list) else item) + "\0"
    return text[:_MOST]
