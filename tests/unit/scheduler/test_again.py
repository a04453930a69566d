"""Requests that had a place and ask for another."""

from __future__ import annotations

import pytest

from tests.support.desk import MODEL, Desk, launch
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import Draining, LaunchNotReady, ModelNotFound, TooManyRequests, Unavailable
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Ticket, Usage

KEY = Principal("key", frozenset({"realtime"}), requests_per_minute=1, max_parallel=1, tokens_per_minute=100)


def test_a_request_whose_engine_cannot_be_reached_goes_to_a_replica() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1))
    request = desk.ask()
    desk.eject("a")
    desk.again(request)
    assert desk.granted == {request: "b"}


def test_it_waits_for_a_busy_replica_and_is_the_next_there() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1))
    moved, running = desk.ask(), desk.ask(cls="batch", replayable=True)
    desk.ask(cls="batch")
    desk.eject("a")
    desk.again(moved)
    assert desk.revoked == [running]
    desk.again(running)
    assert desk.granted == {moved: "b"}


@pytest.mark.parametrize("target", [MODEL, ByLaunch("a")])
def test_without_a_replica_it_is_refused_and_over(target: object) -> None:
    desk = Desk(launch(slots=1))
    request = desk.ask(target, principal=KEY, prompt_tokens=60)
    desk.eject("a")
    with pytest.raises(Unavailable, match="does not respond") as refused:
        desk.again(request)
    assert refused.value.retry_after == 5
    desk.readmit("a")
    assert desk.admission.limits.parallel("key") == 0
    assert isinstance(desk.refusal(target, principal=KEY), TooManyRequests)  # its request counts, its tokens do not
    state = desk.admission.limits.rate(KEY, 0.0)
    assert state is not None
    assert state.tokens is not None
    assert state.tokens.remaining == 100


def test_it_is_counted_against_limits_once() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1))
    request = desk.ask(principal=KEY, prompt_tokens=60)
    desk.eject("a")
    desk.again(request)
    desk.admission.settle(request, Usage(10, 10, 5), 0.0)
    state = desk.admission.limits.rate(KEY, 0.0)
    assert state is not None
    assert state.tokens is not None
    assert state.tokens.remaining == 80
    desk.done(request)
    desk.admission.settle(request, Usage(50, 50), 0.0)
    assert desk.admission.limits.parallel("key") == 0


def test_not_while_the_daemon_drains() -> None:
    desk = Desk(launch(slots=1))
    request = desk.ask(cls="batch", replayable=True)
    desk.admission.drain(0.0)
    with pytest.raises(Draining):
        desk.again(request)
    assert desk.admission.queues()["m"].in_flight == {"realtime": 0, "batch": 0}


def test_the_place_it_leaves_goes_to_the_next() -> None:
    desk = Desk(launch(slots=1))
    request = desk.ask(cls="batch", replayable=True)
    realtime = desk.ask()
    desk.again(request)
    assert desk.order() == [realtime]


def test_the_place_of_one_that_nobody_serves_any_more_goes_to_the_next() -> None:
    desk = Desk(launch(slots=1, names=("m", "n")))
    request, waiting = desk.ask(cls="batch", replayable=True), desk.ask(ByModel("n"))
    desk.say(launch(slots=1, names=("n",)))
    with pytest.raises(ModelNotFound):
        desk.again(request)
    assert desk.order() == [waiting]


def test_the_place_it_leaves_for_another_launch_goes_to_the_next_there() -> None:
    desk = Desk(launch("a", slots=1, names=("m", "n")))
    request, waiting = desk.ask(cls="batch", replayable=True), desk.ask(ByModel("n"))
    desk.say(launch("b", slots=1))
    desk.say(launch("a", slots=1, names=("n",)))
    desk.again(request)
    assert desk.granted == {request: "b", waiting: "a"}


