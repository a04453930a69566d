import itertools
import math

import pytest

from vllm_bootstrap.scheduler.budget import Budget, BudgetPolicy
from vllm_bootstrap.scheduler.budget_cap import Cap
from vllm_bootstrap.scheduler.ports import EngineSignals

QUICK = 0.010


def learnt(slots: int = 128, now: float = 0.0, **policy: float) -> tuple[Budget, float]:
    """A budget that has heard twice what realtime is like alone, and the time; realtime is idle again."""
    budget = Budget(BudgetPolicy(**policy), slots)  # type: ignore[arg-type]
    for _ in range(2):
        for _ in range(32):
            now = answer(budget, now, QUICK)
        now += 20
    return budget, now


def answer(budget: Budget, now: float, ttft_s: float) -> float:
    """One realtime request, its whole life; returns the time at its end."""
    budget.realtime_arrived(now)
    budget.realtime_granted(1, 20, now)
    budget.realtime_began(ttft_s, now + ttft_s)
    budget.realtime_ended(1, now + 0.2)
    return now + 0.2


def run_batch(budget: Budget, now: float, first: int, count: int) -> None:
    for request in range(first, first + count):
        budget.batch_granted(request, 1, 100, now)


def end_batch(budget: Budget, now: float, count: int) -> None:
    """The first so many end."""
    for request in range(1, count + 1):
        budget.batch_ended(request, 1, now)


# -- idle (1) -------------------------------------------------------------------------------------------------------


def test_without_realtime_batch_may_use_all_but_the_reserve():
    budget = Budget(BudgetPolicy(), 128)
    assert budget.allowance(0) == 115
    assert budget.paced_until(0) is None
    assert budget.take_back(0) == 0
    assert budget.next_change(0) is None
    assert budget.report(0).reason == "Realtime is idle: batch may use all but the reserve."


@pytest.mark.parametrize(("slots", "reserve"), [(1, 0), (2, 1), (8, 1), (256, 26)])
def test_the_reserve_is_a_share_but_at_least_one_slot_where_there_are_two(slots, reserve):
    budget = Budget(BudgetPolicy(), slots)
    assert budget.report(0).reserve == reserve
    assert budget.allowance(0) == slots - reserve


def test_a_reserve_may_be_nothing_only_where_there_is_one_slot():
    assert Budget(BudgetPolicy(reserve_share=0), 16).allowance(0) == 15


def test_a_resized_engine_has_another_top():
    budget = Budget(BudgetPolicy(), 128)
    budget.resize(10)
    assert budget.allowance(0) == 9


def test_when_realtime_falls_silent_batch_doubles_up_to_the_top():
    budget, now = learnt()
    now = answer(budget, now, QUICK)
    start = next(t / 20 for t in range(int(now * 20), 10_000) if budget.allowance(t / 20) > 3)
    seen = [budget.allowance(start + 0.01 + step / 4) for step in range(5)]
    assert seen == [7, 14, 28, 56, 112]
    assert budget.allowance(start + 2) == 115
    assert budget.report(start + 0.1).reason == "Realtime has just become idle: batch grows."
    change = budget.next_change(start + 0.01)
    assert change is not None
    assert start + 0.01 < change <= start + 0.27


def test_usual_pauses_of_realtime_do_not_count_as_idle():
    budget, now = learnt()
    for _ in range(40):
        now = answer(budget, now, QUICK) + 1.8
    assert budget.allowance(now + 4) == 3, "two seconds apart: four are not yet idle"
    assert budget.allowance(now + 20) == 115


# -- active (2, 3) --------------------------------------------------------------------------------------------------


def test_batch_pauses_until_realtime_alone_is_known():
    budget = Budget(BudgetPolicy(), 128)
    run_batch(budget, 0, 1, 100)
    budget.realtime_arrived(0)
    assert budget.allowance(0) == 0
    assert budget.take_back(0) == 100
    assert budget.report(0).reason == "Realtime is active and not known yet: batch pauses while its answers are timed."
    for request in range(1, 101):
        budget.batch_ended(request, 1, 0.1)
    now = 1.0
    for _ in range(8):
        assert budget.allowance(now) == 0
        now = answer(budget, now, QUICK)
    assert budget.allowance(now) == 0, "more answers make a better baseline, as long as that does not take long"
    budget.realtime_arrived(5.05)
    assert budget.allowance(5.05) == 0
    now = 5.1
    assert budget.allowance(now) == 3
    assert budget.report(now).ttft_baseline_s == QUICK
    assert budget.report(now).reason == "Realtime is active: batch is held to what its answers bear."


