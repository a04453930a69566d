"""The coverage gate's decision."""

from __future__ import annotations

from pathlib import Path

import check_coverage


def report(total: float, percent: float) -> dict[str, object]:
    entry = {"summary": {"percent_covered": percent}, "missing_lines": [3], "missing_branches": [[4, -1]]}
    return {"totals": {"percent_covered": total}, "files": {"p/a.py": entry}}


def test_both_bars_met() -> None:
    assert check_coverage.shortfalls(report(90, 100), [Path("p/a.py")]) == []


def test_too_little_overall() -> None:
    assert check_coverage.shortfalls(report(89.9, 100), []) == ["89.9 % overall, 90 % wanted"]


def test_a_pure_module_must_be_covered_whole() -> None:
    (problem,) = check_coverage.shortfalls(report(95, 99), [Path("p/a.py")])
    assert "lines [3], branches [(4, -1)]" in problem


def test_a_pure_module_nobody_imported_is_not_forgotten() -> None:
    (problem,) = check_coverage.shortfalls(report(95, 100), [Path("p/b.py")])
    assert "never imported" in problem
