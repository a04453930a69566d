from __future__ import annotations

import pytest

from tests.support.desk import Desk, launch
from vllm_bootstrap.scheduler.capacity import MAX_TAKEN_BACK
from vllm_bootstrap.scheduler.ports import EngineSignals
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel

SIGNALS = EngineSignals(running=1)


def batch(desk: Desk, **ticket: object) -> int:
    return desk.ask(cls="batch", **ticket)


def test_b_batch_stays_within_its_budget_and_realtime_may_take_all() -> None:
    desk = Desk(launch(slots=4))
    desk.budgets[0].most = 2
    first, second, third = batch(desk), batch(desk), batch(desk)
    realtime = [desk.ask(), desk.ask()]
    assert desk.order() == [first, second, *realtime]
    desk.done(realtime[0])
    assert third not in desk.granted
    desk.done(first)
    assert third in desk.granted


def test_b_batch_starts_when_the_budget_grows_with_time() -> None:
    desk = Desk(launch(slots=4))
    budget = desk.budgets[0]
    budget.most, budget.change_at = 0, 7.0
    waiting = batch(desk)
    assert desk.admission.next_change(5.0) == 7.0
    budget.most = None
    desk.tick(7.0)
    assert desk.order() == [waiting]


def test_b_nothing_changes_with_time_where_no_batch_waits() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1, names=("n",)))
    desk.budgets[1].change_at = 7.0
    desk.ask()
    batch(desk)
    assert desk.admission.next_change(5.0) is None


def test_b_a_paced_batch_request_waits_for_the_prompt_before_it() -> None:
    desk = Desk(launch(slots=4))
    first = batch(desk)
    desk.budgets[0].paced = 3.0
    second = batch(desk)
    assert desk.order() == [first]
    desk.budgets[0].paced = None
    desk.begin(first)
    assert desk.order() == [first, second]


def test_b_one_larger_than_all_that_batch_may_have_runs_alone() -> None:
    desk = Desk(launch(slots=4))
    desk.budgets[0].reserve = 1
    small = batch(desk)
    huge = batch(desk, sequences=9)
    assert desk.order() == [small]
    desk.done(small)
    assert desk.order() == [huge]
    assert desk.budgets[0].batch == 4


def test_c_an_overdue_batch_request_goes_before_waiting_realtime_once() -> None:
    desk = Desk(launch(slots=1))
    desk.budgets[0].most = 0
    running = desk.ask()
    realtime, promoted, later = desk.ask(), batch(desk, replayable=True), batch(desk)
    desk.budgets[0].due = 5.0
    desk.tick(5.0)
    assert desk.order() == [running]
    desk.done(running)
    assert desk.order() == desk.promoted == [promoted]
    assert desk.budgets[0].promotions == 1
    desk.ask()  # waits, and takes nothing back: the floor is what it is
    assert desk.revoked == []
    desk.done(promoted)
    assert desk.order() == [realtime]
    assert later not in desk.granted


def test_c_without_realtime_it_is_a_promotion_too_when_the_budget_says_no() -> None:
    desk = Desk(launch(slots=2))
    desk.budgets[0].most = 0
    waiting = batch(desk)
    desk.budgets[0].due = 1.0
    desk.tick(1.0)
    assert desk.promoted == [waiting]


def test_c_what_the_budget_allows_anyway_is_no_promotion() -> None:
    desk = Desk(launch(slots=2))
    desk.budgets[0].most = 0
    waiting = batch(desk)
    desk.budgets[0].due, desk.budgets[0].most = 1.0, None
    desk.tick(1.0)
    assert desk.order() == [waiting]
    assert desk.promoted == []


def test_c_a_promoted_request_holds_what_is_free_and_no_more() -> None:
    desk = Desk(launch(slots=4))
    running = [desk.ask(), desk.ask(), desk.ask()]
    big = batch(desk, sequences=4)
    desk.budgets[0].due = 1.0
    desk.tick(1.0)
    assert desk.promoted == [big]
    assert desk.budgets[0].batch == 1
    for request in running:
        desk.done(request)
    for _ in range(3):
        desk.ask()
    assert len(desk.granted) == 4


