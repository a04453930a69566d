from __future__ import annotations

from typing import Any

import pytest

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import BadRequest, ConcurrencyLimit, TooManyRequests
from vllm_bootstrap.scheduler.limits import MANY_ACCOUNTS, Charge, KeyLimits, RateState, Share
from vllm_bootstrap.scheduler.tickets import Ticket

FREE = Principal("free", frozenset({"realtime"}))
PARALLEL = Principal("parallel", frozenset({"realtime"}), max_parallel=2)
RATED = Principal("rated", frozenset({"realtime"}), requests_per_minute=3)
TOKENS = Principal("tokens", frozenset({"realtime"}), tokens_per_minute=100)
BULK = Principal("bulk", frozenset({"batch"}), max_enqueued_tokens=100)
TICKET = Ticket("somebody")


def ticket(tokens: int, cls: str = "realtime") -> Ticket:
    return Ticket("somebody", "batch" if cls == "batch" else "realtime", 1, tokens // 2, None, tokens - tokens // 2)


def accept(limits: KeyLimits, principal: Principal, now: float, of: Ticket = TICKET) -> Charge | None:
    limits.check(principal, of, now)
    return limits.enter(principal, of, now)


def leave(limits: KeyLimits, principal: Principal, charge: Charge | None = None, *, worked: bool = True) -> None:
    limits.leave(principal.name, charge, 0.0, worked=worked)


def remaining(limits: KeyLimits, principal: Principal, now: float) -> int:
    state = limits.rate(principal, now)
    assert state is not None
    share = state.tokens or state.requests
    assert share is not None
    return share.remaining


def test_a_key_without_limits_is_never_refused() -> None:
    limits = KeyLimits()
    for _ in range(1000):
        accept(limits, FREE, 0.0)
    assert limits.parallel("free") == 1000
    assert limits.rate(FREE, 0.0) is None


def test_keys_that_come_and_go_leave_nothing_behind() -> None:
    limits = KeyLimits()
    accept(limits, PARALLEL, 0.0)
    accept(limits, RATED, 0.0)
    for number in range(10 * MANY_ACCOUNTS):
        one = Principal(f"job-{number}", frozenset({"realtime"}), requests_per_minute=1, tokens_per_minute=10)
        leave(limits, one, accept(limits, one, float(number)))
    assert len(limits._accounts) <= MANY_ACCOUNTS
    assert limits.parallel("parallel") == 1
    last = 10.0 * MANY_ACCOUNTS
    for number in range(2 * MANY_ACCOUNTS):
        limits.rate(Principal(f"later-{number}", frozenset({"realtime"}), requests_per_minute=1), last + 61)
    accept(limits, RATED, last + 62)
    assert remaining(limits, RATED, last + 62) == 2
    assert limits.parallel("parallel") == 1


def test_parallel_requests_are_counted_until_they_end() -> None:
    limits = KeyLimits()
    accept(limits, PARALLEL, 0.0)
    accept(limits, PARALLEL, 0.0)
    with pytest.raises(ConcurrencyLimit) as refused:
        limits.check(PARALLEL, TICKET, 0.0)
    assert refused.value.retry_after == 1
    leave(limits, PARALLEL)
    accept(limits, PARALLEL, 0.0)
    leave(limits, PARALLEL)
    leave(limits, PARALLEL)
    assert limits.parallel("parallel") == 0


def test_requests_of_any_sixty_seconds_are_limited_exactly() -> None:
    limits = KeyLimits()
    for now in (0.0, 10.0, 20.0):
        accept(limits, RATED, now)
    with pytest.raises(TooManyRequests) as refused:
        limits.check(RATED, TICKET, 45.5)
    assert refused.value.retry_after == 15  # the first place is free again at 60
    accept(limits, RATED, 60.0)
    with pytest.raises(TooManyRequests):
        limits.check(RATED, TICKET, 69.9)
    accept(limits, RATED, 70.0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_parallel": 1}, "Limit of this key: 1 request at once, and as many are queued or running"),
        ({"requests_per_minute": 1}, "Limit of this key: 1 request a minute, and as many came"),
        ({"max_parallel": 2, "requests_per_minute": 1}, "1 request a minute"),
    ],
)
def test_a_refusal_says_which_limit_it_was(fields: dict[str, Any], said: str) -> None:
    limits, narrow = KeyLimits(), Principal("narrow", frozenset({"realtime"}), **fields)
    accept(limits, narrow, 0.0)
    with pytest.raises(TooManyRequests) as refused:
        limits.check(narrow, TICKET, 1.0)
    assert said in refused.value.message


def test_a_refusal_costs_nothing() -> None:
    limits = KeyLimits()
    for _ in range(3):
        accept(limits, RATED, 0.0)
    for _ in range(100):
        with pytest.raises(TooManyRequests):
            limits.check(RATED, TICKET, 30.0)
    accept(limits, RATED, 60.0)


def test_what_is_left_is_told() -> None:
    limits = KeyLimits()
    assert limits.rate(RATED, 0.0) == RateState(Share(3, 3, 0.0), None)
    accept(limits, RATED, 0.0)
    state = limits.rate(RATED, 10.5)
    assert state == RateState(Share(3, 2, 49.5), None)
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
        limits.check(lowered, TICKET, 3.0)
    assert refused.value.retry_after == 59
    assert remaining(limits, lowered, 3.0) == 0


def test_a_limit_of_nothing_refuses_everything() -> None:
    limits = KeyLimits()
    with pytest.raises(TooManyRequests) as refused:
        limits.check(Principal("none", frozenset(), requests_per_minute=0), TICKET, 0.0)
    assert refused.value.retry_after == 60


