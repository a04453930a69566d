from __future__ import annotations

import pytest

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ConcurrencyLimit, TooManyRequests
from vllm_bootstrap.scheduler.limits import KeyLimits, RateState

FREE = Principal("free", frozenset({"realtime"}))
PARALLEL = Principal("parallel", frozenset({"realtime"}), max_parallel=2)
RATED = Principal("rated", frozenset({"realtime"}), requests_per_minute=3)


def accept(limits: KeyLimits, principal: Principal, now: float) -> None:
    limits.check(principal, now)
    limits.enter(principal, now)


def test_a_key_without_limits_is_never_refused() -> None:
    limits = KeyLimits()
    for _ in range(1000):
        accept(limits, FREE, 0.0)
    assert limits.parallel("free") == 1000
    assert limits.rate(FREE, 0.0) is None


def test_parallel_requests_are_counted_until_they_end() -> None:
    limits = KeyLimits()
    accept(limits, PARALLEL, 0.0)
    accept(limits, PARALLEL, 0.0)
    with pytest.raises(ConcurrencyLimit) as refused:
        limits.check(PARALLEL, 0.0)
    assert refused.value.retry_after == 1
    limits.leave("parallel")
    accept(limits, PARALLEL, 0.0)
    limits.leave("parallel")
    limits.leave("parallel")
    assert limits.parallel("parallel") == 0


def test_requests_of_any_sixty_seconds_are_limited_exactly() -> None:
    limits = KeyLimits()
    for now in (0.0, 10.0, 20.0):
        accept(limits, RATED, now)
    with pytest.raises(TooManyRequests) as refused:
        limits.check(RATED, 45.5)
    assert refused.value.retry_after == 15  # the first place is free again at 60
    accept(limits, RATED, 60.0)
    with pytest.raises(TooManyRequests):
        limits.check(RATED, 69.9)
    accept(limits, RATED, 70.0)


def test_a_refusal_costs_nothing() -> None:
    limits = KeyLimits()
    for _ in range(3):
        accept(limits, RATED, 0.0)
    for _ in range(100):
        with pytest.raises(TooManyRequests):
            limits.check(RATED, 30.0)
    accept(limits, RATED, 60.0)


def test_what_is_left_is_told() -> None:
    limits = KeyLimits()
    assert limits.rate(RATED, 0.0) == RateState(3, 3, 0.0)
    accept(limits, RATED, 0.0)
    state = limits.rate(RATED, 10.5)
    assert state == RateState(3, 2, 49.5)
    assert dict(state.headers()) == {
        b"x-ratelimit-limit-requests": b"3",
        b"x-ratelimit-remaining-requests": b"2",
        b"x-ratelimit-reset-requests": b"50s",
    }


def test_a_limit_that_was_lowered_holds_at_once() -> None:
    limits = KeyLimits()
    for now in (0.0, 1.0, 2.0):
        accept(limits, RATED, now)
    lowered = Principal("rated", frozenset({"realtime"}), requests_per_minute=1)
    with pytest.raises(TooManyRequests) as refused:
        limits.check(lowered, 3.0)
    assert refused.value.retry_after == 59
    state = limits.rate(lowered, 3.0)
    assert state is not None
    assert state.remaining == 0


def test_a_limit_of_nothing_refuses_everything() -> None:
    limits = KeyLimits()
    with pytest.raises(TooManyRequests) as refused:
        limits.check(Principal("none", frozenset(), requests_per_minute=0), 0.0)
    assert refused.value.retry_after == 60