def test_it_goes_where_its_model_is_now_and_not_where_it_was_when_it_came() -> None:
    desk = Desk(launch("a"))
    request = desk.ask()
    desk.say(launch("b"))
    desk.say(launch("b", state="stopped", routable=False))
    desk.say(launch("c"))
    desk.eject("a")
    desk.again(request)
    assert desk.granted == {request: "c"}


def test_one_that_stays_although_it_was_taken_back_is_not_counted_on_any_more() -> None:
    desk = Desk(launch(slots=2))
    older, younger = (desk.ask(cls="batch", replayable=True) for _ in range(2))
    desk.ask()
    assert desk.revoked == [younger]
    desk.admission.kept(younger)
    desk.take()
    assert desk.revoked == [younger, older], "who waits needs another place"


def test_one_that_begins_although_it_was_taken_back_is_not_counted_on_any_more() -> None:
    desk = Desk(launch(slots=2))
    older, younger = (desk.ask(cls="batch", replayable=True) for _ in range(2))
    desk.ask()
    assert desk.revoked == [younger]
    desk.begin(younger)
    assert desk.revoked == [younger, older]
    desk.admission.kept(younger)
    desk.take()
    assert desk.revoked == [younger, older]


def test_a_place_that_is_lost_with_its_launch_is_made_elsewhere() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1))
    there, here = (desk.ask(cls="batch", replayable=True) for _ in range(2))
    assert desk.granted == {there: "a", here: "b"}
    desk.ask()
    assert desk.revoked == [here]
    desk.say(launch("b", state="stopping", routable=False))
    assert desk.revoked == [here, there]


def test_nothing_is_taken_back_for_nobody() -> None:
    desk = Desk(launch(slots=4))
    for _ in range(4):
        desk.ask(cls="batch", replayable=True)
    desk.budgets[0].too_many = 1
    desk.tick(1.0)
    (revoked,) = desk.revoked
    desk.budgets[0].too_many = 0
    desk.say(launch(slots=1))
    desk.begin(revoked)
    assert desk.revoked == [revoked]


def test_an_ejected_launch_refuses_what_only_it_can_serve_and_keeps_what_runs() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=1, names=("n",)))
    running, waiting = desk.ask(), desk.ask()
    desk.eject("a")
    assert isinstance(desk.rejected[waiting], Unavailable)
    assert desk.rejected[waiting].retry_after is not None
    assert desk.order() == [running]
    desk.done(running)
    assert isinstance(desk.refusal(ByLaunch("a")), Unavailable)
    desk.say(launch("a", state="stopping", routable=False))
    assert isinstance(desk.refusal(ByLaunch("a")), LaunchNotReady)


def test_the_time_it_had_a_place_is_no_waiting() -> None:
    desk = Desk(launch(slots=1))
    blocker = desk.ask()
    request = desk.ask(cls="batch", replayable=True)
    desk.now = 10.0
    desk.done(blocker)
    desk.now = 100.0
    desk.ask()
    desk.again(request)
    desk.now = 105.0
    desk.expire(request)
    assert "within 15 s" in desk.rejected[request].message
    assert "realtime and earlier requests came first" in desk.rejected[request].message


def test_an_answer_that_has_begun_lets_the_next_batch_prompt_in() -> None:
    desk = Desk(launch(slots=2))
    first = desk.ask(cls="batch")
    desk.budgets[0].most = 1
    second = desk.ask(cls="batch")
    desk.budgets[0].most = 2
    desk.begin(first)
    assert desk.order() == [first, second]
    desk.admission.began(99, 0.0, streamed=True)


def test_who_is_asked_about_a_request() -> None:
    desk = Desk(launch(slots=1, names=("m", "n")))
    request = desk.ask(ByLaunch("a"))
    assert desk.admission.model_of(request) == "m"
    assert desk.admission.serves("n")
    assert not desk.admission.serves("a")
    assert desk.admission.request(99, MODEL, Ticket("x"), 0.0) is None
    assert desk.admission.batch_waiting == 0
