from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_bootstrap.pulse import until_pulse


@pytest.mark.parametrize(("period", "now", "left"), [(1, 7.25, 0.75), (1, 7.0, 1.0), (1, 7.75, 1.25), (5, 12.0, 3.0)])
def test_the_next_pulse(period: float, now: float, left: float) -> None:
    assert until_pulse(period, now) == left


def test_who_wakes_a_moment_early_waits_for_the_pulse_after() -> None:
    assert until_pulse(2.0, 3.9995) == pytest.approx(2.0005)


@given(st.integers(1, 100), st.integers(1, 10), st.floats(0, 1e6))
def test_pulses_are_half_to_one_and_a_half_periods_away_and_fall_on_those_of_the_shorter_period(
    short: int, times: int, now: float
) -> None:
    left = until_pulse(short * times, now)
    assert short * times / 2 < left <= 1.5 * short * times
    off = (now + left) % short
    assert min(off, short - off) < 1e-6
