"""The sum under the parts of a test run."""

from __future__ import annotations

import run_tests

WAITING = """....
===== FAILURES =====
1 failed in the text
FAILED a::b
1 failed, 20 passed, 3 deselected in 61.20s (0:01:01)
"""
COMPUTING = "....\n400 passed, 1 warning in 30.00s\n"


def test_the_last_line_counts_all() -> None:
    summed = run_tests.summed([WAITING, COMPUTING], 75.5)
    assert summed == "1 failed, 420 passed, 3 deselected, 1 warning in 75.50s (0:01:15)"


def test_a_part_that_said_nothing_counts_nothing() -> None:
    assert run_tests.summed(["killed", COMPUTING], 3) == "400 passed, 1 warning in 3.00s (0:00:03)"


def test_the_halves_of_a_folder_hold_each_test_file_once() -> None:
    for folder in run_tests.WAITING:
        first, second = run_tests.halves(run_tests.ROOT / folder)
        files = {str(path.relative_to(run_tests.ROOT)) for path in (run_tests.ROOT / folder).rglob("test_*.py")}
        assert {*first, *second} == files
        assert len(first) + len(second) == len(files)
        assert abs(len(first) - len(second)) <= 1
