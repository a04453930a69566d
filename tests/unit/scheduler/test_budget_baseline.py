import math

import pytest

from vllm_bootstrap.scheduler.budget_baseline import (
    BASELINE_AGE_S,
    CONFIRM_S,
    GOOD_SAMPLES,
    MIN_SAMPLES,
    Baseline,
)

EARLY, LATER = 0.010, 0.030


def hear(baseline: Baseline, ttft_s: float, count: int, now: float = 0.0) -> None:
    for _ in range(count):
        baseline.hear(ttft_s, now)


def made(ttft_s: float, count: int = GOOD_SAMPLES) -> Baseline:
    baseline = Baseline()
    hear(baseline, ttft_s, count)
    return baseline


def test_eight_answers_make_it():
    baseline = made(EARLY, MIN_SAMPLES - 1)
    assert (baseline.median_s, baseline.tail_s, baseline.knows(0)) == (None, 0, False)
    hear(baseline, LATER, 1)
    assert (baseline.median_s, baseline.tail_s, baseline.knows(0)) == (EARLY, LATER, True)
    assert not baseline.knows(0, GOOD_SAMPLES)
    hear(baseline, EARLY, GOOD_SAMPLES - MIN_SAMPLES)
    assert baseline.knows(0, GOOD_SAMPLES)


def test_it_follows_what_is_heard_at_once_where_that_is_earlier():
    baseline = made(LATER)
    hear(baseline, EARLY, GOOD_SAMPLES - 1)
    assert baseline.median_s == LATER
    hear(baseline, EARLY, 1)
    assert (baseline.median_s, baseline.tail_s) == (EARLY, EARLY)


def test_it_follows_what_is_later_after_some_time():
    baseline = made(EARLY)
    hear(baseline, LATER, 10 * GOOD_SAMPLES)
    assert baseline.median_s == EARLY, "all within ten seconds"
    hear(baseline, LATER, GOOD_SAMPLES, now=CONFIRM_S)
    assert (baseline.median_s, baseline.tail_s) == (LATER, LATER)


def test_a_doubt_is_over_where_the_next_hearing_does_not_share_it():
    baseline = made(EARLY)
    baseline.replace()
    hear(baseline, LATER, GOOD_SAMPLES, now=100)
    assert baseline.again_at == 100 + CONFIRM_S
    hear(baseline, EARLY, GOOD_SAMPLES, now=103)
    assert baseline.again_at == math.inf
    hear(baseline, LATER, GOOD_SAMPLES, now=120)
    assert baseline.median_s == EARLY
    assert baseline.again_at == 120 + CONFIRM_S


def test_the_first_baseline_of_all_is_to_be_heard_again_whatever_comes_at_once():
    baseline = made(LATER)
    assert baseline.again_at == CONFIRM_S
    hear(baseline, LATER, GOOD_SAMPLES, now=1)
    hear(baseline, 0.9 * LATER, GOOD_SAMPLES, now=2)
    assert baseline.again_at == CONFIRM_S
    hear(baseline, LATER, GOOD_SAMPLES, now=CONFIRM_S)
    assert baseline.again_at == math.inf


def test_the_old_one_counts_until_enough_has_been_heard_to_replace_it():
    baseline = made(LATER)
    baseline.replace()
    assert not baseline.knows(1)
    hear(baseline, EARLY, MIN_SAMPLES - 1, now=1)
    baseline.settle(1)
    assert (baseline.median_s, baseline.knows(1)) == (LATER, False)
    hear(baseline, EARLY, 1, now=2)
    assert (baseline.median_s, baseline.knows(2)) == (LATER, True)
    baseline.settle(2)
    assert (baseline.median_s, baseline.knows(2, GOOD_SAMPLES)) == (EARLY, True)


@pytest.mark.parametrize(
    ("second_s", "counts_s"), [(EARLY, EARLY), (LATER, LATER), (2 * LATER, LATER), (1.1 * LATER, 1.1 * LATER)]
)
def test_a_later_one_counts_once_it_was_heard_twice(second_s, counts_s):
    baseline = made(EARLY)
    baseline.replace()
    hear(baseline, LATER, GOOD_SAMPLES, now=1)
    assert (baseline.median_s, baseline.tail_s, baseline.knows(1, GOOD_SAMPLES)) == (EARLY, EARLY, True)
    baseline.confirm()
    assert not baseline.knows(11, 1)
    hear(baseline, second_s, GOOD_SAMPLES - 1, now=11)
    assert baseline.median_s == EARLY
    hear(baseline, second_s, 1, now=11)
    assert baseline.median_s == counts_s


