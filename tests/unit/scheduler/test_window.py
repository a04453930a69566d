from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_bootstrap.scheduler.window import WINDOW_S, Moments, Window


def test_amounts_leave_after_a_minute() -> None:
    window = Window()
    window.add(3, 0.0)
    window.add(4, 10.0)
    assert window.total(59.9) == 7
    assert window.total(60.0) == 4
    assert window.total(70.0) == 0
    assert window.empty_in(70.0) == 0.0


def test_when_there_will_be_less() -> None:
    window = Window()
    window.add(3, 0.0)
    window.add(4, 10.0)
    assert window.less_in(3, 20.0) == 40.0
    assert window.less_in(4, 20.0) == 50.0
    assert window.less_in(8, 20.0) == WINDOW_S
    assert window.empty_in(20.0) == 50.0


def test_a_correction_of_what_is_gone_changes_nothing() -> None:
    window = Window()
    entry = window.add(5, 0.0)
    window.correct(entry, 2, 10.0)
    assert window.total(10.0) == 2
    window.correct(entry, 9, 60.0)
    assert window.total(60.0) == 0


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 9), st.none() | st.integers(0, 9)), max_size=30))
def test_the_total_is_that_of_the_last_minute(steps: list[tuple[float, int, int | None]]) -> None:
    window, now = Window(), 0.0
    all_of_it: list[list[float]] = []
    entries = []
    for passed, amount, correction in steps:
        now += passed
        entries.append(window.add(amount, now))
        all_of_it.append([now, amount])
        if correction is not None:
            window.correct(entries[0], correction, now)
            all_of_it[0][1] = correction
        assert window.total(now) == sum(amount for at, amount in all_of_it if at > now - WINDOW_S)


def test_moments_leave_after_a_minute() -> None:
    moments = Moments()
    assert moments.empty_in(0.0) == 0.0
    moments.add(0.0)
    moments.add(10.0)
    assert moments.total(59.9) == 2
    assert (moments.less_in(1, 20.0), moments.less_in(2, 20.0), moments.less_in(3, 20.0)) == (40.0, 50.0, WINDOW_S)
    assert moments.empty_in(20.0) == 50.0
    assert moments.total(60.0) == 1
    assert moments.empty_in(70.0) == 0.0
    assert moments.total(70.0) == 0


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), max_size=30))
def test_moments_are_a_window_of_ones(steps: list[tuple[float, int]]) -> None:
    moments, window, now = Moments(), Window(), 0.0
    for passed, amount in steps:
        now += passed
        moments.add(now)
        window.add(1, now)
        assert moments.total(now) == window.total(now)
        assert moments.empty_in(now) == window.empty_in(now) == WINDOW_S
        assert moments.less_in(amount, now) == window.less_in(amount, now)
