from vllm_bootstrap.scheduler.budget_baseline import BASELINE_AGE_S, GOOD_SAMPLES, MIN_SAMPLES, Baseline

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


def test_it_follows_what_is_heard():
    baseline = made(EARLY)
    hear(baseline, LATER, 40)
    assert baseline.median_s == LATER
    hear(baseline, EARLY, 100)
    assert (baseline.median_s, baseline.tail_s) == (EARLY, EARLY), "only the last ones are remembered"


def test_the_old_one_counts_until_enough_has_been_heard_to_replace_it():
    baseline = made(EARLY)
    baseline.replace()
    assert not baseline.knows(1)
    hear(baseline, LATER, MIN_SAMPLES - 1, now=1)
    baseline.settle()
    assert (baseline.median_s, baseline.knows(1)) == (EARLY, False)
    hear(baseline, LATER, 1, now=2)
    assert (baseline.median_s, baseline.knows(2)) == (LATER, True)


def test_what_is_old_is_replaced():
    baseline = made(EARLY)
    assert baseline.knows(BASELINE_AGE_S - 1)
    assert not baseline.knows(BASELINE_AGE_S)
    hear(baseline, LATER, MIN_SAMPLES - 1, now=BASELINE_AGE_S)
    assert baseline.median_s == EARLY
    hear(baseline, LATER, 1, now=BASELINE_AGE_S)
    assert baseline.median_s == LATER


def test_of_two_hearings_the_earlier_answers_count():
    for first, second in ((EARLY, LATER), (LATER, EARLY)):
        baseline = made(first)
        baseline.confirm()
        assert not baseline.knows(1, 1)
        hear(baseline, second, GOOD_SAMPLES - 1, now=1)
        assert baseline.median_s == first
        hear(baseline, second, 1, now=1)
        assert baseline.median_s == baseline.tail_s == EARLY
        assert baseline.knows(1, GOOD_SAMPLES)


def test_two_hearings_that_agree_count_both():
    baseline = made(EARLY)
    baseline.confirm()
    hear(baseline, 1.1 * EARLY, GOOD_SAMPLES, now=1)
    assert (baseline.median_s, baseline.tail_s) == (1.1 * EARLY, 1.1 * EARLY)
    assert baseline.knows(1, 2 * GOOD_SAMPLES)


def test_a_hearing_counts_once():
    baseline = made(EARLY, GOOD_SAMPLES + MIN_SAMPLES)
    baseline.confirm()
    hear(baseline, 1.1 * EARLY, MIN_SAMPLES, now=1)
    for _ in range(20):
        baseline.settle()
    hear(baseline, EARLY, MIN_SAMPLES, now=2)
    assert baseline.median_s == EARLY


def test_answers_that_begin_at_once():
    baseline = made(0.0)
    baseline.confirm()
    hear(baseline, 0.0, GOOD_SAMPLES, now=1)
    assert baseline.median_s == 0


def test_a_short_hearing_confirms_where_it_was_not_too_short():
    baseline = made(LATER)
    baseline.confirm()
    hear(baseline, EARLY, MIN_SAMPLES - 1, now=1)
    baseline.settle()
    assert baseline.median_s == LATER
    baseline.confirm()
    hear(baseline, EARLY, MIN_SAMPLES, now=2)
    baseline.settle()
    baseline.settle()
    assert baseline.median_s == EARLY
    hear(baseline, EARLY, MIN_SAMPLES, now=3)
    assert baseline.knows(3, 2 * MIN_SAMPLES)


def test_what_is_being_replaced_needs_no_confirmation():
    baseline = made(EARLY)
    baseline.replace()
    baseline.confirm()
    hear(baseline, LATER, MIN_SAMPLES, now=1)
    assert baseline.median_s == LATER
