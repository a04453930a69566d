from __future__ import annotations

import itertools

import pytest

from tests.support.desk import MODEL, Desk, launch
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import (
    ApiError,
    ConcurrencyLimit,
    Draining,
    LaunchNotReady,
    ModelLoading,
    ModelNotFound,
    NotFound,
    QueueFull,
    Unavailable,
)
from vllm_bootstrap.scheduler.admission import Admission
from vllm_bootstrap.scheduler.budget import Budget, BudgetPolicy
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Ending
from vllm_bootstrap.serving import LoadReport


def test_1_a_draining_daemon_refuses_and_empties_its_queues() -> None:
    desk = Desk(launch(slots=1))
    first, second = desk.ask(), desk.ask()
    desk.admission.drain(desk.now)
    desk.take()
    assert isinstance(desk.rejected[second], Draining)
    assert isinstance(desk.refusal(), Draining)
    desk.done(first)
    assert desk.granted == {}


def test_without_settings_a_launch_keeps_the_reserve_and_the_slots_that_a_budget_has_by_default() -> None:
    admission = Admission(max_queued=1)
    admission.update(launch(slots=64), 0.0)
    report, budget = admission.budgets(0.0)["a"], Budget(BudgetPolicy(), 64).report(0.0)
    assert report == budget
    assert 0 < report.reserve < report.slots == 64


@pytest.mark.parametrize("target", [ByModel("unknown"), ByModel("")])
def test_2_an_unknown_model(target: ByModel) -> None:
    error = Desk(launch()).refusal(target)
    assert isinstance(error, ModelNotFound)
    assert error.param == "model"


def test_2_an_unknown_id() -> None:
    error = Desk(launch()).refusal(ByLaunch("nobody"))
    assert type(error) is NotFound


def test_2_ended_launches_serve_nothing() -> None:
    desk = Desk(launch(state="failed", routable=False), ended=lambda one: one == "long-ago")
    assert isinstance(desk.refusal(), ModelNotFound)
    for target in (ByLaunch("a"), ByLaunch("long-ago")):
        error = desk.refusal(target)
        assert isinstance(error, LaunchNotReady)
        assert error.should_retry is False
        assert error.retry_after is None


def test_2_a_model_hidden_from_a_key_does_not_exist_for_it() -> None:
    desk = Desk(launch(base="secret/base"))
    for globs in (("other*",), ("m",), ("secret/*",)):
        narrow = Principal("narrow", frozenset({"realtime"}), models=globs)
        assert isinstance(desk.refusal(principal=narrow), ModelNotFound)
        assert type(desk.refusal(ByLaunch("a"), principal=narrow)) is NotFound
    wide = Principal("wide", frozenset({"realtime"}), models=("m", "secret/*"))
    assert desk.ask(principal=wide) in desk.granted
    assert desk.ask(ByLaunch("a"), principal=wide) in desk.granted


@pytest.mark.parametrize(
    ("state", "by_model", "by_launch"),
    [("bootstrapping", ModelLoading, LaunchNotReady), ("stopping", Draining, LaunchNotReady),
     ("falling_asleep", ModelLoading, LaunchNotReady), ("waking", ModelLoading, LaunchNotReady),
     ("ready", Unavailable, Unavailable)],
)  # fmt: skip
def test_3_known_but_not_routable(state: str, by_model: type[ApiError], by_launch: type[ApiError]) -> None:
    desk = Desk(launch(state=state, routable=False, retry=17.2))
    for target, kind in ((MODEL, by_model), (ByLaunch("a"), by_launch)):
        error = desk.refusal(target)
        assert type(error) is kind
        assert error.retry_after == 18
        assert error.should_retry is not False


def test_3_one_that_sleeps_is_not_woken_by_asking_for_its_launch() -> None:
    desk = Desk(launch(state="asleep", routable=False))
    assert type(desk.refusal()) is ModelLoading
    refused = desk.refusal(ByLaunch("a"))
    assert type(refused) is LaunchNotReady
    assert "is asleep" in refused.message
    assert refused.should_retry is False


def test_3_without_an_eta_a_default_is_told() -> None:
    desk = Desk(launch(state="bootstrapping", routable=False))
    assert desk.refusal().retry_after == 5
    assert desk.refusal(ByLaunch("a")).retry_after == 5


def test_3_a_route_the_engine_lacks() -> None:
    desk = Desk(launch())
    assert type(desk.refusal(ByModel("m", ("POST", "/v1/embeddings")))) is NotFound
    assert desk.ask(ByModel("m", ("POST", "/v1/chat/completions"))) in desk.granted


