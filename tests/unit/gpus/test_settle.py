from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_bootstrap.gpus.settle import GIB, Settlement, Verdict, baseline, is_settled, judge, residue

TOTAL = 80 * GIB
TOLERANCE = GIB // 2


def at(used: int | None, elapsed_s: float = 1, *, before: int = 0, others_milli: int = 0) -> Settlement:
    return judge(
        before,
        used,
        tolerance_bytes=TOLERANCE,
        elapsed_s=elapsed_s,
        timeout_s=60,
        others_milli=others_milli,
        total_bytes=TOTAL,
    )


def test_memory_back_near_the_baseline_is_settled_at_any_time() -> None:
    for elapsed in (0, 59, 60, 1000):
        assert at(3 * GIB + TOLERANCE, elapsed, before=3 * GIB) == Settlement(Verdict.SETTLED)


def test_memory_below_the_baseline_is_settled() -> None:
    assert at(0, before=3 * GIB).verdict is Verdict.SETTLED


def test_it_is_waited_for_until_the_time_is_over() -> None:
    assert at(10 * GIB, 59.9) == Settlement(Verdict.WAITING, "10.0 GiB more in use than before the start")
    assert at(10 * GIB, 60) == Settlement(
        Verdict.UNSETTLED, "10.0 GiB more in use than before the start, 60 s after its processes were gone"
    )


def test_what_cannot_be_read_proves_nothing() -> None:
    assert at(None, 1) == Settlement(Verdict.WAITING, "its memory cannot be read")
    assert at(None, 60).verdict is Verdict.UNSETTLED


def test_a_neighbour_may_use_its_share_and_no_more() -> None:
    assert at(40 * GIB, others_milli=500).verdict is Verdict.SETTLED
    assert at(41 * GIB, others_milli=500) == Settlement(Verdict.WAITING, "1.0 GiB more in use than before the start")
    assert at(40 * GIB, others_milli=0).verdict is Verdict.WAITING


def test_the_baseline_does_not_count_what_neighbours_may_use() -> None:
    assert baseline(30 * GIB) == 30 * GIB
    assert baseline(39 * GIB, others_milli=500, total_bytes=TOTAL) == 0
    assert baseline(43 * GIB, others_milli=500, total_bytes=TOTAL) == 3 * GIB


def test_a_neighbour_that_ended_meanwhile_does_not_excuse_what_is_left() -> None:
    # Started beside a neighbour that used 38 GiB; the neighbour is gone, 30 GiB are still there.
    before = baseline(38 * GIB, others_milli=500, total_bytes=TOTAL)
    assert at(30 * GIB, before=before).verdict is Verdict.WAITING


@given(st.integers(0, TOTAL), st.integers(0, TOTAL), st.integers(0, 1000), st.floats(0, 200))
def test_a_settled_gpu_has_room_for_what_is_not_claimed(
    before: int, used: int, others_milli: int, elapsed: float
) -> None:
    verdict = at(used, elapsed, before=before, others_milli=others_milli).verdict
    others = TOTAL * others_milli // 1000
    if verdict is Verdict.SETTLED:
        assert TOTAL - used >= TOTAL - others - before - TOLERANCE
    else:
        assert used > before + others
        assert (verdict is Verdict.UNSETTLED) == (elapsed >= 60)


@pytest.mark.parametrize(("used", "expected"), [(None, False), (100, True), (111, False), (110, True)])
def test_is_settled(used: int | None, expected: bool) -> None:
    assert is_settled(100, used, 10) is expected


def test_one_that_sleeps_there_counts_with_what_it_uses() -> None:
    assert baseline(5 * GIB, residue_bytes=2 * GIB) == 3 * GIB
    assert is_settled(3 * GIB, 5 * GIB, 0, residue_bytes=2 * GIB)
    assert not is_settled(3 * GIB, 5 * GIB, 0)  # it ended meanwhile: what is left is ours
    found = judge(3 * GIB, 6 * GIB, tolerance_bytes=0, elapsed_s=1, timeout_s=60, residue_bytes=2 * GIB)
    assert found == Settlement(Verdict.WAITING, "1.0 GiB more in use than before the start")


def test_the_residue_is_what_is_neither_there_before_nor_a_neighbours() -> None:
    assert residue(GIB, 3 * GIB) == 2 * GIB
    assert residue(GIB, 43 * GIB, others_milli=500, total_bytes=TOTAL) == 2 * GIB
    assert residue(3 * GIB, GIB) == 0
