from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch_views import launch_view
from vllm_bootstrap.launches.types import ProgressView
from vllm_bootstrap.models.orders import ORDER_LABEL
from vllm_bootstrap.models.record import NOTHING, Record, Seen, state_of
from vllm_bootstrap.models.showing import view_of
from vllm_bootstrap.models.types import AdapterEntry, ModelEntry, ModelTrouble
from vllm_bootstrap.scheduler.ports import Demand
from vllm_bootstrap.serving import LoadReport

TROUBLE = ModelTrouble("bad_flag", "It does not know --x.", "Remove it.", 1.0, None)


def record(**fields: Any) -> Record:
    made = Record(ModelEntry("m", "org/m", aliases=("chat",), adapters=(AdapterEntry("lora", "/x"),)), "print")
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def seen(*states: str, **fields: Any) -> Seen:
    labels = {ORDER_LABEL: "print"}
    views = tuple(launch_view(state=state, launch_id=f"l{n}", labels=labels) for n, state in enumerate(states))
    return Seen(views, state_of(views), **fields)


def shown(one: Record, launches: Seen = NOTHING, **demand: Demand) -> Any:
    return view_of(one, launches, demand, {"l0": LoadReport({"realtime": 2, "batch": 1}, {})}, 100.0)


@pytest.mark.parametrize(
    ("one", "launches", "state"),
    [
        (record(), NOTHING, "unloaded"),
        (record(doing="loading"), NOTHING, "loading"),
        (record(doing="loading"), seen("ready"), "loaded"),
        (record(doing="unloading"), seen("ready"), "unloading"),
        (record(doing="waking"), seen("asleep"), "waking"),
        (record(), seen("ready", "stopping"), "loaded"),
        (record(), seen("bootstrapping"), "loading"),
        (record(), seen("asleep"), "asleep"),
        (record(), seen("stopping"), "unloading"),
        (record(), seen("waking"), "waking"),
        (record(), seen("falling_asleep"), "falling_asleep"),
        (record(trouble=TROUBLE, retry_at=200.0), NOTHING, "failed"),
        (record(trouble=TROUBLE, retry_at=50.0), NOTHING, "unloaded"),
    ],
)
def test_states(one: Record, launches: Seen, state: str) -> None:
    assert shown(one, launches).state == state


def test_one_that_was_asked_for_a_moment_ago() -> None:
    asked = record()
    asked.ask("realtime", 99.0, 60.0)
    assert shown(asked).state == "loading"
    asked.obstacle = "'big' is in use"
    assert shown(asked).state == "unloaded"


def test_one_that_does_not_respond() -> None:
    stuck = launch_view(state="ready", unresponsive=True)
    assert shown(record(), Seen((stuck,), "loaded")).state == "unresponsive"


@pytest.mark.parametrize(
    ("one", "launches", "why"),
    [
        (record(), NOTHING, None),
        (record(obstacle="'big' is in use"), NOTHING, "'big' is in use"),
        (record(obstacle="'big' is in use"), seen("asleep"), "'big' is in use"),
        (record(trouble=TROUBLE), NOTHING, "It does not know --x."),
        (record(trouble=TROUBLE, obstacle="old"), seen("ready"), None),
        (record(), seen("ready", retired=True), "it makes room as soon as nothing runs there"),
    ],
)
def test_why(one: Record, launches: Seen, why: str | None) -> None:
    assert shown(one, launches).why == why


def test_who_waits_under_any_of_its_names() -> None:
    view = shown(
        record(batch_lines=7), chat=Demand(1, 2, 0.0, 0.0, False), lora=Demand(3, 0, 0.0, None, False),
        other=Demand(9, 9, 0.0, 0.0, False),
    )  # fmt: skip
    assert view.waiting == {"realtime": 4, "batch": 2}
    assert view.batch_lines == 7


def test_idle_time_counts_from_the_last_end_or_from_the_load() -> None:
    ready = {"ready": 1234.0}
    loaded = launch_view(state="ready", launch_id="l0", transitions=ready, labels={ORDER_LABEL: "print"})
    one = record(ready_at=40.0)
    assert shown(one, Seen((loaded,), "loaded")).idle_s == 60.0
    assert shown(one, Seen((loaded,), "loaded", last_ends={"realtime": 90.0, "batch": 30.0})).idle_s == 10.0
    busy = shown(one, Seen((loaded,), "loaded", running=1))
    assert busy.idle_s is None
    assert busy.loaded_at == 1234.0
    assert busy.in_flight == 1
    assert busy.launches[0].in_flight == 3
    assert not busy.outdated
    assert shown(one, seen("asleep")).loaded_at is None


def test_progress_groups_and_what_is_outdated() -> None:
    progress = ProgressView("weights", 0.5, "1/2", 3.0, 4.0, None, None)
    first = launch_view(state="bootstrapping", launch_id="l1", group_id="g", group_size=2, progress=None)
    second = launch_view(state="bootstrapping", launch_id="l2", group_id="g", group_size=2, progress=progress)
    view = shown(record(load_est_s=9.0, wake_est_s=1.0, trouble=TROUBLE), Seen((first, second), "loading"))
    assert view.group_id == "g"
    assert view.outdated
    assert (view.load_est_s, view.wake_est_s) == (9.0, 1.0)
    assert view.trouble == TROUBLE
    found = view.progress
    assert found is not None
    assert (found.phase, found.fraction, found.detail) == ("weights", 0.5, "1/2")
    assert (found.elapsed_s, found.eta_s) == (3.0, 4.0)
    assert view.launches[1].in_flight == 0
    assert shown(record()).progress is None