def test_many_answers_alone_end_the_pause_early():
    budget = Budget(BudgetPolicy(), 128)
    for number in range(32):
        assert budget.allowance(number / 20) == (0 if number else 115)
        budget.realtime_arrived(number / 20)
        budget.realtime_began(QUICK, number / 20 + QUICK)
    assert budget.allowance(1.6) == 3


def test_realtime_that_shows_no_first_byte_is_listened_to_once():
    budget = Budget(BudgetPolicy(), 128)
    budget.realtime_granted(1, 20, 0)
    budget.realtime_arrived(0)
    assert budget.next_change(0) == 5
    assert budget.allowance(5) == 3
    for now in range(6, 200, 3):
        budget.realtime_arrived(now)
        assert budget.allowance(now) == 3


def steady(budget: Budget, now: float, gap_s: float, count: int, ttft_s: float) -> float:
    """Realtime that comes at one pace; returns the time of the next."""
    for _ in range(count):
        budget.realtime_arrived(now)
        budget.realtime_granted(1, 20, now)
        budget.realtime_began(ttft_s, now + ttft_s)
        budget.realtime_ended(1, now + ttft_s)
        now += gap_s
    return now


def until_it_listens(budget: Budget, now: float, gap_s: float, ttft_s: float) -> float:
    start = now
    while budget.allowance(now):
        now = steady(budget, now, gap_s, 1, ttft_s)
        assert now < start + 40 * gap_s + 12
    return now


@pytest.mark.parametrize(("before_s", "after_s"), [(0.5, 0.1), (0.1, 0.5)])
def test_realtime_at_another_pace_is_listened_to_anew(before_s, after_s):
    budget = Budget(BudgetPolicy(), 128)
    now = steady(budget, 0, before_s, 300, 2 * QUICK)
    run_batch(budget, now, 1, 3)
    now = until_it_listens(budget, now, after_s, 2 * QUICK)
    assert (
        budget.report(now).reason == "Realtime is active and not known yet: batch pauses while its answers are timed."
    )
    assert budget.report(now).ttft_baseline_s == 2 * QUICK, "the old one is better than none"
    end_batch(budget, now, 3)
    now = steady(budget, now + 1, after_s, 60, QUICK)
    assert budget.allowance(now) > 0
    assert budget.report(now).ttft_baseline_s == QUICK


@pytest.mark.parametrize(("again", "counts_s"), [(True, 2 * QUICK), (False, QUICK)])
def test_at_another_pace_a_later_baseline_counts_once_it_was_heard_twice(again, counts_s):
    budget = Budget(BudgetPolicy(), 128)
    now = steady(budget, 0, 0.5, 300, QUICK)
    run_batch(budget, now, 1, 3)
    now = until_it_listens(budget, now, 0.1, 2 * QUICK)
    end_batch(budget, now, 3)
    now = steady(budget, now + 1, 0.1, 32, 2 * QUICK)
    assert budget.report(now).ttft_baseline_s == QUICK
    assert budget.allowance(now) > 0
    run_batch(budget, now, 4, 1)
    now = until_it_listens(budget, now, 0.1, QUICK)
    assert budget.report(now).ttft_baseline_s == QUICK
    budget.batch_ended(4, 1, now)
    now = steady(budget, now + 1, 0.1, 33, 2 * QUICK if again else QUICK)
    assert budget.allowance(now) > 0
    assert budget.report(now).ttft_baseline_s == counts_s
    run_batch(budget, now, 5, 1)
    for _ in range(1000):
        now = steady(budget, now, 0.1, 1, counts_s)
        assert budget.allowance(now) > 0, "twice is enough"