def test_tokens_of_any_sixty_seconds_are_limited_exactly() -> None:
    limits = KeyLimits()
    accept(limits, TOKENS, 0.0, ticket(60))
    accept(limits, TOKENS, 10.0, ticket(40))
    with pytest.raises(TooManyRequests) as refused:
        limits.check(TOKENS, ticket(1), 20.5)
    assert refused.value.retry_after == 40  # at 60 s the first 60 tokens are free again
    assert "100 tokens a minute" in refused.value.message
    with pytest.raises(TooManyRequests) as refused:
        limits.check(TOKENS, ticket(61), 20.5)
    assert refused.value.retry_after == 50
    accept(limits, TOKENS, 60.0, ticket(60))
    with pytest.raises(TooManyRequests):
        limits.check(TOKENS, ticket(1), 69.9)
    accept(limits, TOKENS, 70.0, ticket(40))


def test_a_request_larger_than_the_limit_can_never_run_and_is_told_so() -> None:
    for principal, cls in ((TOKENS, "realtime"), (BULK, "batch")):
        with pytest.raises(BadRequest, match="can never run") as refused:
            KeyLimits().check(principal, ticket(101, cls), 0.0)
        assert refused.value.retry_after is None


def test_what_was_reserved_too_much_is_given_back() -> None:
    limits = KeyLimits()
    charge = accept(limits, TOKENS, 0.0, ticket(80))
    assert charge is not None
    limits.settle(charge, 30, 5.0)
    assert remaining(limits, TOKENS, 5.0) == 70
    leave(limits, TOKENS, charge)
    assert remaining(limits, TOKENS, 59.9) == 70
    assert remaining(limits, TOKENS, 60.0) == 100


def test_what_was_used_beyond_the_estimate_counts_from_when_it_is_known() -> None:
    limits = KeyLimits()
    charge = accept(limits, TOKENS, 0.0, ticket(50))
    assert charge is not None
    limits.settle(charge, 90, 30.0)
    limits.settle(charge, 90, 31.0)
    assert remaining(limits, TOKENS, 31.0) == 10
    assert remaining(limits, TOKENS, 60.0) == 60
    assert remaining(limits, TOKENS, 90.0) == 100


def test_a_settlement_after_the_minute_gives_nothing_back_twice() -> None:
    limits = KeyLimits()
    charge = accept(limits, TOKENS, 0.0, ticket(50))
    assert charge is not None
    limits.settle(charge, 20, 100.0)
    assert remaining(limits, TOKENS, 100.0) == 100
    limits.settle(charge, 60, 100.0)
    assert remaining(limits, TOKENS, 100.0) == 90


def test_what_no_engine_worked_on_costs_no_tokens() -> None:
    limits = KeyLimits()
    charge = accept(limits, TOKENS, 0.0, ticket(50))
    leave(limits, TOKENS, charge, worked=False)
    assert remaining(limits, TOKENS, 0.0) == 100


def test_enqueued_tokens_count_until_the_request_ends_and_for_batch_only() -> None:
    limits = KeyLimits()
    assert accept(limits, BULK, 0.0, ticket(1000)) is None
    first = accept(limits, BULK, 0.0, ticket(60, "batch"))
    second = accept(limits, BULK, 100.0, ticket(40, "batch"))
    assert first is not None
    limits.settle(first, 5, 100.0)
    assert limits.enqueued("bulk") == 100
    with pytest.raises(TooManyRequests, match="100 are under way") as refused:
        limits.check(BULK, ticket(1, "batch"), 1000.0)
    assert refused.value.retry_after == 5
    leave(limits, BULK, first)
    accept(limits, BULK, 1000.0, ticket(60, "batch"))
    leave(limits, BULK, second)
    assert limits.enqueued("bulk") == 60


def test_both_limits_are_told_in_six_headers() -> None:
    both = Principal("both", frozenset(), requests_per_minute=5, tokens_per_minute=100)
    limits = KeyLimits()
    accept(limits, both, 0.0, ticket(30))
    state = limits.rate(both, 10.0)
    assert state is not None
    assert dict(state.headers()) == {
        b"x-ratelimit-limit-requests": b"5",
        b"x-ratelimit-remaining-requests": b"4",
        b"x-ratelimit-reset-requests": b"50s",
        b"x-ratelimit-limit-tokens": b"100",
        b"x-ratelimit-remaining-tokens": b"70",
        b"x-ratelimit-reset-tokens": b"50s",
    }


def test_the_token_limit_alone_is_told_in_three() -> None:
    state = KeyLimits().rate(TOKENS, 0.0)
    assert state is not None
    assert [name for name, _ in state.headers()] == [
        b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens",
    ]  # fmt: skip


@pytest.mark.parametrize("requests", [None, 2, 7])
@pytest.mark.parametrize("tokens", [None, 30, 900])
def test_headers_say_the_same_as_lines_of_a_head(requests: int | None, tokens: int | None) -> None:
    principal = Principal("p", frozenset(), requests_per_minute=requests, tokens_per_minute=tokens)
    limits = KeyLimits()
    limits.check(principal, ticket(0), 0.0)
    for now in (0.0, 10.5, 30.2, 59.9, 60.0, 60.1, 100.0):
        state = limits.rate(principal, now)
        told = () if state is None else state.headers()
        assert limits.lines(principal, now) == b"".join(b"%b: %b\r\n" % header for header in told)
        if now < 30:
            limits.enter(principal, ticket(29), now)
            if charge := limits.enter(principal, ticket(1), now):
                limits.settle(charge, 2, now)  # beyond both limits, where they are small: nothing below 0 is told
