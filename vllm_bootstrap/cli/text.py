"""Foreign text made harmless, and lines for a pipe. Pure functions but for the clock in ``age``.

What engines and models write may hold terminal control sequences: ``harmless`` leaves colours and takes the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from vllm_bootstrap.wording import duration, percent, short, size, tokens_per_second

__all__ = ["age", "columns", "duration", "harmless", "narrowed", "percent", "short", "size", "tokens_per_second"]

_COLOUR = r"\x1b\[[0-9;:]*m"
_ESCAPES = re.compile(
    rf"(?P<keep>{_COLOUR})"
    r"|\x1b\[[0-?]*[ -/]*[@-~]"  # control sequences: cursor, screen, modes
    r"|(?:\x1b[P\]X^_]|[\x90\x9d\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # titles, clipboard, links
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)


def harmless(text: str, *, colours: bool = True) -> str:
    """``text`` without control sequences other than colours (without these too where they are not wanted)."""
    return _ESCAPES.sub(lambda match: (match["keep"] or "") if colours else "", text)


def age(since: datetime) -> str:
    """How long ago a moment was."""
    return duration((datetime.now(UTC) - since).total_seconds())


def narrowed(
    header: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str], width: int
) -> tuple[list[str], list[list[str]]]:
    """A table without as many of the columns ``spare``, first the first, as it needs to fit into ``width``."""
    shown, cells = list(header), [list(row) for row in rows]
    for name in spare:
        widths = [max(len(row[i]) for row in [shown, *cells]) for i in range(len(shown))]
        if sum(widths) + 2 * len(widths) <= width:
            break
        at = shown.index(name)
        for row in [shown, *cells]:
            del row[at]
    return shown, cells


def columns(header: list[str], rows: list[list[str]]) -> list[str]:
    """Rows as aligned lines, for a pipe."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
