"""Batch rests after prompts that make realtime late: each number by hand, on the module alone."""

import pytest

from vllm_bootstrap.scheduler.budget_pacing import LATE_SHARE, LONGEST_REST_S, MOST_OWED, RUN, Pacing

TOKENS, TOOK_S = 400, 0.1  # by the first guess
LATE_S = 0.05


def prompts(pacing: Pacing, count: int, *, late: bool = True, now: float = 0.0) -> float:
    """Batch prompts, each with one answer of a request that came with it; returns when the last of them began."""
    for request in range(count):
        now = max(now, pacing.until(now) or now)
        pacing.granted(request, TOKENS, now, beside=True)
        pacing.answered(now, LATE_S, late, now + LATE_S)
        pacing.answered(now + 2 * TOOK_S, 0.0, False, now + 2 * TOOK_S)  # what comes after it is in time
    return now


def test_what_makes_nobody_late_needs_no_rest():
    pacing = Pacing()
    now = prompts(pacing, 100, late=False)
    assert pacing.rest_s == 0
    assert pacing.until(now) == pytest.approx(now + TOOK_S)


def test_each_answer_that_a_prompt_made_late_doubles_the_time_until_the_next():
    pacing = Pacing()
    now = prompts(pacing, 3)
    assert pacing.until(now) == pytest.approx(now + 8 * TOOK_S, rel=0.02)
    assert pacing.rest_s == pytest.approx(7 * TOOK_S, rel=0.02)
    assert pacing.until(now, rest=False) == pytest.approx(now + TOOK_S)


def test_where_a_prompt_is_over_earlier_the_rest_begins_earlier():
    pacing = Pacing()
    now = prompts(pacing, 3)
    pacing.over(2, now + 0.02)
    assert pacing.until(now + 0.02) == pytest.approx(now + 0.02 + pacing.rest_s)
    pacing.over(2, now + 0.5)
    assert pacing.until(now + 0.02) == pytest.approx(now + 0.02 + pacing.rest_s), "it is over only once"


def test_other_answers_take_back_what_late_ones_added_where_as_few_are_late_as_may_be():
    pacing = Pacing()
    now = prompts(pacing, 3)
    before = pacing.rest_s
    for _ in range(10):
        pacing.granted(9, TOKENS, now, beside=True)
        pacing.answered(now, LATE_S, True, now + LATE_S)
        for _ in range(round(1 / LATE_SHARE)):
            pacing.answered(now, 0.0, False, now + TOOK_S)
    assert pacing.rest_s == pytest.approx(before, rel=0.05)
    for _ in range(3000):
        pacing.answered(now, 0.0, False, now + TOOK_S)
    assert pacing.rest_s == 0


def test_a_dozen_late_answers_at_once_double_it_once_and_are_evened_out_before_it_falls():
    pacing = Pacing()
    pacing.granted(1, TOKENS, 0.0, beside=True)
    for _ in range(5):
        pacing.answered(0.0, LATE_S, True, LATE_S)
    assert pacing.rest_s == pytest.approx(TOOK_S)
    for _ in range(round(4 / LATE_SHARE)):
        pacing.answered(1.0, 0.0, False, 1.0)
    assert pacing.rest_s == pytest.approx(TOOK_S, rel=0.05)
    for _ in range(round(1 / LATE_SHARE)):
        pacing.answered(1.0, 0.0, False, 1.0)
    assert pacing.rest_s == pytest.approx(0, abs=0.05 * TOOK_S)


def test_most_of_what_is_to_be_evened_out_is_bounded():
    pacing = Pacing()
    pacing.granted(1, TOKENS, 0.0, beside=True)
    for _ in range(1000):
        pacing.answered(0.0, LATE_S, True, LATE_S)
    for _ in range(round((MOST_OWED + 1) / LATE_SHARE) + 1):
        pacing.answered(1.0, 0.0, False, 1.0)
    assert pacing.rest_s == 0


def test_where_none_is_in_time_only_each_seventh_further_late_answer_doubles_it():
    pacing = Pacing()
    for request in range(RUN):
        assert pacing.rest_s == (TOOK_S if request else 0)
        pacing.granted(request, TOKENS, float(request), beside=True)
        pacing.answered(float(request), LATE_S, True, request + 2 * LATE_S)
    assert pacing.rest_s == pytest.approx(3 * TOOK_S)
    pacing.answered(9.0, 0.0, False, 9.0, batch=False)
    pacing.granted(9, TOKENS, 9.0, beside=True)
    pacing.answered(9.0, LATE_S, True, 9 + 2 * LATE_S)
    assert pacing.rest_s == pytest.approx(7 * TOOK_S)


def test_what_is_late_without_a_prompt_in_its_way_takes_back_what_others_added_by_chance():
    pacing = Pacing()
    now = prompts(pacing, 3)
    for request in range(4):
        pacing.granted(10 + request, TOKENS, now + request, beside=True)
        pacing.answered(now + request + 0.5, LATE_S, True, now + request + 0.6)
    assert pacing.rest_s == pytest.approx(3 * TOOK_S, rel=0.02), "four prompts, one doubling"


