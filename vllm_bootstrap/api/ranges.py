"""Which bytes of a file a request wants (RFC 9110, chapter 14). PURE.

Invariant: what is asked for is answered exactly, refused, or ignored in favour of the whole: never a wrong part.
"""

from __future__ import annotations

import re

_RANGE = re.compile(r"bytes[ \t]*=[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*", re.IGNORECASE)


class Unsatisfiable(Exception):
    """The file has none of the bytes that are wanted."""


def wanted(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last, None for the whole: without the header, and where it is ignored, as HTTP
    allows (several ranges, other units, no proper form). Raises ``Unsatisfiable``."""
    match = _RANGE.fullmatch(header) if header is not None else None
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = int(match[2])
        if length == 0 or size == 0:
            raise Unsatisfiable
        return max(0, size - length), size
    first = int(match[1])
    last = int(match[2]) if match[2] else max(first, size - 1)
    if last < first:
        return None
    if first >= size:
        raise Unsatisfiable
    return first, min(last + 1, size)


def still_holds(if_range: str | None, etag: str, modified: str) -> bool:
    """Whether a range may be answered: the client's earlier part is of this very file, as far as it says."""
    return if_range is None or if_range.strip() in {etag, modified}
