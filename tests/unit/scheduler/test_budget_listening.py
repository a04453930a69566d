import math

import pytest

from vllm_bootstrap.scheduler.budget_baseline import CONFIRM_S, GOOD_SAMPLES, MIN_SAMPLES, Baseline
from vllm_bootstrap.scheduler.budget_listening import (
    DRAIN_S,
    LISTEN_ANEW_S,
    LISTEN_EVERY_S,
    LISTEN_S,
    PATIENCE_S,
    REST,
    Listening,
)

SLOTS, PACE = 128, math.log(0.1)


def known(now: float = 0.0) -> tuple[Listening, Baseline]:
    """One that has listened twice."""
    baseline = Baseline()
    listening = Listening(baseline)
    listening.arrived(PACE, 0, now)
    for at in (now, now + CONFIRM_S):
        for _ in range(GOOD_SAMPLES):
            listening.began(at)
            baseline.hear(0.01, at)
            listening.heard(PACE)
    return listening, baseline


def test_it_listens_to_realtime_that_it_does_not_know_until_there_are_enough_answers():
    baseline = Baseline()
    listening = Listening(baseline)
    assert not listening.wants_silence(0)
    listening.arrived(None, 0, 0)
    assert listening.wants_silence(LISTEN_S - 0.1)
    assert not listening.wants_silence(LISTEN_S)
    for _ in range(GOOD_SAMPLES):
        baseline.hear(0.01, 1)
    assert not listening.wants_silence(1)


def test_batch_that_runs_has_to_end_first():
    listening = Listening(Baseline())
    listening.arrived(None, 3, 0)
    assert listening.wants_silence(PATIENCE_S - 1)
    listening.ran_out(20)
    assert listening.until == 20 + 20 / 2, "what took long to get is used for long"
    assert not listening.wants_silence(30)
    listening.ran_out(25)
    assert listening.until == 30, "it was silent before"


def test_batch_that_runs_out_soon_leaves_the_usual_time():
    listening = Listening(Baseline())
    listening.arrived(None, 3, 0)
    listening.ran_out(2)
    assert listening.until == 2 + LISTEN_S


@pytest.mark.parametrize(("slots", "few"), [(128, 4), (256, 8), (16, 1)])
def test_after_a_while_few_count_as_none(slots, few):
    listening = Listening(Baseline())
    listening.arrived(None, 50, 0)
    assert not listening.alone(few, slots, DRAIN_S - 1)
    assert not listening.alone(few + 1, slots, DRAIN_S)
    assert listening.alone(few, slots, DRAIN_S)
    assert listening.until == DRAIN_S * 1.5
    assert listening.alone(few, slots, DRAIN_S * 1.5 - 0.1)
    assert not listening.alone(few, slots, DRAIN_S * 1.5)
    assert listening.alone(0, slots, 1000)


def test_few_do_not_count_as_none_where_one_is_much():
    listening = Listening(Baseline())
    listening.arrived(None, 1, 0)
    assert not listening.alone(1, 15, PATIENCE_S - 1)


def test_few_count_as_none_no_longer_than_it_listens():
    listening, baseline = known()
    listening.arrived(PACE + 1, 50, 100)
    assert listening.alone(3, SLOTS, 100 + DRAIN_S)
    for _ in range(GOOD_SAMPLES):
        baseline.hear(0.01, 131)
    assert not listening.alone(3, SLOTS, 131)


def test_batch_that_filled_the_engine_again_has_not_run_out():
    listening, _ = known()
    listening.arrived(PACE + 1, 50, 100)
    listening.began(100)
    listening.idle(110)
    assert not listening.wants_silence(110)
    listening.arrived(PACE + 1, 50, 110 + REST * 10 - 0.1)
    assert not listening.wants_silence(110 + REST * 10 - 0.1)
    listening.arrived(PACE + 1, 50, 160)
    assert listening.until == 160 + PATIENCE_S
    listening.ran_out(161)
    until = listening.until
    listening.idle(161)
    assert listening.until == until, "it is silent"


def test_a_pause_that_was_given_up_is_paid_for_although_realtime_goes_idle():
    listening, _ = known()
    listening.arrived(PACE + 1, 50, 100)
    listening.began(100)
    listening.idle(100 + PATIENCE_S)
    listening.arrived(PACE + 1, 50, 100 + PATIENCE_S * (1 + REST) - 1)
    assert not listening.wants_silence(100 + PATIENCE_S * (1 + REST) - 1)


def test_realtime_that_shows_no_first_byte_is_not_listened_to_again_because_it_went_idle():
    listening = Listening(Baseline())
    listening.arrived(None, 50, 0)
    listening.idle(20)
    listening.arrived(None, 50, 20)
    assert not listening.wants_silence(20)
    listening.began(21)
    listening.arrived(None, 50, 21 + LISTEN_EVERY_S)
    assert listening.wants_silence(21 + LISTEN_EVERY_S)