@pytest.mark.parametrize(("first_s", "second_s"), [(3 * QUICK, QUICK), (QUICK, 0.9 * QUICK)])
def test_what_realtime_is_like_alone_is_heard_twice_and_the_earlier_counts(first_s, second_s):
    budget = Budget(BudgetPolicy(), 128)
    now = steady(budget, 0, 0.1, 32, first_s)
    run_batch(budget, now, 1, 3)
    now = steady(budget, now, 0.1, 60, first_s)
    assert budget.allowance(now) > 0
    assert budget.report(now).ttft_baseline_s == first_s
    now = until_it_listens(budget, now, 0.1, first_s)
    assert now < 15
    assert budget.take_back(now) == 3
    end_batch(budget, now, 3)
    now = steady(budget, now + 1, 0.1, 33, second_s)
    assert budget.allowance(now) > 0
    assert budget.report(now).ttft_baseline_s == QUICK
    run_batch(budget, now, 4, 1)
    for _ in range(1000):
        now = steady(budget, now, 0.1, 1, QUICK)
        assert budget.allowance(now) > 0, "twice is enough"


def test_a_second_hearing_that_nobody_answers_changes_nothing():
    budget = Budget(BudgetPolicy(), 128)
    now = steady(budget, 0, 0.1, 32, QUICK)
    run_batch(budget, now, 1, 5)  # they run on and on
    now = steady(budget, now, 0.1, 300, 1.1 * QUICK)
    assert budget.allowance(now) == 0
    now = steady(budget, now, 0.1, 1200, 1.1 * QUICK)
    assert budget.allowance(now) > 0
    assert budget.report(now).ttft_baseline_s == QUICK


def test_the_cap_is_judged_by_the_old_baseline_until_there_is_a_new_one():
    budget = Budget(BudgetPolicy(), 128)
    now = steady(budget, 0, 0.5, 80, QUICK)
    run_batch(budget, now, 1, 100)
    for _ in range(10):
        now = steady(budget, now, 0.5, 40, QUICK)
    before = budget.allowance(now)
    assert before > 20
    now = until_it_listens(budget, now, 0.1, QUICK)
    end_batch(budget, now, 100)
    now = steady(budget, now + 1, 0.1, 3, QUICK)  # not enough to go by
    run_batch(budget, now, 101, before)
    now = steady(budget, now, 0.1, 120, 3 * QUICK)
    assert 0 < budget.allowance(now) < before / 4


def test_pauses_and_bursts_are_no_other_pace():
    budget = Budget(BudgetPolicy(), 128)
    now = steady(budget, 0, 0.1, 300, QUICK)
    run_batch(budget, now, 1, 3)
    for pause_s in (1.5, 5, 60, 30, 1.9, 120):
        now = steady(budget, now + pause_s, 0.1, 50, QUICK)
        assert budget.allowance(now) > 0


