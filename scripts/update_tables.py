"""Writes the tables of docs/api.md that the code knows better. ``--check`` only tells whether they are current."""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_bootstrap.auth import scopes
from vllm_bootstrap.metrics import Metrics

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"


def metrics_table() -> str:
    rows = [f"| `{name}` | {kind} | {labels} | {text} |" for name, kind, labels, text in Metrics().describe()]
    return "\n".join(["| metric | type | labels | meaning |", "| --- | --- | --- | --- |", *rows])


def with_tables(page: str) -> str:
    """The page with fresh tables between their markers. Raises ``ValueError`` when a marker is missing."""
    for name, table in (("scopes", scopes.table()), ("metrics", metrics_table())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found_begin, rest = page.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ValueError(f"{begin} ... {end} not found")
        page = f"{before}{begin}\n{table}\n{end}{after}"
    return page


def main(arguments: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    fresh = with_tables(page)
    if "--check" in arguments:
        return int(fresh != page)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
