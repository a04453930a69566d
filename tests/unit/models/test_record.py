from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.launch_views import launch_view
from vllm_bootstrap.errors import ModelFailed
from vllm_bootstrap.models.orders import MODEL_LABEL, ORDER_LABEL
from vllm_bootstrap.models.record import (
    COMES_BACK_S,
    Record,
    Seen,
    by_model,
    is_outdated,
    others_serving,
    refusal,
    state_of,
)
from vllm_bootstrap.models.types import ModelEntry, ModelTrouble


def record(**fields: Any) -> Record:
    made = Record(ModelEntry("m", "org/m"), "print")
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("states", "found"),
    [
        ((), "unloaded"),
        (("stopping", "bootstrapping", "ready"), "loaded"),
        (("stopping", "asleep", "bootstrapping"), "loading"),
        (("stopping", "asleep"), "asleep"),
        (("stopping",), "changing"),
        (("waking",), "changing"),
        (("falling_asleep",), "changing"),
    ],
)
def test_what_launches_make_of_a_model(states: tuple[str, ...], found: str) -> None:
    assert state_of([launch_view(state=state) for state in states]) == found


def test_asking_lasts_and_is_remembered_from_the_first_time() -> None:
    one = record()
    assert one.asks("realtime", 0.0) is None
    one.ask("realtime", 10.0, 5.0)
    one.ask("realtime", 14.0, 5.0)
    one.ask("realtime", 15.0, 1.0)
    asked = one.asks("realtime", 18.9)
    assert asked is not None
    assert asked.since == 10.0
    assert one.asks("realtime", 19.0) is None
    one.ask("realtime", 30.0, 5.0)
    assert one.asked["realtime"].since == 30.0
    assert one.asks("batch", 30.0) is None


def test_once_loaded_an_operator_s_wish_is_fulfilled_and_who_comes_back_may_still_come() -> None:
    one = record()
    one.ask("realtime", 0.0, 3600.0)
    one.ask("batch", 0.0, COMES_BACK_S)
    one.loaded_for_whom(1.0)
    assert one.asks("realtime", 1.0) is None
    assert one.asks("batch", 1.0) is not None


def test_when_it_may_be_loaded() -> None:
    assert record().may_load(0.0)
    assert record(retry_at=5.0).may_load(5.0)
    assert not record(retry_at=5.0).may_load(4.9)
    assert not record(retry_at=math.inf).may_load(1e9)


def test_launches_by_model_and_those_of_others() -> None:
    mine, other = launch_view(labels={MODEL_LABEL: "m"}), launch_view(served_model_name="x")
    assert by_model([mine, other]) == {"m": [mine]}
    assert others_serving([mine, other]) == {"x"}


def test_an_engine_that_was_ordered_by_another_state_of_the_entry() -> None:
    current, old = launch_view(labels={ORDER_LABEL: "print"}), launch_view(labels={ORDER_LABEL: "older"})
    assert not is_outdated(record(), Seen((current,)))
    assert is_outdated(record(), Seen((current, old)))
    assert not is_outdated(record(), Seen())


def test_after_a_failure_requests_are_refused_until_the_next_load_is_due() -> None:
    trouble = ModelTrouble("bad_flag", "It does not know --x.", "Remove it.", 1.0, None, "l1")
    assert refusal(record(), 0.0) is None
    assert refusal(record(trouble=trouble, retry_at=5.0), 5.0) is None
    soon = refusal(record(trouble=trouble, retry_at=5.0), 1.5)
    assert isinstance(soon, ModelFailed)
    assert soon.retry_after == 4
    assert soon.should_retry is None
    assert soon.details == {"failure": {"class": "bad_flag", "hint": "Remove it.", "launch_id": "l1"}}
    assert soon.message == "The model 'm' cannot be used at present: It does not know --x. Remove it."
    never = refusal(record(trouble=trouble, retry_at=math.inf), 1.5)
    assert never is not None
    assert never.retry_after is None
    assert never.should_retry is False


def test_in_flight() -> None:
    assert Seen(running=2, running_batch=3).in_flight == 5


def test_a_record_stirs_while_somebody_may_want_the_model_or_something_is_done_with_it() -> None:
    assert not record().stirs(10.0)
    assert record(doing="loading").stirs(10.0)
    asked = record()
    asked.ask("batch", 10.0, 5.0)
    assert asked.stirs(14.0)
    assert not asked.stirs(15.0)
    preloaded = Record(ModelEntry("m", "org/m", preload=True), "print")
    assert preloaded.stirs(10.0)
    preloaded.down = True
    assert preloaded.stirs(10.0)