@pytest.mark.parametrize(("batch", "least"), [(5, 4), (4, 8)])
def test_a_pace_that_keeps_changing_pauses_batch_a_quarter_of_the_time_at_most(batch, least):
    budget = Budget(BudgetPolicy(), 128)
    now = steady(budget, 0, 0.1, 100, QUICK)
    run_batch(budget, now, 1, batch)  # never ends
    start, pauses, paused_s, was_paused = now, 0, 0.0, False
    for number in range(12_000):
        before = now
        now = steady(budget, now, 0.05 if number // 60 % 2 else 0.4, 1, QUICK)
        paused = budget.allowance(now) == 0
        pauses += paused and not was_paused
        paused_s += (now - before) * paused
        was_paused = paused
    assert pauses >= least
    assert paused_s < 0.25 * (now - start)


def test_what_realtime_uses_batch_leaves():
    budget, now = learnt()
    budget.realtime_granted(113, 20, now)
    assert budget.allowance(now) == 2
    budget.realtime_granted(10, 20, now)
    assert budget.allowance(now) == 0
    assert budget.report(now).reason == "Realtime is active and leaves these slots."
    assert budget.next_change(now) is None
    budget.realtime_ended(123, now + 30)
    assert budget.allowance(now + 300) == 115


def test_the_cap_grows_while_answers_come_as_early_as_alone():
    budget, now = learnt()
    seen = []
    run_batch(budget, now, 1, 115)
    for _ in range(200):
        now = answer(budget, now, QUICK)
        seen.append(budget.allowance(now))
    assert seen == sorted(seen)
    assert seen[-1] > 20


def test_the_cap_stays_where_batch_does_not_use_it():
    budget, now = learnt()
    run_batch(budget, now, 1, 1)
    for _ in range(100):
        now = answer(budget, now, QUICK)
    assert budget.allowance(now) == 3


def test_the_cap_shrinks_when_answers_begin_later_and_tries_again_from_nothing():
    budget, now = learnt()
    run_batch(budget, now, 1, 3)
    for _ in range(60):
        now = answer(budget, now, 2 * QUICK)
    assert budget.allowance(now) == 0
    assert budget.take_back(now) == 3
    for request in (1, 2, 3):
        budget.batch_ended(request, 1, now)
    for _ in range(15):
        now = answer(budget, now, QUICK)
    assert budget.allowance(now) == 1


@pytest.mark.parametrize(("late", "expected"), [({6, 30}, 3), ({6, 30, 78}, 2), ({6, 30, 110}, 3)])
def test_three_late_answers_of_96_are_no_accident(late, expected):
    budget, now = learnt()
    run_batch(budget, now, 1, 3)
    for number in range(112):
        now = answer(budget, now, 10 * QUICK if number in late else 1.1 * QUICK)
    assert budget.allowance(now) == expected


def test_late_answers_count_although_the_cap_has_grown_meanwhile():
    budget, now = learnt()
    run_batch(budget, now, 1, 3)
    caps = []
    for number in range(28):
        now = answer(budget, now, 10 * QUICK if number in {2, 18, 19} else QUICK)
        caps.append(budget.allowance(now))
    assert caps[7] == caps[17] == 4
    assert caps[-1] == 2


def test_the_cap_is_judged_by_the_most_that_ran():
    budget, now = learnt()
    run_batch(budget, now, 1, 2)
    for number in range(60):
        now = answer(budget, now, QUICK)
        if number % 2:
            budget.batch_ended(3, 1, now)
        else:
            run_batch(budget, now, 3, 1)
    assert budget.allowance(now) == 4


@pytest.mark.parametrize(
    ("latest", "added", "expected"),
    [(1.2, 0.05, 4), (1.2, 0.1, 3), (1.2, 0.16, 2), (1.5, 0.16, 3), (1.5, 0.2, 2), (9.0, 0.05, 4), (9.0, 0.2, 2)],
)
def test_the_room_is_half_of_what_the_latest_answers_take_alone_but_not_of_outliers(latest, added, expected):
    budget, now = Budget(BudgetPolicy(), 128), 0.0
    for number in range(96):
        now = answer(budget, now, latest * QUICK if number % 8 == 0 else QUICK)
    now += 10
    run_batch(budget, now, 1, 3)
    for _ in range(8):
        now = answer(budget, now, QUICK + added * QUICK)
    assert budget.allowance(now) == expected


def test_where_answers_begin_at_once_there_is_no_room():
    budget, now = Budget(BudgetPolicy(), 128), 0.0
    for _ in range(96):
        now = answer(budget, now, 0.0)
    now += 10
    run_batch(budget, now, 1, 3)
    for _ in range(8):
        now = answer(budget, now, 0.0)
    assert budget.allowance(now) == 2


def test_in_between_it_stays():
    budget, now = learnt()
    run_batch(budget, now, 1, 3)
    for _ in range(100):
        now = answer(budget, now, 1.1 * QUICK)
    assert budget.allowance(now) == 3
    assert budget.report(now).ttft_recent_s == 1.1 * QUICK


def test_an_old_baseline_is_made_anew():
    budget, now = learnt()
    now += 700
    budget.realtime_arrived(now)
    assert budget.allowance(now) == 0
    for _ in range(8):
        now = answer(budget, now, QUICK / 3)
    assert budget.report(now).ttft_baseline_s == QUICK
    now = answer(budget, now + 3.5, QUICK / 3)
    assert budget.report(now).ttft_baseline_s == QUICK / 3
    assert budget.allowance(now) == 3


def test_without_the_cap_only_reserve_and_realtime_count():
    budget = Budget(BudgetPolicy(cap=False, pacing=False), 128)
    budget.realtime_arrived(0)
    budget.realtime_granted(5, 20, 0)
    run_batch(budget, 0, 1, 115)
    assert budget.allowance(0) == 110
    assert budget.take_back(0) == 0
    assert budget.paced_until(0) is None
    budget.realtime_ended(5, 1)
    assert budget.allowance(3.1) == 115


# -- pacing (4) -----------------------------------------------------------------------------------------------------


def test_batch_prompts_go_one_after_the_other_beside_realtime():
    budget, now = learnt()
    budget.batch_granted(1, 1, 400, now)
    assert budget.paced_until(now) is None, "realtime is idle"
    budget.realtime_arrived(now)
    assert budget.paced_until(now) == pytest.approx(now + 0.1)
    assert budget.next_change(now) == pytest.approx(now + 0.1)
    budget.batch_began(1, now + 0.05)
    assert budget.paced_until(now + 0.05) is None


def test_a_batch_prompt_lets_a_realtime_answer_begin_but_does_not_wait_for_ever():
    budget, now = learnt()
    budget.batch_granted(1, 1, 40, now)
    budget.realtime_granted(1, 20, now + 1)
    assert budget.paced_until(now + 1) is None, "there was room for another long before"
    budget.batch_ended(1, 1, now + 1.002)
    assert budget.paced_until(now + 1.002) == pytest.approx(now + 1.01)
    budget.realtime_granted(1, 20, now + 1.005)
    assert budget.paced_until(now + 1.005) == pytest.approx(now + 1.012), "only as long as one answer takes to begin"
    budget.batch_ended(2, 1, now + 1.006)
    assert budget.paced_until(now + 1.006) == pytest.approx(now + 1.012)
    assert budget.next_change(now + 1.006) == pytest.approx(now + 1.012)
    budget.batch_granted(3, 1, 40, now + 1.012)
    assert budget.paced_until(now + 1.012) == pytest.approx(now + 1.022), "its own prompt"


def test_a_prompt_that_ended_paces_nothing():
    budget, now = learnt()
    budget.realtime_arrived(now)
    budget.batch_granted(1, 1, 400, now)
    budget.batch_ended(1, 1, now)
    assert budget.paced_until(now) is None


def test_the_engine_says_how_long_prompts_take():
    budget, now = learnt()
    budget.signals(EngineSignals(prompt_tokens=0, prefill_seconds_sum=0.0), now)
    budget.signals(EngineSignals(prompt_tokens=1000, prefill_seconds_sum=1.0), now)
    budget.realtime_arrived(now)
    budget.batch_granted(1, 1, 400, now)
    assert budget.paced_until(now) == pytest.approx(now + 0.4)
    budget.batch_granted(2, 1, 10**9, now)
    assert budget.paced_until(now) == pytest.approx(now + 5.4), "an absurd estimate does not stop batch"
    budget.signals(EngineSignals(prompt_tokens=5, prefill_seconds_sum=0.5), now)  # the engine was started anew
    budget.signals(EngineSignals(), now)


def rests(budget: Budget, now: float, prompts: int) -> float:
    """Batch prompts with a realtime answer that each made late, and answers in time between them; returns the time
    after the last late one."""
    for request in range(1, prompts + 1):
        now = steady(budget, now, 0.2, 1, QUICK)
        while budget.paced_until(now) is not None:
            now = steady(budget, now, 0.2, 1, QUICK)
        budget.batch_granted(request, 1, 40, now)
        now = steady(budget, now, 0.2, 1, 3 * QUICK)
        budget.batch_ended(request, 1, now)
    return now


def test_where_batch_prompts_make_realtime_late_batch_rests_after_each_and_says_so():
    budget, now = learnt()
    now = rests(budget, now, 9)
    assert budget.paced_until(now) == pytest.approx(now + 2**9 * 0.01, rel=0.2)
    assert budget.report(now).reason == (
        "Realtime is active, and batch prompts make it late: after each, batch rests for 5 s."
    )
    assert budget.paced_until(now + 2.5) is None, "realtime is idle"


def test_no_rest_holds_back_what_batch_gets_in_any_case():
    budget, now = learnt()
    now = rests(budget, now, 20)
    budget.realtime_granted(1, 20, now)  # it goes on for long
    budget.batch_waits(True, now - 30)
    assert budget.paced_until(now + 29) is not None
    assert budget.overdue(now + 31)
    assert budget.paced_until(now + 31) is None


def test_answers_beside_batch_that_begin_earlier_than_alone_show_that_this_was_heard_wrong():
    budget = Budget(BudgetPolicy(), 128)
    now = steady(budget, 0, 0.1, 300, 4 * QUICK)
    before = budget.allowance(now)
    run_batch(budget, now, 1, before)
    now = steady(budget, now, 0.1, 16, 2 * QUICK)
    assert budget.allowance(now) == before, "nothing grows on what is wrong"
    assert budget.report(now).ttft_baseline_s == 4 * QUICK
    now = steady(budget, now, 0.1, 24, 2 * QUICK)
    assert budget.report(now).ttft_baseline_s == 2 * QUICK
    assert budget.allowance(now) == 0, "and it is listened to"
    end_batch(budget, now, before)
    now = steady(budget, now + 1, 0.1, 33, QUICK)
    assert budget.report(now).ttft_baseline_s == QUICK
    assert budget.allowance(now) > 0


def heard(*ttfts_s: float) -> Cap:
    cap = Cap(1.5)
    for ttft_s in ttfts_s * (64 // len(ttfts_s)):
        cap.baseline.hear(ttft_s, 0)
    return cap


def test_answers_that_differ_much_do_not_show_that_realtime_was_heard_wrong():
    cap = heard(QUICK, 5 * QUICK, 5 * QUICK)
    before_s = cap.baseline.median_s
    for number in range(64):  # more of them are early, by chance
        cap.beside((QUICK, QUICK, 5 * QUICK)[number % 3], 3, 100, 1 + number)
    assert cap.baseline.median_s == before_s
    for number in range(64):
        cap.beside(QUICK, 3, 100, 100 + number)
    assert cap.baseline.median_s == QUICK


def test_a_baseline_that_moves_by_little_is_no_other_to_judge_by():
    cap = heard(QUICK)
    before = cap.value(100)
    for number in range(16):
        cap.beside(2 * QUICK, 3, 100, 1 + number)
        for _ in range(32):
            cap.baseline.hear((1 + number / 100) * QUICK, 1 + number)
    assert cap.value(100) < before


def test_late_answers_count_also_where_the_others_begin_earlier_than_alone():
    budget = Budget(BudgetPolicy(), 128)
    now = steady(budget, 0, 0.1, 300, 4 * QUICK)
    before = budget.allowance(now)
    run_batch(budget, now, 1, before)
    for ttft_s in (2 * QUICK, 2 * QUICK, 10 * QUICK) * 8:
        now = steady(budget, now, 0.1, 1, ttft_s)
    assert 0 < budget.allowance(now) < before


# -- the engine -----------------------------------------------------------------------------------------------------


def test_a_full_cache_or_preemption_takes_and_gives_back_slowly():
    budget = Budget(BudgetPolicy(), 128)
    budget.signals(EngineSignals(kv_usage=0.99, preemptions=0), 0)
    assert budget.allowance(0) == 92
    run_batch(budget, 0, 1, 50)
    budget.signals(EngineSignals(kv_usage=0.5, preemptions=3), 2)
    assert budget.allowance(2) == 40, "it held fifty and that was too much"
    assert budget.report(2).reason == "Realtime is idle, but the engine's memory is full: batch is held back."
    budget.signals(EngineSignals(kv_usage=0.9, preemptions=3), 4)
    assert budget.allowance(4) == 40
    for now in range(6, 30, 2):
        budget.signals(EngineSignals(kv_usage=0.5, preemptions=3), now)
    assert budget.allowance(30) == 115


def test_memory_counts_beside_realtime_too():
    budget, now = learnt(16)
    for _ in range(40):
        budget.signals(EngineSignals(kv_usage=0.99), now)
    budget.realtime_arrived(now)
    assert budget.allowance(now) == 1
    assert budget.report(now).reason == "Realtime is active, and the engine's memory holds no more batch."


def test_requests_that_wait_inside_the_engine_halve_the_cap():
    budget, now = learnt(512)
    budget.realtime_arrived(now)
    assert budget.allowance(now) == 14
    budget.signals(EngineSignals(waiting=60), now)
    assert budget.allowance(now) == 7
    budget.signals(EngineSignals(waiting=60), now + 0.1)
    assert budget.allowance(now) == 7, "what ran before the change still waits"
    budget.signals(EngineSignals(waiting=3), now + 2)
    assert budget.allowance(now) == 7


def test_the_step_time_is_shown():
    budget = Budget(BudgetPolicy(), 16)
    budget.signals(EngineSignals(inter_token_seconds_sum=1.0, inter_token_count=100), 0)
    assert budget.report(0).step_s is None
    budget.signals(EngineSignals(inter_token_seconds_sum=2.0, inter_token_count=200), 2)
    assert budget.report(2).step_s == 0.01
    budget.signals(EngineSignals(inter_token_seconds_sum=2.0, inter_token_count=200), 4)
    assert budget.report(4).step_s == 0.01


# -- the floor (6) --------------------------------------------------------------------------------------------------


def test_the_floor_falls_due_after_a_minute_without_batch():
    budget = Budget(BudgetPolicy(), 16)
    assert not budget.overdue(1000)
    budget.batch_waits(True, 1000)
    assert not budget.overdue(1059.9)
    assert budget.next_change(1000) == 1060
    assert budget.overdue(1060)
    budget.batch_granted(1, 1, 10, 1060)
    budget.promoted(1060)
    assert not budget.overdue(1060.5)
    budget.batch_ended(1, 1, 1061)
    assert not budget.overdue(1061)
    assert budget.next_change(1061) == pytest.approx(1080), "a second was had, which is owed again after nineteen more"
    assert budget.report(1117).promotions == 1


def test_what_batch_gets_anyway_counts_for_the_floor():
    budget = Budget(BudgetPolicy(), 16)
    budget.batch_granted(1, 1, 10, 0)
    budget.batch_waits(True, 10)
    budget.batch_waits(True, 11)
    budget.batch_ended(1, 1, 20)
    assert budget.next_change(20) == pytest.approx(80), "however long it ran: a minute without is a minute"
    for second in range(80, 680, 10):  # it gets its twentieth by itself
        budget.batch_granted(second, 1, 10, second - 60)
        budget.batch_ended(second, 1, second - 59.5)
        assert not budget.overdue(second - 50)


def test_a_queue_that_is_empty_for_a_moment_owes_what_it_owed():
    budget = Budget(BudgetPolicy(), 16)
    budget.batch_waits(True, 0)
    budget.batch_waits(False, 30)
    assert budget.next_change(30) is None
    budget.batch_waits(True, 31)
    assert budget.next_change(31) == pytest.approx(61)
    budget.batch_waits(False, 60)
    assert not budget.overdue(63), "nobody waits"
    budget.batch_waits(True, 119)
    assert budget.next_change(119) == pytest.approx(120)
    budget.batch_waits(False, 119.5)
    budget.batch_waits(True, 180)
    assert budget.next_change(180) == pytest.approx(240), "a minute in which nobody asked"


def test_a_client_that_asks_one_by_one_gets_the_floor_too():
    budget = Budget(BudgetPolicy(), 16)
    now, ran_s = 0.0, 0.0
    while now < 3600:
        budget.batch_waits(True, now)
        due = budget.next_change(now)
        assert due is not None
        budget.batch_granted(1, 1, 10, due)
        budget.batch_waits(False, due)
        now = due + 0.5
        ran_s += 0.5
        budget.batch_ended(1, 1, now)
    assert ran_s / now == pytest.approx(0.05, abs=0.002)


def test_what_fell_due_and_found_no_slot_stays_due_and_is_not_added_up():
    budget = Budget(BudgetPolicy(), 16)
    budget.batch_waits(True, 0)
    assert budget.overdue(60)
    assert budget.overdue(200)
    budget.batch_granted(1, 1, 10, 200)
    budget.batch_ended(1, 1, 203)
    assert not budget.overdue(203)
    assert budget.next_change(203) == pytest.approx(260)


def test_no_floor():
    budget = Budget(BudgetPolicy(floor_share=0), 16)
    budget.batch_waits(True, 0)
    assert not budget.overdue(10_000)
    assert budget.next_change(0) is None


def test_events_of_requests_it_does_not_know_change_nothing():
    budget = Budget(BudgetPolicy(), 16)
    budget.batch_began(9, 0)
    budget.batch_ended(9, 1, 0)
    budget.realtime_ended(1, 0)
    assert budget.report(0).batch_sequences == 0
    assert budget.report(0).realtime_sequences == 0
    assert math.isfinite(budget.allowance(0))


def test_answers_that_take_long_one_after_the_other_do_not_begin_a_pause_again_and_again():
    budget, now = learnt()
    run_batch(budget, now, 1, 50)  # never ends
    paused = []
    for _ in range(100):
        budget.realtime_arrived(now)
        budget.realtime_granted(1, 20, now)
        budget.realtime_began(QUICK, now + QUICK)
        paused.append(budget.allowance(now + 14) == 0)
        budget.realtime_ended(1, now + 15)
        now += 15.5
    runs = [len(list(group)) for is_paused, group in itertools.groupby(paused) if is_paused]
    assert runs == [7, 7], "given up after 120 s; for 600 s after that there is no other"