def test_c_not_while_a_batch_prompt_is_being_processed() -> None:
    desk = Desk(launch(slots=2))
    desk.budgets[0].most = 0
    batch(desk)
    desk.budgets[0].due, desk.budgets[0].paced = 1.0, 2.0
    desk.tick(1.0)
    assert desk.promoted == []


def test_d_realtime_that_waits_takes_the_youngest_batch_back() -> None:
    desk = Desk(launch(slots=3))
    older, younger, fixed = batch(desk, replayable=True), batch(desk, replayable=True), batch(desk)
    realtime = desk.ask()
    assert desk.revoked == [younger]
    desk.again(younger)
    assert desk.order() == [older, fixed, realtime]
    desk.done(fixed)
    assert desk.order() == [older, realtime, younger]


def test_d_the_budget_is_told_which_batch_requests_an_engine_has_done() -> None:
    desk = Desk(launch(slots=3))
    oldest, failed, youngest = (batch(desk, replayable=True) for _ in range(3))
    desk.ask()
    assert desk.revoked == [youngest]
    desk.again(youngest)
    desk.done(oldest)
    desk.admission.done(failed, desk.now, "unworked")
    budget = desk.budgets[0]
    assert len(budget.of("batch_ended")) == 3
    assert budget.of("batch_worked") == [budget.of("batch_ended")[1][:1]]


def test_d_an_answer_that_shrinks_the_budget_takes_batch_back() -> None:
    desk = Desk(launch(slots=3))
    older, younger, realtime = batch(desk, replayable=True), batch(desk, replayable=True), desk.ask()
    desk.budgets[0].too_many = 1
    desk.begin(realtime)
    assert desk.revoked == [younger]
    desk.begin(older)
    assert desk.revoked == [younger]


def test_d_not_more_is_taken_back_than_is_needed() -> None:
    desk = Desk(launch(slots=4))
    running = [batch(desk, replayable=True) for _ in range(4)]
    desk.ask(sequences=2)
    assert desk.revoked == running[:1:-1]
    desk.again(running[3])
    desk.ask()
    assert desk.revoked == [running[3], running[2], running[1]]


def test_d_it_goes_where_it_is_shortest_among_replicas() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1))
    first, second = batch(desk, replayable=True), batch(desk, replayable=True)
    one = desk.ask()
    assert desk.revoked == [second]
    desk.again(second)
    assert desk.granted == {first: "a", one: "b"}


def test_d_after_its_first_byte_or_without_leave_nothing_is_taken_back() -> None:
    desk = Desk(launch(slots=2))
    begun = batch(desk, replayable=True)
    batch(desk)
    desk.begin(begun)
    desk.begin(begun)
    desk.ask()
    assert desk.revoked == []
    assert desk.budgets[0].of("batch_began") == [(begun, 0.0)]


def test_d_what_was_taken_back_often_enough_stays() -> None:
    desk = Desk(launch(slots=1))
    request = batch(desk, replayable=True)
    for _ in range(MAX_TAKEN_BACK):
        realtime = desk.ask()
        desk.again(request)
        assert desk.order() == [realtime]
        desk.done(realtime)
        assert desk.order() == [request]
    desk.ask()
    assert desk.revoked == [request] * MAX_TAKEN_BACK


@pytest.mark.parametrize("why", ["first byte", "kept", "done"])
def test_d_a_revocation_that_comes_too_late_changes_nothing(why: str) -> None:
    desk = Desk(launch(slots=1))
    request = batch(desk, replayable=True)
    desk.ask()
    assert desk.revoked == [request]
    if why == "first byte":
        desk.begin(request)
    elif why == "kept":
        desk.admission.kept(request)
    else:
        desk.done(request)
        desk.admission.kept(request)
        return
    desk.ask()
    assert desk.revoked == [request]
    assert desk.order() == [request]