def test_4_limits_of_the_key() -> None:
    one = Principal("one", frozenset({"realtime"}), max_parallel=1)
    desk = Desk(launch())
    request = desk.ask(principal=one)
    assert isinstance(desk.refusal(principal=one), ConcurrencyLimit)
    desk.done(request)
    desk.ask(principal=one)


def test_4_a_full_queue_costs_the_key_nothing() -> None:
    rated = Principal("rated", frozenset({"realtime"}), requests_per_minute=1)
    desk = Desk(launch(slots=1), max_queued=1)
    desk.ask()
    desk.ask()
    assert isinstance(desk.refusal(principal=rated), QueueFull)
    state = desk.admission.rate(rated, 0.0)
    assert state is not None
    assert state.requests is not None
    assert state.requests.remaining == 1


def test_6_free_slots_are_granted_least_outstanding_first() -> None:
    desk = Desk(launch("a", slots=3), launch("b", slots=3))
    for _ in range(6):
        desk.ask()
    assert list(desk.granted.values()) == ["a", "b", "a", "b", "a", "b"]


def test_6_sequences_count_as_slots() -> None:
    desk = Desk(launch(slots=4))
    big = desk.ask(sequences=3)
    small, waiting = desk.ask(sequences=1), desk.ask(sequences=1)
    assert desk.order() == [big, small]
    desk.done(big)
    assert desk.order() == [small, waiting]


def test_6_a_request_larger_than_the_launch_takes_all_of_it() -> None:
    desk = Desk(launch(slots=2))
    small = desk.ask()
    huge = desk.ask(sequences=1000)
    assert desk.order() == [small]
    desk.done(small)
    assert desk.order() == [huge]


def test_8_a_full_queue() -> None:
    desk = Desk(launch(slots=1), max_queued=2)
    for _ in range(3):
        desk.ask()
    error = desk.refusal()
    assert isinstance(error, QueueFull)
    assert error.retry_after == 5  # nothing has finished yet, so nothing is known


def test_8_retry_after_is_what_the_queue_has_needed_lately() -> None:
    desk = Desk(launch(slots=1), max_queued=40)
    for second in range(20):  # one request a second goes through
        desk.now = float(second)
        request = desk.ask()
        desk.done(request)
    for _ in range(41):
        desk.ask()
    desk.now = 20.0
    assert desk.refusal().retry_after == 40
    desk.now = 200.0  # that was long ago
    assert desk.refusal().retry_after == 5


@pytest.mark.parametrize("ending", ["cut", "unworked"])
def test_8_what_has_not_finished_says_nothing_about_the_pace(ending: Ending) -> None:
    desk = Desk(launch(slots=40), max_queued=40)
    for second in range(20):
        desk.now = float(second)
        desk.done(desk.ask())
    running = [desk.ask() for _ in range(40)]
    for _ in range(40):
        desk.ask()
    desk.now = 20.0
    before = desk.refusal().retry_after
    for request in running[:39]:
        desk.done(request, ending)
        desk.ask()
    assert desk.refusal().retry_after == before == 40


def test_what_an_engine_has_cut_off_has_cost_its_tokens() -> None:
    key = Principal("key", frozenset({"realtime"}), tokens_per_minute=100)
    desk = Desk(launch(slots=4))
    for ending, left in (("finished", 90), ("cut", 80), ("unworked", 80)):
        desk.done(desk.ask(principal=key, prompt_tokens=6, output_tokens=4), ending)
        rate = desk.admission.limits.rate(key, desk.now)
        assert rate is not None
        assert rate.tokens is not None
        assert rate.tokens.remaining == left


def test_9_realtime_goes_before_batch_and_each_class_in_order() -> None:
    desk = Desk(launch(slots=1))
    running = desk.ask()
    batch = [desk.ask(cls="batch") for _ in range(2)]
    realtime = [desk.ask() for _ in range(2)]
    for request, following in itertools.pairwise([running, *realtime, *batch]):
        assert desk.order() == [request]
        desk.done(request)
        assert desk.order() == [following]


def test_a_waiting_realtime_request_is_not_passed_by_a_smaller_batch_one() -> None:
    desk = Desk(launch(slots=4))
    running = desk.ask(sequences=3)
    big = desk.ask(sequences=4)
    desk.ask(cls="batch")
    assert desk.order() == [running]
    desk.done(running)
    assert desk.order() == [big]


