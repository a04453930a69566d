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


BROKEN = """=========================== short test summary info ============================
FAILED tests/a/test_b.py::test_c - AssertionError: assert 7 >= 8
FAILED tests/a/test_b.py::test_d[x y - z] - KeyError: ' in '
ERROR tests/a/test_b.py::TestE::test_f
2 failed, 20 passed, 1 error in 61.20s (0:01:01)
"""


def test_failures_are_known_by_name() -> None:
    names = [f"tests/a/test_b.py::{name}" for name in ("test_c", "test_d[x y - z]", "TestE::test_f")]
    assert run_tests.failures(BROKEN) == names
    assert run_tests.worth_again([1, 0], [BROKEN, COMPUTING]) == names


def test_only_failures_that_are_all_known_get_a_second_chance() -> None:
    assert run_tests.worth_again([0], [COMPUTING]) == []
    assert run_tests.worth_again([1], [WAITING]) == []  # one failed that nothing names
    assert run_tests.worth_again([1, 1], [BROKEN, COMPUTING]) == []  # something else went wrong in the other part
    assert run_tests.worth_again([1, -9], [BROKEN, "killed"]) == []
    assert run_tests.worth_again([1, 3], [BROKEN, COMPUTING]) == []


def test_of_what_ran_twice_the_second_run_counts() -> None:
    outputs = [run_tests.without_failures(BROKEN), COMPUTING, "1 failed, 2 passed in 3.00s"]
    assert run_tests.summed(outputs, 100) == "1 failed, 422 passed, 1 warning in 100.00s (0:01:40)"
