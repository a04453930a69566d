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