def test_an_arriving_realtime_request_passes_waiting_batch_that_does_not_fit() -> None:
    desk = Desk(launch(slots=4))
    running = desk.ask(sequences=3)
    desk.ask(cls="batch", sequences=4)
    realtime = desk.ask()
    assert desk.order() == [running, realtime]


def test_an_arriving_request_does_not_pass_its_own_class() -> None:
    desk = Desk(launch(slots=4))
    running = desk.ask(sequences=3)
    desk.ask(sequences=4)
    desk.ask()
    assert desk.order() == [running]


def test_a_request_for_one_launch_waits_for_that_launch() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1))
    first = desk.ask(ByLaunch("a"))
    pinned = desk.ask(ByLaunch("a"))
    free = desk.ask()
    assert desk.granted == {first: "a", free: "b"}
    desk.done(free)
    assert desk.granted == {first: "a"}
    desk.done(first)
    assert desk.granted == {pinned: "a"}


def test_a_free_launch_takes_what_waits_behind_a_request_pinned_elsewhere() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1))
    first, second = desk.ask(ByLaunch("a")), desk.ask(ByLaunch("b"))
    desk.ask(ByLaunch("a"))
    anywhere = desk.ask()
    desk.done(second)
    assert desk.granted == {first: "a", anywhere: "b"}


def test_a_group_id_stands_for_its_launches() -> None:
    desk = Desk(launch("a", group="g", slots=1), launch("b", group="g", slots=1))
    first, second, third = (desk.ask(ByLaunch("g")) for _ in range(3))
    assert desk.granted == {first: "a", second: "b"}
    desk.done(second)
    assert desk.granted == {first: "a", third: "b"}


def test_pinned_requests_count_in_their_models_queue() -> None:
    desk = Desk(launch(slots=1), max_queued=2)
    desk.ask()
    desk.ask(ByLaunch("a"))
    desk.ask()
    assert isinstance(desk.refusal(ByLaunch("a")), QueueFull)
    assert isinstance(desk.refusal(), QueueFull)


def test_a_request_waits_only_for_launches_its_key_may_use() -> None:
    mine = Principal("mine", frozenset({"realtime"}), models=("m", "mine/*"))
    desk = Desk(launch("a", slots=1, base="mine/x"), launch("b", slots=1, base="theirs/y"))
    first = desk.ask(principal=mine)
    waiting = desk.ask(principal=mine)
    other = desk.ask()
    assert desk.granted == {first: "a", other: "b"}
    desk.done(other)  # b is free, but not for this key
    assert desk.granted == {first: "a"}
    late = desk.ask()
    assert desk.granted == {first: "a", late: "b"}
    desk.done(first)
    assert desk.granted == {late: "b", waiting: "a"}


def test_a_launch_that_becomes_ready_takes_waiting_requests() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=2, state="bootstrapping", routable=False))
    first, second, third = desk.ask(), desk.ask(), desk.ask()
    desk.say(launch("b", slots=2))
    assert desk.granted == {first: "a", second: "b", third: "b"}


def test_waiting_requests_fail_over_or_are_told_when_a_launch_goes() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1))
    first, second = desk.ask(), desk.ask()
    pinned, anywhere = desk.ask(ByLaunch("a")), desk.ask()
    desk.say(launch("a", state="stopping", routable=False))
    assert isinstance(desk.rejected[pinned], LaunchNotReady)
    desk.done(second)
    assert desk.granted == {first: "a", anywhere: "b"}
    waiting = desk.ask()
    desk.say(launch("b", state="failed", routable=False))
    assert isinstance(desk.rejected[waiting], Draining)
    desk.done(first)
    desk.done(anywhere)
    assert desk.admission.load("a").in_flight == {"realtime": 0, "batch": 0}


def test_a_forgotten_launch() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1, names=("n",)))
    running, waiting = desk.ask(), desk.ask()
    other = desk.ask(ByModel("n"))
    desk.done(other)
    desk.admission.forget("a", 0.0)
    desk.take()
    assert isinstance(desk.rejected[waiting], ModelNotFound)
    desk.admission.forget("a", 0.0)
    desk.done(running)  # what still ran there may end
    assert desk.admission.load("a") == LoadReport({"realtime": 0, "batch": 0}, {"realtime": 0, "batch": 0})
    assert [advert.launch_id for advert in desk.admission.adverts()] == ["b"]


def test_a_cancelled_request_frees_what_it_held() -> None:
    desk = Desk(launch(slots=2))
    running = desk.ask(sequences=2)
    big, small = desk.ask(sequences=2), desk.ask()
    desk.cancel(big)
    desk.cancel(big)
    assert desk.order() == [running]
    desk.cancel(running)
    assert small in desk.granted


