"""Chunks of HTTP's chunked coding in their plain form: the size in lower-case hexadecimal, CRLF, the bytes, CRLF. PURE.

Invariant: what counts as a plain chunk is exactly one chunk with nothing left open: no leading zeros, no extensions,
never the last one (size 0). Everything else is for a real parser to judge. Must not know: connections, what a chunk
holds.
"""

from __future__ import annotations

KNOWN = 2048
"""Shorter whole chunks have a line in ``SIZE_LINES``, and shorter pieces are framed at less cost. Those of streams are
shorter."""

_SIZES = [b"%x\r\n" % size for size in range(KNOWN)]
_NONE = bytes(KNOWN)  # longer than what it is looked for in, so that nothing begins with it


def _size_lines() -> list[bytes]:
    """For each length of a whole plain chunk the only line that it can begin with."""
    lines = [_NONE] * KNOWN
    for size in range(1, KNOWN):
        whole = len(_SIZES[size]) + size + 2
        if whole < KNOWN:
            lines[whole] = _SIZES[size]
    return lines


SIZE_LINES = _size_lines()
"""``n < KNOWN`` bytes are a whole plain chunk if they start with ``SIZE_LINES[n]`` and end with CRLF. (A table and no
function: a call for each chunk would cost as much as what it does.)"""


def framed(piece: bytes) -> bytes:
    """``piece``, which is not empty, as a plain chunk."""
    size = len(piece)
    return b"".join((_SIZES[size] if size < KNOWN else b"%x\r\n" % size, piece, b"\r\n"))
