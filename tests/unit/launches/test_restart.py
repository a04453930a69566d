from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_bootstrap.launches.restart import (
    RestartFacts,
    RestartLimits,
    backoff,
    decide,
    failures_in_a_row,
    relaunch_after_reboot,
)

LIMITS = RestartLimits(max_attempts=5, backoff_s=2, backoff_max_s=30, reset_s=600)


def facts(policy: str = "on-failure", row: int = 1, *, permanent: bool = False) -> RestartFacts:
    return RestartFacts(policy, row, permanent)


def test_never_means_never() -> None:
    decision = decide(facts("never"), LIMITS)
    assert not decision.restart
    assert decision.delay_s == 0
    assert decision.reason == "the restart policy is never"


def test_a_permanent_failure_is_not_tried_again() -> None:
    decision = decide(facts(permanent=True), LIMITS)
    assert not decision.restart
    assert "permanent" in decision.reason


def test_delays_double_up_to_the_cap_and_then_attempts_end() -> None:
    limits = RestartLimits(max_attempts=7, backoff_s=2, backoff_max_s=30, reset_s=600)
    decisions = [decide(facts(row=row), limits) for row in range(1, 8)]
    assert [d.delay_s for d in decisions] == [2, 4, 8, 16, 30, 30, 0]
    assert [d.restart for d in decisions] == [True] * 6 + [False]
    assert decisions[0].reason == "failure 1 in a row, next start in 2 s"
    assert decisions[-1].reason == "7 starts in a row have failed, 7 are allowed"


def test_one_allowed_attempt_means_no_restart() -> None:
    assert not decide(facts(row=1), RestartLimits(1, 2, 30, 600)).restart


@pytest.mark.parametrize(
    ("healthy_s", "row"),
    [
        ([], 0),
        ([0.0], 1),
        ([0.0, 3.0, 599.9], 3),
        ([0.0, 0.0, 600.0], 1),  # ran long: its end is the first failure of a new row
        ([0.0, 600.0, 0.0], 2),
        ([9000.0, 0.0, 0.0], 3),
    ],
)
def test_a_long_healthy_run_clears_the_row(healthy_s: list[float], row: int) -> None:
    assert failures_in_a_row(healthy_s, reset_s=600) == row


@given(st.integers(-3, 10**6), st.floats(0.001, 1e6), st.floats(0.001, 1e6))
def test_backoff_is_bounded_and_never_shrinks(failures: int, first: float, cap: float) -> None:
    limits = RestartLimits(5, first, cap, 600)
    assert 0 < backoff(failures, limits) <= cap
    assert backoff(failures, limits) <= backoff(failures + 1, limits)


@given(st.sampled_from(["never", "on-failure"]), st.integers(0, 50), st.booleans(), st.integers(1, 20))
def test_every_input_has_one_outcome_with_a_reason(policy: str, row: int, permanent: bool, allowed: int) -> None:
    decision = decide(RestartFacts(policy, row, permanent), RestartLimits(allowed, 2, 300, 600))
    assert decision.restart == (policy != "never" and not permanent and row < allowed)
    assert (decision.delay_s > 0) == decision.restart
    assert decision.reason


def test_a_reboot_relaunches_whatever_may_be_restarted() -> None:
    assert relaunch_after_reboot("on-failure")
    assert not relaunch_after_reboot("never")