def test_before_there_is_a_firm_baseline_it_listens_as_soon_as_realtime_is_back():
    listening = Listening(Baseline())
    listening.arrived(None, 50, 0)
    listening.began(1)
    listening.idle(20)
    listening.arrived(None, 50, 20)
    assert listening.until == 20 + PATIENCE_S


def test_nothing_has_to_be_paid_for_before_the_second_hearing():
    baseline = Baseline()
    listening = Listening(baseline)
    listening.arrived(PACE, 50, 0)
    listening.ran_out(20)
    for _ in range(GOOD_SAMPLES):
        baseline.hear(0.01, 21)
    assert not listening.wants_silence(22)
    listening.arrived(PACE, 50, 30.9)
    assert not listening.wants_silence(30.9)
    listening.arrived(PACE, 50, 31)
    assert listening.wants_silence(31)


def test_batch_that_does_not_run_out_is_waited_for_again_while_nothing_is_known():
    listening = Listening(Baseline())
    listening.arrived(None, 50, 0)
    listening.began(1)
    listening.arrived(None, 50, PATIENCE_S - 0.1)
    assert listening.until == PATIENCE_S
    listening.arrived(None, 50, PATIENCE_S)
    assert listening.until == 2 * PATIENCE_S


def test_nobody_listens_again_to_realtime_that_shows_no_first_byte():
    listening = Listening(Baseline())
    for now in range(0, 1000, 10):
        listening.arrived(None, 0, now)
    assert listening.until == LISTEN_S


def test_too_few_answers_are_added_to_a_minute_later():
    baseline = Baseline()
    listening = Listening(baseline)
    listening.arrived(None, 0, 0)
    listening.began(1)
    for _ in range(MIN_SAMPLES - 1):
        baseline.hear(0.01, 1)
    listening.arrived(None, 0, LISTEN_EVERY_S)
    assert not listening.wants_silence(LISTEN_EVERY_S)
    listening.arrived(None, 0, LISTEN_EVERY_S + 1)
    assert listening.wants_silence(LISTEN_EVERY_S + 1)
    baseline.hear(0.01, LISTEN_EVERY_S + 2)
    assert baseline.median_s == 0.01


@pytest.mark.parametrize(("pace", "listens"), [(0.21, True), (0.048, True), (0.19, False), (0.052, False)])
def test_it_listens_anew_where_realtime_comes_twice_or_half_as_often(pace, listens):
    listening, baseline = known()
    baseline.again_at = math.inf
    listening.arrived(math.log(pace), 0, LISTEN_ANEW_S - 0.1)
    assert not listening.wants_silence(LISTEN_ANEW_S - 0.1)
    listening.arrived(math.log(pace), 0, LISTEN_ANEW_S)
    assert listening.wants_silence(LISTEN_ANEW_S) == listens


def test_the_pace_is_compared_with_the_one_at_which_it_was_heard():
    listening, baseline = known()
    baseline.again_at = math.inf
    listening.heard(PACE + 1)
    listening.arrived(PACE + 1, 0, LISTEN_ANEW_S)
    assert not listening.wants_silence(LISTEN_ANEW_S)
    listening.arrived(None, 0, LISTEN_ANEW_S)
    assert not listening.wants_silence(LISTEN_ANEW_S)
    listening.arrived(PACE, 0, LISTEN_ANEW_S)
    assert listening.wants_silence(LISTEN_ANEW_S)


@pytest.mark.parametrize(("ran_out", "rests_until"), [(110, 110 + REST * 10), (None, 100 + PATIENCE_S * (1 + REST))])
def test_batch_that_paused_runs_several_times_as_long_as_it_took_to_run_out(ran_out, rests_until):
    listening, _ = known()
    listening.arrived(PACE + 1, 50, 100)
    if ran_out is not None:
        listening.ran_out(ran_out)
    until = listening.until
    listening.arrived(PACE + 3, 50, rests_until - 0.1)
    assert listening.until == until
    listening.arrived(PACE + 3, 50, rests_until)
    assert listening.until == rests_until + PATIENCE_S


@pytest.mark.parametrize(("answer_s", "rests_s"), [(3.0, 10.0), (30.0, 30.0)])
def test_what_was_taken_back_is_paid_for_too(answer_s, rests_s):
    listening, _ = known()
    listening.answer_s = answer_s
    listening.arrived(PACE + 1, 50, 100)
    listening.ran_out(110)
    listening.arrived(PACE + 3, 50, 110 + REST * rests_s - 0.1)
    assert not listening.wants_silence(110 + REST * rests_s - 0.1)
    listening.arrived(PACE + 3, 50, 110 + REST * rests_s)
    assert listening.wants_silence(110 + REST * rests_s)


def test_a_baseline_that_wants_to_be_heard_again_is():
    listening, baseline = known()
    baseline.again_at = 50
    listening.arrived(PACE, 0, 49.9)
    assert not listening.wants_silence(49.9)
    listening.arrived(PACE + 1, 0, 50)
    assert listening.wants_silence(50)
    assert baseline.again_at == math.inf
