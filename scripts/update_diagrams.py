"""Writes the lifecycle diagram into docs/architecture.md. ``--check`` only tells whether it is current (exit code)."""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_bootstrap.launches import lifecycle

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
BEGIN, END = "<!-- lifecycle:begin -->", "<!-- lifecycle:end -->"


def with_diagram(page: str) -> str:
    """The page with a fresh diagram between its markers. Raises ``ValueError`` when they are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{BEGIN} ... {END} not found")
    return f"{before}{BEGIN}\n```mermaid\n{lifecycle.diagram()}\n```\n{END}{after}"


def main(arguments: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    fresh = with_diagram(page)
    if "--check" in arguments:
        return int(fresh != page)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