def test_it_takes_something_back_once_for_each_prompt_for_that_may_last_longer_than_is_known():
    pacing = Pacing()
    now = prompts(pacing, 3)
    for _ in range(8):
        pacing.answered(now + 1, LATE_S, True, now + 1 + LATE_S)
    assert pacing.rest_s == pytest.approx((2 ** (3 - 0.25) - 1) * TOOK_S, rel=0.05)


@pytest.mark.parametrize(
    ("sent_s", "late_s", "suspected"),
    [
        pytest.param(-0.02, 0.41, False, id="came before it and was late by then"),
        pytest.param(-0.02, 0.39, True, id="came before it and was not late yet"),
        pytest.param(0.09, 0.001, True, id="came while it is reckoned to be processed"),
        pytest.param(0.3, 0.08, True, id="came after that but was made late by so much that it may be the cause"),
        pytest.param(0.3, 0.07, False, id="came too long after it"),
    ],
)
def test_a_prompt_is_suspected_where_it_may_have_been_in_the_way(sent_s, late_s, suspected):
    pacing = Pacing()
    pacing.granted(1, TOKENS, 10.0, beside=True)
    pacing.answered(10 + sent_s, late_s, True, 10.4)
    assert (pacing.rest_s > 0) is suspected


def test_no_rest_is_longer_than_a_minute_and_none_outgrows_that():
    pacing = Pacing()
    now = prompts(pacing, 50)
    assert pacing.rest_s == pytest.approx(LONGEST_REST_S, rel=0.02)
    for _ in range(round(2 / LATE_SHARE)):
        pacing.answered(now, 0.0, False, now + 1)
    assert pacing.rest_s == pytest.approx(LONGEST_REST_S / 4, rel=0.05)


def test_without_batch_nothing_is_learnt():
    pacing = Pacing()
    now = prompts(pacing, 5)
    before = pacing.rest_s
    for _ in range(1000):
        pacing.answered(now, 0.0, False, now, batch=False)
    pacing.granted(9, TOKENS, now, beside=True)
    pacing.answered(now, LATE_S, True, now + LATE_S, batch=False)
    assert pacing.rest_s == before


def test_an_engine_that_was_never_timed_and_prompts_without_tokens_divide_by_nothing():
    pacing = Pacing()
    pacing.granted(1, 0, 0.0, beside=True)
    pacing.answered(0.0, LATE_S, True, LATE_S)
    assert pacing.rest_s == 0


def test_a_prompt_is_not_suspected_that_came_while_realtime_was_idle_nor_one_that_was_taken_back():
    pacing = Pacing()
    pacing.granted(1, TOKENS, 0.0, beside=False)
    pacing.answered(0.0, LATE_S, True, LATE_S)
    pacing.answered(0.1, 0.0, False, 0.1)
    pacing.granted(2, TOKENS, 0.2, beside=True)
    pacing.over(2, 0.21, worked=False)
    pacing.answered(0.2, LATE_S, True, 0.25)
    assert pacing.rest_s == 0
    pacing.answered(0.3, 0.0, False, 0.3)
    prompts(pacing, 3, now=1.0)
    assert pacing.rest_s > 0


def test_what_was_taken_back_is_not_rested_after():
    pacing = Pacing()
    now = prompts(pacing, 5) + 100
    pacing.granted(9, TOKENS, now, beside=True)
    assert pacing.until(now) > now + TOOK_S
    pacing.over(9, now, worked=False)
    assert pacing.until(now) is None


def test_a_prompt_that_would_rest_for_less_takes_nothing_back():
    pacing = Pacing()
    for request in range(20):
        pacing.granted(request, 4, request, beside=True)
        pacing.answered(request, LATE_S, True, request + LATE_S)
        pacing.answered(request + 0.1, 0.0, False, request + 0.1)
    pacing.granted(20, 20_000, 20.0, beside=True)
    pacing.answered(20.0, LATE_S, True, 20 + LATE_S)
    pacing.answered(20.1, 0.0, False, 20.1)
    pacing.granted(21, 4, 30.0, beside=True)
    assert pacing.rest_s > 30


def test_after_ten_minutes_without_a_first_byte_of_realtime_it_is_forgotten():
    pacing = Pacing()
    now = prompts(pacing, 5)
    pacing.granted(8, TOKENS, now, beside=True)
    pacing.answered(now, LATE_S, True, now + 2 * LATE_S)
    pacing.granted(9, TOKENS, now + 590, beside=True)
    assert pacing.rest_s > TOOK_S
    pacing.granted(10, TOKENS, now + 610, beside=True)
    assert pacing.rest_s == 0
    pacing.answered(now + 610, LATE_S, True, now + 610.1)
    assert pacing.rest_s == pytest.approx(TOOK_S), "also how many were late before"