def test_cancelling_the_head_lets_smaller_ones_in() -> None:
    desk = Desk(launch(slots=2))
    desk.ask()
    big, small = desk.ask(sequences=2), desk.ask()
    assert small not in desk.granted
    desk.cancel(big)
    assert small in desk.granted


def test_the_head_that_expires_lets_smaller_ones_in() -> None:
    desk = Desk(launch(slots=2))
    desk.ask()
    big, small = desk.ask(sequences=2), desk.ask()
    desk.expire(big)
    assert big in desk.rejected
    assert small in desk.granted


def test_a_deadline_that_comes_while_waiting() -> None:
    desk = Desk(launch(slots=1))
    running, waiting, following = desk.ask(), desk.ask(sequences=5), desk.ask()
    desk.now = 30.0
    desk.expire(waiting)
    error = desk.rejected[waiting]
    assert type(error) is Unavailable
    assert "30 s" in error.message
    assert error.retry_after is not None
    desk.expire(running)
    desk.expire(waiting)
    desk.done(running)
    assert following in desk.granted


def test_done_is_idempotent_and_ignores_what_waits() -> None:
    desk = Desk(launch(slots=1))
    running, waiting = desk.ask(), desk.ask()
    desk.admission.done(waiting, 0.0)
    desk.done(running)
    desk.admission.done(running, 0.0)
    assert desk.order() == [waiting]


def test_fewer_slots_than_are_used() -> None:
    desk = Desk(launch(slots=3))
    requests = [desk.ask() for _ in range(4)]
    desk.say(launch(slots=1))
    desk.done(requests[0])
    desk.done(requests[1])
    assert desk.order() == [requests[2]]
    desk.done(requests[2])
    assert desk.order() == [requests[3]]


def test_reports() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1, names=("n", "alias")))
    desk.ask()
    desk.ask(cls="batch")
    desk.ask(ByLaunch("a"))
    desk.ask(ByModel("n"))
    desk.ask(ByModel("n"))
    assert desk.admission.load("a") == LoadReport({"realtime": 1, "batch": 0}, {"realtime": 1, "batch": 1})
    assert desk.admission.queues() == {
        "alias": LoadReport({"realtime": 0, "batch": 0}, {"realtime": 0, "batch": 0}),
        "m": LoadReport({"realtime": 1, "batch": 0}, {"realtime": 1, "batch": 1}),
        "n": LoadReport({"realtime": 1, "batch": 0}, {"realtime": 1, "batch": 0}),
    }


def test_requests_of_a_forgotten_model_are_still_reported_nowhere() -> None:
    desk = Desk(launch("a", slots=1))
    desk.ask()
    desk.admission.forget("a", 0.0)
    assert desk.admission.queues() == {}


def test_where_a_request_without_a_slot_goes() -> None:
    desk = Desk(launch("a", group="g", slots=1), launch("b", group="g", slots=1))
    desk.ask(ByLaunch("a"))
    nobody = None
    assert desk.admission.instance(ByLaunch("a"), nobody).launch_id == "a"
    assert desk.admission.instance(ByLaunch("g"), nobody).launch_id == "b"
    with pytest.raises(NotFound):
        desk.admission.instance(ByLaunch("c"), nobody)


def test_a_launch_that_serves_two_names_forgets_only_the_pace_of_its_own() -> None:
    desk = Desk(launch("a", names=("m", "x")), launch("b"))
    for name in ("m", "x"):
        desk.done(desk.ask(ByModel(name)))
    desk.admission.forget("a", 0.0)
    desk.take()
    assert list(desk.admission.queues()) == ["m"]
    assert not desk.admission.serves("x")


def test_a_launch_without_a_served_name() -> None:
    desk = Desk(launch(names=(), slots=1))
    first, second = desk.ask(ByLaunch("a")), desk.ask(ByLaunch("a"))
    assert desk.order() == [first]
    assert isinstance(desk.refusal(), ModelNotFound)
    desk.done(first)
    assert desk.order() == [second]


def test_batch_that_waits_is_known_until_it_waits_no_more() -> None:
    desk = Desk(launch(slots=1))
    running = desk.ask()
    desk.ask()
    _, second, third = (desk.ask(cls="batch") for _ in range(3))
    assert desk.admission.batch_waiting == 3
    desk.cancel(second)
    desk.expire(third)
    assert desk.admission.batch_waiting == 1
    desk.done(running)
    desk.done(desk.order()[0])
    assert desk.admission.batch_waiting == 0
