"""Writes the diagrams of states into the docs. ``--check`` only tells whether they are current (exit code)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from vllm_bootstrap.batches import jobs
from vllm_bootstrap.launches import lifecycle

DOCS = Path(__file__).resolve().parent.parent / "docs"
DIAGRAMS: dict[str, tuple[str, Callable[[], str]]] = {
    "architecture.md": ("lifecycle", lifecycle.diagram),
    "batches.md": ("states", jobs.diagram),
}


def with_diagram(page: str, name: str, diagram: str) -> str:
    """The page with a fresh diagram between its markers. Raises ``ValueError`` when they are missing."""
    begin_mark, end_mark = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = page.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise ValueError(f"{begin_mark} ... {end_mark} not found")
    return f"{before}{begin_mark}\n```mermaid\n{diagram}\n```\n{end_mark}{after}"


def main(arguments: list[str]) -> int:
    stale = False
    for page_name, (name, diagram) in DIAGRAMS.items():
        path = DOCS / page_name
        page = path.read_text(encoding="utf-8")
        fresh = with_diagram(page, name, diagram())
        stale = stale or fresh != page
        if "--check" not in arguments:
            path.write_text(fresh, encoding="utf-8")
    return int(stale and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
