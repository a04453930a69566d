from __future__ import annotations

import pytest

from vllm_bootstrap.batches.retrying import (
    BACKOFF_MAX_S,
    LOOK_AGAIN_S,
    MAX_UNCOUNTED,
    SLOW_DOWN_S,
    Again,
    Facts,
    Final,
    SlowDown,
    WaitForKey,
    WaitForModel,
    backoff,
    decide,
)
from vllm_bootstrap.errors import (
    ApiError,
    BadRequest,
    Cancelled,
    ConcurrencyLimit,
    Draining,
    Forbidden,
    InternalError,
    LaunchNotReady,
    ModelLoading,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    QueueFull,
    RequestTimeout,
    StorageFailed,
    StorageFull,
    Unauthorized,
    Unavailable,
    UpstreamError,
    UpstreamTimeout,
)


def answered(status: int, attempts: int = 1, **more) -> Facts:
    return Facts(**{"attempts": attempts, "limit": 5, "chance": 0.5, "status": status, **more})


def refused(error: ApiError, attempts: int = 1, **more) -> Facts:
    return Facts(**{"attempts": attempts, "limit": 5, "chance": 0.5, "error": error, **more})


@pytest.mark.parametrize("attempts", [1, 99])
def test_1_a_line_whose_engine_died_goes_again_uncounted(attempts: int) -> None:
    for facts in (
        answered(500, attempts, died=True),
        refused(UpstreamError("x"), attempts, died=True),
        Facts(attempts, 5, 0.5, died=True),
    ):
        decision = decide(facts)
        assert isinstance(decision, Again)
        assert (decision.delay_s, decision.counts) == (0.0, False)


@pytest.mark.parametrize("status", [200, 201, 299])
def test_2_an_answer_is_final(status: int) -> None:
    assert decide(answered(status, attempts=9)) == Final("the engine answered")


def test_3_an_engine_without_room_is_asked_again_uncounted_up_to_a_bound() -> None:
    first = decide(answered(429, attempts=5))
    assert first == Again(0.25, counts=False, reason="the engine has no room (429)")
    assert decide(answered(429, uncounted=MAX_UNCOUNTED - 1)) == Again(30.0, counts=False, reason=first.reason)
    counted = decide(answered(429, uncounted=MAX_UNCOUNTED))
    assert isinstance(counted, Again)
    assert counted.counts
    last = decide(answered(429, attempts=5, uncounted=MAX_UNCOUNTED))
    assert last == Final("the engine has no room (429), 21 times in a row, in attempt 5 of 5")


@pytest.mark.parametrize("status", [408, 409, 425, 500, 502, 503, 504, 599])
def test_4_and_5_what_may_be_otherwise_is_tried_up_to_the_limit(status: int) -> None:
    decisions = [decide(answered(status, attempts)) for attempts in range(1, 6)]
    assert [d.delay_s for d in decisions if isinstance(d, Again) and d.counts] == [0.25, 0.5, 1.0, 2.0]
    assert decisions[-1] == Final(f"the engine answered {status}, in attempt 5 of 5")


@pytest.mark.parametrize("status", [100, 302, 400, 401, 403, 404, 413, 422, 501])
def test_6_what_would_be_the_same_again_is_final(status: int) -> None:
    assert decide(answered(status)) == Final(f"the engine answered {status}, and would do so again")


def test_7_what_somebody_cancelled_is_final() -> None:
    assert decide(refused(Cancelled("x"))) == Final("it was cancelled")


@pytest.mark.parametrize("error", [Unauthorized(), Forbidden("x")])
def test_8_a_refused_key_is_waited_for(error: ApiError) -> None:
    assert decide(refused(error, attempts=9)) == WaitForKey(f"the key that owns it is refused ({error.code})")


def test_9_our_own_limits_slow_the_lane_down() -> None:
    assert decide(refused(QueueFull("full", retry_after=7), attempts=9)) == SlowDown(7, "full")
    assert decide(refused(ConcurrencyLimit("many"))) == SlowDown(SLOW_DOWN_S, "many")


@pytest.mark.parametrize("error", [StorageFull("x"), StorageFailed("x", retry_after=1)])
def test_10_a_disk_without_room_slows_the_lane_down_most(error: ApiError) -> None:
    assert decide(refused(error)) == SlowDown(BACKOFF_MAX_S, "x")


@pytest.mark.parametrize("error", [ModelNotFound, LaunchNotReady, ModelLoading, Draining, Unavailable])
@pytest.mark.parametrize("sent", [False, True])
def test_11_a_model_that_is_not_there_is_waited_for(error: type[ApiError], sent: bool) -> None:
    assert decide(refused(error("gone"), attempts=9, sent=sent)) == WaitForModel(LOOK_AGAIN_S, "gone")
    assert decide(refused(error("gone", retry_after=9), sent=sent)) == WaitForModel(9, "gone")


@pytest.mark.parametrize("error", [UpstreamError("x"), UpstreamTimeout("x"), InternalError("x"), RequestTimeout("x")])
def test_12_and_13_only_what_the_engine_had_counts(error: ApiError) -> None:
    unsent = decide(refused(error, attempts=5, uncounted=1))
    assert unsent == Again(0.5, counts=False, reason=f"the engine was not reached ({error.code})")
    assert isinstance(decide(refused(error, attempts=5, uncounted=MAX_UNCOUNTED)), Final)
    sent = decide(refused(error, attempts=4, sent=True))
    why = f"the engine gave no whole answer ({error.code})"
    assert sent == Again(2.0, counts=True, reason=f"{why}, in attempt 4 of 5")
    assert decide(refused(error, attempts=5, sent=True)) == Final(f"{why}, in attempt 5 of 5")


@pytest.mark.parametrize("error", [BadRequest("x"), NotFound("x"), PayloadTooLarge("x")])
def test_14_what_we_refuse_is_refused_again(error: ApiError) -> None:
    assert decide(refused(error)) == Final(f"it was refused ({error.code}), and would be again")


def test_what_the_other_side_asks_for_is_waited_at_least() -> None:
    def delay(retry_after: float | None) -> float:
        decision = decide(answered(503, retry_after=retry_after))
        assert isinstance(decision, Again)
        return decision.delay_s

    assert [delay(asked) for asked in (None, -5.0, 0.1, 9.0, 9999.0)] == [0.25, 0.25, 0.25, 9.0, BACKOFF_MAX_S]


def test_delays_double_up_to_the_cap_and_are_drawn_from_the_whole() -> None:
    assert [backoff(tries, 1.0) for tries in range(9)] == [0.5, 0.5, 1, 2, 4, 8, 16, 32, 60]
    assert backoff(5000, 1.0) == BACKOFF_MAX_S
    assert backoff(7, 0.0) == 0.0
    assert backoff(7, 0.25) == 8.0


@pytest.mark.parametrize("more", [{}, {"status": 200, "error": BadRequest("x")}])
def test_facts_say_one_thing(more: dict) -> None:
    with pytest.raises(ValueError, match="either"):
        Facts(1, 5, 0.5, **more)
