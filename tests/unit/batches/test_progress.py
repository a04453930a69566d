from __future__ import annotations

import pytest

from vllm_bootstrap.batches.progress import LOOK_BACK_S, SPACING_S, Pace, percent


def steady(lines_per_s: float, seconds: int, start: float = 1000.0) -> Pace:
    pace = Pace()
    for second in range(seconds + 1):
        pace.note(start + second, int(second * lines_per_s))
    return pace


def test_there_is_no_rate_before_there_is_something_to_say() -> None:
    pace = Pace()
    assert pace.rate(5.0) is None
    pace.note(5.0, 0)
    pace.note(6.0, 500)
    assert pace.rate(6.0) is None
    assert pace.eta_s(6.0, 10) is None
    assert pace.rate(7.0) == 250.0


def test_a_steady_pace_is_told_as_it_is() -> None:
    pace = steady(20, 300)
    assert pace.rate(1300.0) == pytest.approx(20)
    assert pace.eta_s(1300.0, 1000) == pytest.approx(50)


def test_the_last_minute_counts_when_the_pace_changes() -> None:
    pace = steady(100, 300)
    for second in range(301, 371):
        pace.note(1000.0 + second, 30_000 + 10 * (second - 300))
    assert pace.rate(1370.0) == pytest.approx(10, rel=0.1)


def test_slow_lines_have_a_rate_as_well() -> None:
    pace = Pace()
    for minute in range(10):
        pace.note(60.0 * minute, minute // 2)
    assert pace.rate(540.0) == pytest.approx(4 / 540)
    assert pace.eta_s(540.0, 4) == pytest.approx(540)


def test_when_nothing_is_finished_any_more_the_rate_sinks() -> None:
    pace = steady(10, 60)
    assert pace.rate(1090.0) == pytest.approx(5)
    assert pace.rate(1660.0) == pytest.approx(50 / 605)


def test_nothing_finished_at_all_is_a_rate_of_nought_and_no_end() -> None:
    pace = Pace()
    pace.note(0.0, 0)
    assert pace.rate(30.0) == 0.0
    assert pace.eta_s(30.0, 5) is None


def test_what_stands_still_has_no_end_and_what_is_done_is_at_it() -> None:
    pace = steady(10, 60)
    assert pace.eta_s(1060.0, 5, running=False) is None
    assert pace.eta_s(1060.0, 0, running=False) == 0.0


def test_a_pause_does_not_count() -> None:
    pace = steady(10, 60)
    pace.restart(2000.0)
    assert pace.rate(2001.0) is None
    pace.note(2010.0, 700)
    assert pace.rate(2010.0) == pytest.approx(10)


def test_failed_lines_that_are_run_again_are_a_new_beginning() -> None:
    pace = steady(10, 60)
    pace.note(1070.0, 400)
    assert pace.rate(1071.0) is None
    pace.note(1080.0, 430)
    assert pace.rate(1080.0) == pytest.approx(3)


def test_memory_is_bounded_by_the_time_that_is_looked_back() -> None:
    pace = Pace()
    for tick in range(20_000):
        pace.note(tick / 4, tick)
    assert len(pace._kept) <= LOOK_BACK_S / SPACING_S + 3
    assert pace.rate(20_000 / 4) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    ("finished", "total", "shown"),
    [(0, 0, 100.0), (0, 7, 0.0), (1, 3, 33.3), (999_999, 1_000_000, 99.9), (7, 7, 100.0), (8, 7, 100.0)],
)
def test_percent_is_whole_only_at_the_end(finished: int, total: int, shown: float) -> None:
    assert percent(finished, total) == shown
