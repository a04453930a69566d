"""How commands speak: JSON where asked for, tables on a terminal, plain lines in a pipe.

Invariant: results go to standard output, everything else to standard error. ``rich`` is imported only when standard
output is a terminal. What came from engines loses its terminal control sequences before it reaches one.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from vllm_bootstrap.cli import text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STATE_STYLES = {
    "ready": "green", "bootstrapping": "cyan", "stopping": "yellow", "stopped": "dim", "failed": "red",
    "free": "green", "claimed": "cyan", "busy": "yellow", "unsettled": "yellow", "unknown": "red",
    "running": "green", "queued": "yellow", "reading": "cyan",
    "validating": "cyan", "in_progress": "green", "finalizing": "green", "completed": "green", "expired": "red",
    "cancelling": "yellow", "cancelled": "dim",
    "loaded": "green", "loading": "cyan", "waking": "cyan", "unloaded": "dim", "asleep": "dim", "falling": "yellow",
    "falling_asleep": "yellow", "unloading": "yellow", "unresponsive": "red",
}  # fmt: skip


def on_terminal() -> bool:
    return sys.stdout.isatty()


def console() -> Console:
    """A console on standard output; only for a terminal."""
    from rich.console import Console  # noqa: PLC0415 - see the invariant

    return Console(highlight=False)


def say(line: str = "") -> None:
    """One line of a result."""
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def note(line: str) -> None:
    """Something for people that is not part of the result."""
    sys.stderr.write(text.harmless(line) + "\n")


def raw(content: str) -> None:
    """Foreign text as it is; on a terminal without control sequences."""
    sys.stdout.write(printable(content))
    sys.stdout.flush()


def printable(content: str) -> str:
    shown = text.harmless(content) if on_terminal() else content
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "replace").decode(encoding)


def emit(value: BaseModel | Any, *, in_one_line: bool = False) -> None:
    """A result as JSON."""
    plain = value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
    say(json.dumps(plain, indent=None if in_one_line else 2, ensure_ascii=False))


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    state_column: int | None = None,
    spare: Sequence[str] = (),
) -> None:
    """Rows under a header. ``state_column`` is coloured by its first word. ``spare``: columns to its right that are
    left out on a terminal, first the first, until the others fit side by side."""
    found = [[text.harmless(cell, colours=False) for cell in row] for row in rows]
    if not on_terminal():
        for line in text.columns(list(header), found):
            say(line)
        return
    screen = console()
    shown, cells = text.narrowed(header, found, spare, screen.width)
    screen.print(_drawn(shown, cells, state_column))
    missing = [name for name in header if name not in shown]
    if missing:
        note(f"Not shown, this terminal is too narrow: {', '.join(missing)}.")


@contextlib.contextmanager
def redrawn(
    header: Sequence[str], *, state_column: int | None = None, spare: Sequence[str] = ()
) -> Generator[Callable[[Sequence[Sequence[str]]], None]]:
    """A function that draws a table of rows in place of the one before; only for a terminal. Arguments as of
    ``table``."""
    from rich.live import Live  # noqa: PLC0415 - see the invariant

    with Live(console=console(), auto_refresh=False) as live:

        def draw(rows: Sequence[Sequence[str]]) -> None:
            found = [[text.harmless(cell, colours=False) for cell in row] for row in rows]
            shown, cells = text.narrowed(header, found, spare, live.console.width)
            live.update(_drawn(shown, cells, state_column), refresh=True)

        yield draw


def _drawn(header: Sequence[str], found: Sequence[Sequence[str]], state_column: int | None) -> Table:
    from rich.table import Table  # noqa: PLC0415 - see the invariant
    from rich.text import Text  # noqa: PLC0415

    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        made.add_column(name, overflow="fold")
    for row in found:
        cells = [Text(cell) for cell in row]
        if state_column is not None:
            cells[state_column].stylize(style_of(row[state_column]))
        made.add_row(*cells)
    return made


def pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, one a line."""
    found = [(name, text.harmless(value, colours=False)) for name, value in rows if value]
    width = max((len(name) for name, _ in found), default=0)
    for name, value in found:
        say(f"{name.ljust(width)}  {value}")


def styled(line: str, style: str) -> str:
    """``line`` in a colour, on a terminal."""
    codes = {"green": "32", "red": "31", "yellow": "33", "cyan": "36", "dim": "2", "bold": "1"}
    return f"\x1b[{codes[style]}m{line}\x1b[0m" if on_terminal() and style in codes else line


def style_of(state: str) -> str:
    return STATE_STYLES.get(state.split(" ", maxsplit=1)[0].rstrip(",:"), "none")
