"""Requests for models that nothing serves yet: who waits, who asks, who is told what."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.desk import Desk, launch
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import (
    ApiError,
    Draining,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    NotFound,
    QueueFull,
    TooManyRequests,
    Unavailable,
)
from vllm_bootstrap.scheduler.ports import Demand, NoProspects
from vllm_bootstrap.scheduler.refusals import loading
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Ticket


class Prospects(NoProspects):
    """What may be loaded: name to base. Keeps who asked."""

    def __init__(self, **bases: str) -> None:
        self.bases = bases
        self.refusals: dict[str, ApiError] = {}
        self.asks: list[tuple[str, str, bool]] = []
        self.ready: float | None = None
        self.obstacle: str | None = None

    def base_of(self, name: str) -> str | None:
        return self.bases.get(name)

    def refusal(self, name: str) -> ApiError | None:
        return self.refusals.get(name)

    def asked(self, name: str, cls: str, *, comes_back: bool) -> None:
        self.asks.append((name, cls, comes_back))

    def ready_in_s(self, name: str) -> float | None:
        return self.ready

    def waits_for(self, name: str) -> str | None:
        return self.obstacle


def cold(**options: Any) -> tuple[Desk, Prospects]:
    prospects = Prospects(m="base", other="base2")
    return Desk(prospects=prospects, **options), prospects


def test_without_prospects_an_unknown_model_is_not_found() -> None:
    nothing = NoProspects()
    nothing.asked("m", "realtime", comes_back=True)
    assert (nothing.base_of("m"), nothing.refusal("m"), nothing.ready_in_s("m"), nothing.waits_for("m")) == (None,) * 4
    assert isinstance(Desk().refusal(), ModelNotFound)


def test_9_it_waits_for_a_model_that_may_be_loaded_and_gets_the_place_when_it_is() -> None:
    desk, prospects = cold()
    first, second = desk.ask(), desk.ask(cls="batch")
    assert prospects.asks == [("m", "realtime", False), ("m", "batch", False)]
    assert not desk.granted
    assert not desk.rejected
    assert not desk.admission.is_served(first)
    desk.say(launch(state="bootstrapping", routable=False))
    assert not desk.granted
    desk.say(launch(slots=2))
    assert desk.granted == {first: "a", second: "a"}


def test_what_is_asked_for_by_id_does_not_wait() -> None:
    desk, _ = cold()
    assert type(desk.refusal(ByLaunch("m"))) is NotFound


def test_5_who_must_not_be_held_is_refused_at_once_and_comes_back() -> None:
    desk, prospects = cold()
    prospects.ready = 12.3
    with pytest.raises(ModelLoading) as refused:
        desk.admission.request(1, ByModel("m"), Ticket("me"), 0.0, may_be_held=False)
    assert refused.value.retry_after == 13
    assert "is being loaded" in refused.value.message
    assert prospects.asks == [("m", "realtime", True)]
    assert desk.admission.demand() == {}


def test_the_hold_ends_with_a_refusal_that_says_what_it_waited_for() -> None:
    desk, prospects = cold()
    prospects.obstacle = "'big' is in use"
    waiting = desk.ask()
    desk.now = 30.0
    desk.expire(waiting)
    error = desk.rejected[waiting]
    assert isinstance(error, ModelLoading)
    assert error.retry_after == 5
    assert "is not loaded yet: 'big' is in use. This request was held for 30 s" in error.message
    assert prospects.asks[-1] == ("m", "realtime", True)


@pytest.mark.parametrize(
    ("held_s", "said"),
    [
        (None, None), (0.0, None), (0.001, None), (0.06, "0.1 s"), (0.32, "0.3 s"), (1.0, "1.0 s"), (30.02, "30 s"),
        (86_400.2, "86400 s"),
    ],
)  # fmt: skip
def test_nobody_is_told_to_have_been_held_who_was_not(held_s: float | None, said: str | None) -> None:
    message = loading("m", NoProspects(), held_s).message
    held = f" This request was held for {said}." if said else ""
    assert message == f"The model 'm' is being loaded.{held} Send it again later"


def test_one_that_waited_for_its_turn_is_told_so() -> None:
    desk, _ = cold()
    waiting = [desk.ask(), desk.ask()]
    desk.say(launch(slots=1))
    desk.now = 300.0
    desk.expire(waiting[1])
    error = desk.rejected[waiting[1]]
    assert type(error) is Unavailable


def test_3_after_a_failed_load_nobody_waits() -> None:
    desk, prospects = cold()
    waiting, elsewhere = desk.ask(), desk.ask(ByModel("other"))
    error = ModelFailed("no", retry_after=7)
    desk.admission.refuse("m", error, desk.now)
    desk.take()
    assert desk.rejected == {waiting: error}
    prospects.refusals["m"] = error
    assert desk.refusal() is error
    desk.cancel(elsewhere)
    assert desk.admission.demand() == {}


def test_refusing_does_not_touch_those_whom_an_engine_serves() -> None:
    desk, _ = cold()
    desk.say(launch(slots=1))
    running, waiting = desk.ask(), desk.ask()
    desk.admission.refuse("m", ModelFailed("no"), desk.now)
    desk.take()
    assert not desk.rejected
    desk.done(running)
    assert waiting in desk.granted


def test_4_limits_come_before_anything_is_loaded() -> None:
    desk, prospects = cold()
    key = Principal("k", frozenset({"realtime"}), requests_per_minute=1)
    desk.ask(principal=key)
    assert isinstance(desk.refusal(principal=key), TooManyRequests)
    assert len(prospects.asks) == 1


@pytest.mark.parametrize("globs", [("x",), ("m",), ("base",)])
def test_2_a_key_that_may_not_use_it_cannot_have_it_loaded(globs: tuple[str, ...]) -> None:
    desk, prospects = cold()
    assert isinstance(desk.refusal(principal=Principal("k", frozenset({"realtime"}), models=globs)), ModelNotFound)
    assert not prospects.asks


def test_a_key_that_may_use_name_and_base_waits() -> None:
    desk, _ = cold()
    waiting = desk.ask(principal=Principal("k", frozenset({"realtime"}), models=("m", "base")))
    desk.say(launch())
    assert waiting in desk.granted


def test_8_the_queue_of_a_cold_model_is_bounded() -> None:
    desk, _ = cold(max_queued=2)
    desk.ask(cls="batch")
    batch = desk.ask(cls="batch")
    desk.ask()
    assert isinstance(desk.rejected[batch], QueueFull)
    desk.ask()
    assert isinstance(desk.refusal(), QueueFull)


def test_1_draining_ends_the_wait() -> None:
    desk, _ = cold()
    waiting = desk.ask()
    desk.admission.drain(desk.now)
    desk.take()
    assert isinstance(desk.rejected[waiting], Draining)


def test_an_engine_that_lacks_the_route_would_lack_it_after_a_load() -> None:
    desk, _ = cold()
    desk.say(launch())
    assert type(desk.refusal(ByModel("m", ("POST", "/v1/embeddings")))) is NotFound


def test_one_that_waits_for_another_route_of_a_cold_model_is_refused_when_the_engine_lacks_it() -> None:
    desk, _ = cold()
    waiting = desk.ask(ByModel("m", ("POST", "/v1/embeddings")))
    desk.say(launch())
    assert type(desk.rejected[waiting]) is NotFound


def test_the_wait_ends_when_the_catalogue_forgets_the_model() -> None:
    desk, prospects = cold()
    waiting = desk.ask()
    del prospects.bases["m"]
    desk.admission.prospects_changed(desk.now)
    desk.take()
    assert isinstance(desk.rejected[waiting], ModelNotFound)


def test_it_goes_on_waiting_when_its_engine_ends_before_its_turn() -> None:
    desk, _ = cold()
    desk.say(launch(slots=1))
    running, waiting = desk.ask(), desk.ask()
    desk.say(launch(state="failed", routable=False))
    assert not desk.rejected
    desk.done(running)
    desk.say(launch("b", slots=1))
    assert desk.granted == {waiting: "b"}


def test_a_retired_launch_gets_nothing_new_and_what_waits_waits_on() -> None:
    desk, _ = cold()
    desk.say(launch(slots=2))
    running = desk.ask()
    desk.admission.retire("a", desk.now)
    desk.admission.retire("a", desk.now)
    waiting = desk.ask()
    assert desk.admission.is_retired("a")
    assert waiting not in desk.granted
    assert desk.admission.demand()["m"] == Demand(1, 0, 0.0, None, False)
    desk.done(running)
    assert waiting not in desk.granted
    assert desk.admission.last_ends("a") == {"realtime": 0.0}
    desk.admission.restore("a", desk.now)
    desk.take()
    assert waiting in desk.granted
    assert not desk.admission.is_retired("a")


def test_a_launch_that_is_asked_for_by_id_is_not_there_while_it_is_retired() -> None:
    desk, _ = cold()
    desk.say(launch())
    desk.admission.retire("a", desk.now)
    assert isinstance(desk.refusal(ByLaunch("a")), Unavailable)
    desk.admission.retire("nobody", desk.now)


def test_a_new_engine_ends_a_retirement() -> None:
    desk, _ = cold()
    desk.say(launch())
    desk.admission.retire("a", desk.now)
    desk.say(launch(state="asleep", routable=False))
    desk.say(launch())
    assert desk.ask() in desk.granted


def test_demand_by_model_with_its_oldest_waiters() -> None:
    desk, _ = cold()
    desk.ask()
    desk.now = 2.0
    desk.ask(owner="you")
    desk.ask(cls="batch")
    desk.now = 3.0
    desk.ask(principal=Principal("k", frozenset({"realtime"}), models=("*",)), cls="batch")
    desk.ask(ByModel("other"))
    demand = desk.admission.demand()
    assert demand == {"m": Demand(2, 2, 0.0, 2.0, False), "other": Demand(1, 0, 3.0, None, False)}
    assert sorted(desk.admission.queues()) == ["m", "other"]
    assert desk.admission.queues()["m"].queued == {"realtime": 2, "batch": 2}


def test_what_needs_no_slot_is_refused_while_its_model_is_loaded() -> None:
    desk, _ = cold()
    with pytest.raises(ModelLoading):
        desk.admission.instance(ByModel("m"), None)
    desk.ask()
    with pytest.raises(ModelLoading):
        desk.admission.instance(ByModel("m"), None)


def test_the_books_of_a_cold_model_go_when_nobody_waits() -> None:
    desk, _ = cold()
    waiting = desk.ask()
    desk.cancel(waiting)
    desk.say(launch(names=("x",)))
    assert not desk.admission.serves("m")
    assert desk.admission.last_ends("nobody") == {}
    assert not desk.admission.is_retired("nobody")


def test_one_that_loses_its_engine_waits_for_the_next_load() -> None:
    desk, _ = cold()
    desk.say(launch())
    lost = desk.ask()
    desk.admission.eject("a", desk.now)
    desk.again(lost)
    assert not desk.rejected
    desk.admission.readmit("a", desk.now)
    desk.take()
    assert lost in desk.granted


class AnyName(Prospects):
    """Whatever is asked for may be loaded."""

    def base_of(self, name: str) -> str | None:
        return name


@pytest.mark.parametrize("end", ["not held", "over its limit", "gone", "expired", "refused", "too large"])
def test_names_that_nobody_waits_for_leave_nothing_behind(end: str) -> None:
    desk = Desk(prospects=AnyName(), max_queued_bytes=10)
    desk.say(launch(names=("n1",), state="bootstrapping", routable=False))
    key = Principal("k", frozenset({"realtime"}), requests_per_minute=1 if end == "over its limit" else None)
    if end == "over its limit":
        desk.admission.request(1000, ByModel("n1000"), Ticket("k", principal=key), 0.0)
        desk.admission.cancel(1000, 0.0)
    for number in range(1, 50):
        name, ticket = f"n{number}", Ticket("k", principal=key, body_bytes=20 if end == "too large" else 0)
        try:
            desk.admission.request(number, ByModel(name), ticket, 0.0, may_be_held=end != "not held")
        except ApiError:
            continue
        if end == "gone":
            desk.admission.cancel(number, 1.0)
        elif end == "expired":
            desk.admission.expire(number, 1.0)
        else:
            desk.admission.refuse(name, ModelFailed("it cannot"), 1.0)
    assert not list(desk.admission._directory.lanes())
    assert [name for name in ("n1", "n2", "n49") if desk.admission.serves(name)] == ["n1"]
    desk.admission.forget("a", 2.0)
    assert desk.admission.queues() == {}


def test_who_has_a_place_is_no_demand() -> None:
    desk = Desk(launch(slots=1))
    desk.ask()
    assert desk.admission.demand() == {}
    desk.ask()
    assert desk.admission.demand()["m"].served