def test_d_a_budget_that_shrinks_takes_back_what_is_too_much() -> None:
    desk = Desk(launch(slots=4))
    running = [batch(desk, replayable=True) for _ in range(3)]
    desk.budgets[0].too_many = 2
    desk.ask()
    assert desk.revoked == [running[2], running[1]]
    desk.tick(1.0)  # these are on their way already
    assert desk.revoked == [running[2], running[1]]
    desk.budgets[0].too_many = 3
    desk.admission.signals("a", SIGNALS, 1.0)
    desk.take()
    assert desk.revoked == running[::-1]
    assert desk.budgets[0].of("signals") == [(SIGNALS, 1.0)]
    desk.admission.signals("nobody", SIGNALS, 1.0)


def test_what_comes_again_keeps_its_place_and_its_age() -> None:
    desk = Desk(launch(slots=1))
    request = batch(desk, replayable=True)
    following = batch(desk)
    desk.now = 10.0
    realtime = desk.ask()
    desk.again(request)
    desk.now = 30.0
    desk.expire(following)
    desk.done(realtime)
    assert desk.order() == [request]
    desk.now = 31.0
    desk.done(request)
    assert desk.budgets[0].batch == 0


def test_the_budget_hears_each_event_once() -> None:
    desk = Desk(launch(slots=1))
    budget = desk.budgets[0]
    realtime = desk.ask(prompt_tokens=7)
    waiting = batch(desk, prompt_tokens=9)
    batch(desk)
    desk.now = 2.0
    desk.begin(realtime)
    desk.done(realtime)
    desk.begin(waiting, streamed=False)
    desk.now = 3.0
    desk.done(waiting)
    assert budget.told == [
        ("realtime_arrived", 0.0),
        ("realtime_granted", 1, 7, 0.0),
        ("batch_waits", True, 0.0),
        ("realtime_began", 2.0, 2.0),
        ("realtime_ended", 1, 2.0),
        ("batch_granted", waiting, 1, 9, 2.0),
        ("batch_ended", waiting, 1, 3.0),
        ("batch_worked", waiting),
        ("batch_waits", False, 3.0),
        ("batch_granted", waiting + 1, 1, 0, 3.0),
    ]


def test_budgets_of_what_can_be_routed_to_are_reported() -> None:
    desk = Desk(launch("a", slots=3), launch("b", slots=1), launch("c", routable=False, state="bootstrapping"))
    desk.eject("b")
    batch(desk)
    ((name, report),) = desk.admission.budgets(0.0).items()
    assert (name, report.slots, report.batch_sequences) == ("a", 3, 1)


def test_an_ejected_launch_is_not_chosen_until_it_is_back() -> None:
    desk = Desk(launch("a", slots=2), launch("b", slots=2))
    instance = desk.eject("a")
    assert instance is not None
    assert instance.launch_id == "a"
    assert desk.eject("a") is None
    assert desk.eject("nobody") is None
    first, second = desk.ask(), desk.ask()
    assert desk.granted == {first: "b", second: "b"}
    third = desk.ask()
    desk.readmit("a")
    desk.readmit("a")
    desk.readmit("nobody")
    assert desk.granted[third] == "a"
    assert desk.ask(ByLaunch("a")) in desk.granted


def test_a_launch_announced_the_same_stays_ejected_and_another_engine_does_not() -> None:
    desk = Desk(launch(slots=2))
    desk.eject("a")
    desk.say(launch(slots=2))
    assert desk.refusal().retry_after == 5
    desk.say(launch(slots=2, routable=False, state="bootstrapping"))
    desk.say(launch(slots=2))
    assert desk.ask(ByModel("m")) in desk.granted


def test_an_engine_that_comes_back_with_other_slots_has_another_budget() -> None:
    desk = Desk(launch(slots=2))
    desk.say(launch(slots=5))
    assert desk.budgets[0].slots == 5
    requests = [desk.ask(cls="batch") for _ in range(6)]
    assert desk.order() == requests[:5]


def test_d_who_waits_is_counted_anew_when_launches_change() -> None:
    desk = Desk(launch("a", slots=4))
    batch = [desk.ask(cls="batch", replayable=True) for _ in range(4)]
    desk.ask(sequences=2)
    assert desk.revoked == [batch[3], batch[2]]
    desk.say(launch("b", slots=1, names=("n",)))
    desk.ask()
    assert desk.revoked == [batch[3], batch[2], batch[1]]
