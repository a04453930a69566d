"""How many tokens a request will cost, before an engine has said so. PURE.

Invariant: an estimate is made from what is at hand (sizes and stated limits), in constant time but for media, and is
only ever used to reserve: the engine's own count replaces it. Estimates err upwards where a client states a limit.

* prompt: one token for every 4 bytes of the JSON body; media sent inside it count ``MEDIA_TOKENS`` each instead of
  their bytes; an uploaded file counts ``MEDIA_TOKENS``;
* answer: the stated limit (``max_completion_tokens``, ``max_tokens``, ``max_output_tokens``) or ``OUTPUT_TOKENS``, for
  each sequence; nothing on routes that generate no text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

BYTES_PER_TOKEN = 4
MEDIA_TOKENS = 1_000
OUTPUT_TOKENS = 256
MOST_TOKENS = 10_000_000

_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_GENERATES = ("completions", "responses", "messages", "transcriptions", "translations")
_INLINE = re.compile(r'"data:[^",]{0,100};base64,[A-Za-z0-9+/=_-]*')


def prompt_tokens(size: int, text: str | None) -> int:
    """``text`` None: a multipart upload, or no body."""
    if text is None:
        return MEDIA_TOKENS if size else 0
    if ";base64," not in text:
        return min(MOST_TOKENS, size // BYTES_PER_TOKEN)
    found = [match.end() - match.start() for match in _INLINE.finditer(text)]
    return min(MOST_TOKENS, max(0, size - sum(found)) // BYTES_PER_TOKEN + len(found) * MEDIA_TOKENS)


def output_tokens(path: str, fields: Mapping[str, Any], sequences: int) -> int:
    """Tokens of all its answers together."""
    if not path.endswith(_GENERATES):
        return 0
    limit = OUTPUT_TOKENS
    for name in _LIMITS:
        if name in fields:
            stated = fields[name]
            if isinstance(stated, int) and not isinstance(stated, bool) and stated >= 0:
                limit = stated
                break
    return min(MOST_TOKENS, limit * sequences)