def test_what_counts_is_kept_however_often_it_is_to_be_replaced():
    baseline = made(EARLY)
    for _ in range(3):
        baseline.replace()
        hear(baseline, LATER, GOOD_SAMPLES, now=1)
        baseline.confirm()
        hear(baseline, LATER, MIN_SAMPLES - 1, now=20)
        baseline.settle(20)
        assert baseline.median_s == EARLY
    baseline.replace()
    hear(baseline, EARLY / 2, GOOD_SAMPLES, now=30)
    assert baseline.median_s == EARLY / 2


def test_what_is_old_is_wanted_anew():
    baseline = made(EARLY)
    hear(baseline, LATER, MIN_SAMPLES, now=1)
    assert baseline.knows(BASELINE_AGE_S)
    assert not baseline.knows(BASELINE_AGE_S + 1)
    hear(baseline, EARLY / 2, MIN_SAMPLES - 1, now=BASELINE_AGE_S + 1)
    assert not baseline.knows(BASELINE_AGE_S + 1)
    hear(baseline, EARLY / 2, 1, now=BASELINE_AGE_S + 1)
    baseline.settle(BASELINE_AGE_S + 2)
    assert baseline.tail_s == EARLY / 2, "what was heard of the last one before is forgotten"


def test_of_two_hearings_the_earlier_answers_count():
    for first, second in ((EARLY, LATER), (LATER, EARLY)):
        baseline = made(first)
        baseline.confirm()
        assert not baseline.knows(11, 1)
        hear(baseline, second, GOOD_SAMPLES - 1, now=11)
        assert baseline.median_s == first
        hear(baseline, second, 1, now=11)
        assert baseline.median_s == baseline.tail_s == EARLY
        assert baseline.knows(11, GOOD_SAMPLES)


def test_two_hearings_that_agree_count_both():
    baseline = made(EARLY)
    baseline.confirm()
    hear(baseline, 1.1 * EARLY, GOOD_SAMPLES, now=1)
    assert (baseline.median_s, baseline.tail_s) == (1.1 * EARLY, EARLY), "two of the four sixteens had nothing later"
    hear(baseline, 1.1 * EARLY, GOOD_SAMPLES, now=2)
    assert baseline.tail_s == 1.1 * EARLY
    assert baseline.knows(1, 2 * GOOD_SAMPLES)


def test_an_engine_that_stood_still_for_a_moment_does_not_count_as_what_the_latest_take():
    baseline = Baseline()
    for number in range(GOOD_SAMPLES):
        baseline.hear(LATER if 18 <= number < 26 else EARLY, 0.0)  # a quarter of them, one after the other
    assert (baseline.median_s, baseline.tail_s) == (EARLY, EARLY)
    baseline = Baseline()
    for number in range(GOOD_SAMPLES):
        baseline.hear(LATER if number % 10 == 0 else EARLY, 0.0)  # a tenth, as ever
    assert (baseline.median_s, baseline.tail_s) == (EARLY, LATER)


def test_a_hearing_counts_once():
    baseline = made(EARLY, 2 * GOOD_SAMPLES)
    baseline.confirm()
    hear(baseline, 1.1 * EARLY, MIN_SAMPLES, now=1)
    for _ in range(20):
        baseline.settle(1)
    assert baseline.median_s == EARLY


def test_answers_that_begin_at_once():
    baseline = made(0.0)
    baseline.confirm()
    hear(baseline, 0.0, GOOD_SAMPLES, now=1)
    assert baseline.median_s == 0


def test_a_short_hearing_goes_on_until_it_is_not_too_short():
    baseline = made(LATER)
    baseline.confirm()
    hear(baseline, EARLY, MIN_SAMPLES - 1, now=1)
    baseline.settle(1)
    assert baseline.median_s == LATER
    hear(baseline, EARLY, 1, now=70)
    baseline.settle(70)
    baseline.settle(70)
    assert baseline.median_s == EARLY
    hear(baseline, LATER, MIN_SAMPLES, now=71)
    baseline.settle(71)
    assert baseline.median_s == EARLY, "answers that nobody asked for are heard until there are many"


@pytest.mark.parametrize("wanted", [False, True])
def test_earlier_answers_beside_batch_count_and_want_a_hearing_unless_one_is_under_way(wanted):
    baseline = made(LATER)
    if wanted:
        baseline.confirm()
    before = baseline.again_at
    baseline.too_late([EARLY] * GOOD_SAMPLES, now=5.0)
    assert baseline.median_s == baseline.tail_s == EARLY
    assert baseline.again_at == (before if wanted else 5.0)
