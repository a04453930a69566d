from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from vllm_bootstrap.models.planning import Facts, Keep, Load, Plan, Policy, PutAway, Retire, Wake, plan
from vllm_bootstrap.models.types import Group

POLICY = Policy(min_loaded_s=10, max_wait_s=15, batch_turn_s=600, quiet_s=30)


class Box:
    """Room for so many models at once."""

    def __init__(self, models: Collection[Facts], room: int = 1) -> None:
        self.models, self.room, self.elsewhere = models, room, set[str]()

    def fits(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> bool:
        held = {model.name for model in self.models if model.state in ("loading", "loaded", "changing")}
        return len((held - gone) | set(coming) | {name}) <= self.room

    def fits_elsewhere(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> bool:
        return name in self.elsewhere


def decide(*models: Facts, room: int = 1, groups: tuple[Group, ...] = ()) -> Plan:
    return plan(models, Box(models, room), groups, POLICY)


def loaded(name: str, **fields: Any) -> Facts:
    return Facts(name, **{"state": "loaded", "loaded_s": 100.0, "idle_s": 100.0, "quiet_s": 100.0, **fields})


def wanted(name: str, **fields: Any) -> Facts:
    return Facts(name, **{"state": "unloaded", "realtime": 1, **fields})


def test_nobody_wants_anything() -> None:
    assert decide(Facts("a", "unloaded"), loaded("b", state="asleep"), room=0) == Plan([], {})


def test_1_with_room_it_is_loaded_or_woken() -> None:
    assert decide(wanted("a")).actions == [Load("a")]
    assert decide(wanted("a", state="asleep")).actions == [Wake("a")]
    assert decide(Facts("a", "unloaded", batch=3)).actions == [Load("a")]
    assert decide(Facts("a", "unloaded", preload=True)).actions == [Load("a")]
    assert decide(Facts("a", "asleep", preload=True)).actions == []


def test_4_what_cannot_wake_where_it_slept_is_loaded_where_there_is_room() -> None:
    models = (wanted("a", state="asleep"), loaded("old", pin=True))
    box = Box(models)
    assert plan(models, box, (), POLICY).actions == []
    box.elsewhere = {"a"}
    found = plan(models, box, (), POLICY)
    assert found.actions == [PutAway("a", "unload", "room")]
    assert "'old' is pinned" in found.waits["a"]
    assert plan((wanted("a"), models[1]), box, (), POLICY).actions == []
    apart = (Group("g", frozenset({"a", "old"}), together=False),)
    assert plan(models, box, apart, POLICY).actions == [], "it would not be loaded there either"


@pytest.mark.parametrize(
    "model", [wanted("a", may_load=False), wanted("a", state="loading"), wanted("a", state="changing")]
)
def test_what_is_not_due_or_under_way_is_left_alone(model: Facts) -> None:
    assert decide(model) == Plan([], {})


def test_the_order_of_the_wanted() -> None:
    models = (
        Facts("preload", "unloaded", preload=True),
        Facts("lines", "unloaded", batch=5, batch_waits_s=1000.0),
        wanted("late", waits_s=1.0),
        wanted("early", waits_s=9.0),
        wanted("told", waits_s=50.0, absent=True),
        wanted("dear", priority=1, absent=True),
    )
    order = ("dear", "early", "late", "told", "lines", "preload")
    assert decide(*models, room=6).actions == [Load(name) for name in order]


def test_what_was_decided_first_has_the_room() -> None:
    found = decide(wanted("a", waits_s=2.0), wanted("b", waits_s=1.0))
    assert found.actions == [Load("a")]
    assert found.waits == {"b": "there is no room yet: 'a' is being loaded"}


def test_2_room_that_is_coming_is_waited_for_and_kept() -> None:
    found = decide(Facts("old", "changing"), wanted("a", waits_s=2.0), wanted("b", waits_s=1.0))
    assert found.actions == []
    assert found.waits["a"] == "'old' makes room for it"
    assert "'a' is being loaded" in found.waits["b"]


def test_2_of_a_room_to_come_what_is_free_already_is_kept_too() -> None:
    sizes = {"old": 1, "large": 2, "small": 1}

    class Gpus:
        """Two, of which ``old`` still has one. Who cannot be placed among those that come is passed over."""

        def fits(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> bool:
            left = 2 if "old" in gone else 1
            for one in coming:
                left -= sizes[one] if sizes[one] <= left else 0
            return sizes[name] <= left

    facts = [Facts("old", "changing"), wanted("large", waits_s=2.0), wanted("small", waits_s=1.0)]
    found = plan(facts, Gpus(), (), POLICY)
    assert found.actions == []
    assert found.waits["large"] == "'old' makes room for it"
    assert "'large' is being loaded" in found.waits["small"]


def test_3_an_idle_model_makes_room_at_once_and_a_busy_one_when_it_is_free() -> None:
    assert decide(loaded("old"), wanted("a")).actions == [PutAway("old", "unload", "room")]
    assert decide(loaded("old", can_sleep=True), wanted("a")).actions == [PutAway("old", "sleep", "room")]
    found = decide(loaded("old", running_batch=2), wanted("a"))
    assert found.actions == [Retire("old", "a")]
    assert found.waits == {"a": "'old' makes room for it"}


def test_b_what_was_retired_goes_on_going_and_goes_when_it_is_free() -> None:
    busy = loaded("old", running=1, retired=True)
    assert decide(busy, wanted("a")).actions == []
    assert decide(loaded("old", retired=True, realtime=3), wanted("a")).actions == [PutAway("old", "unload", "room")]
    assert decide(busy).actions == [Keep("old")]


@pytest.mark.parametrize(
    ("old", "reason"),
    [
        (loaded("old", pin=True), "there is no room: 'old' is pinned"),
        (loaded("old", loaded_s=9.0), "there is no room yet: 'old' was loaded a moment ago"),
        (loaded("old", running=1), "there is no room: 'old' is in use"),
        (loaded("old", realtime=1), "there is no room: 'old' is in use"),
        (Facts("old", "loading"), "there is no room yet: 'old' is being loaded"),
    ],
)
def test_4_who_stays_and_what_is_said(old: Facts, reason: str) -> None:
    found = decide(old, wanted("a"))
    assert found.actions == []
    assert found.waits == {"a": reason}


def test_4_nothing_helps() -> None:
    found = decide(wanted("a"), room=0)
    assert found.waits == {"a": "there is no room for it on this machine's GPUs at present"}
    assert decide(loaded("old"), wanted("a"), room=0).actions == []


def test_e_a_busy_model_of_lower_priority_or_after_a_long_wait() -> None:
    busy = loaded("old", running=1)
    assert decide(busy, wanted("a", waits_s=15.0)).actions == [Retire("old", "a")]
    assert decide(busy, wanted("a", priority=1)).actions == [Retire("old", "a")]
    assert decide(busy, wanted("a", waits_s=14.9)).actions == []


def test_d_one_that_only_pauses_stays_for_as_long_as_its_load_took() -> None:
    pausing = loaded("old", quiet_s=5.0, loaded_s=20.0, load_s=60.0)
    assert decide(pausing, wanted("a")).actions == []
    assert decide(loaded("old", quiet_s=10.0, loaded_s=20.0, load_s=60.0), wanted("a")).actions
    assert decide(loaded("old", quiet_s=5.0, loaded_s=60.0, load_s=60.0), wanted("a")).actions
    assert decide(pausing, wanted("a", waits_s=15.0)).actions == [PutAway("old", "unload", "room")]


def test_e_a_long_load_is_waited_for_as_long_before_others_have_to_go() -> None:
    busy = loaded("old", running=1)
    assert decide(busy, wanted("a", waits_s=89.0, load_s=90.0)).actions == []
    assert decide(busy, wanted("a", waits_s=90.0, load_s=90.0)).actions == [Retire("old", "a")]


def test_c_preloading_puts_nobody_away() -> None:
    assert decide(loaded("old"), Facts("a", "unloaded", preload=True)).actions == []


@pytest.mark.parametrize(
    ("old", "goes"),
    [
        (loaded("old"), True),  # h
        (loaded("old", quiet_s=29.0), False),  # f
        (loaded("old", running=1), False),  # f
        (loaded("old", batch=1), False),  # g: its turn is not over
        (loaded("old", running_batch=1, loaded_s=600.0), True),  # g
        (loaded("old", batch=1, loaded_s=600.0, priority=1), False),  # g
    ],
)
def test_f_to_h_what_batch_may_put_away(old: Facts, goes: bool) -> None:
    assert bool(decide(old, Facts("a", "unloaded", batch=1)).actions) is goes


def test_who_goes_first() -> None:
    first = loaded("first", priority=-1, idle_s=1.0)
    second = loaded("second", idle_s=50.0, reload_s=5.0)
    third = loaded("third", idle_s=50.0, reload_s=50.0)
    fourth = loaded("fourth", idle_s=1000.0, batch=1, reload_s=1.0)
    found = decide(fourth, third, second, first, wanted("a"), room=4)
    assert found.actions == [PutAway("first", "unload", "room")]
    found = decide(fourth, third, second, wanted("a"), room=3)
    assert found.actions == [PutAway("second", "unload", "room")]
    found = decide(fourth, third, wanted("a"), room=2)
    assert found.actions == [PutAway("third", "unload", "room")]


def test_those_that_turn_out_not_to_be_needed_stay() -> None:
    class Awkward:
        """Only the larger one helps."""

        def fits(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> bool:
            return "large" in gone

    models = (loaded("small", idle_s=1000.0), loaded("large", idle_s=20.0), wanted("a"))
    assert plan(models, Awkward(), (), POLICY).actions == [PutAway("large", "unload", "room")]


def test_idle_models_go_after_their_time_to_live() -> None:
    assert decide(loaded("a", ttl_s=100.0)).actions == [PutAway("a", "unload", "idle")]
    assert decide(loaded("a", ttl_s=100.0, can_sleep=True)).actions == [PutAway("a", "sleep", "idle")]
    assert decide(loaded("a", ttl_s=101.0)).actions == []
    assert decide(loaded("a")).actions == []
    for busy in ({"running": 1}, {"realtime": 1}, {"batch": 1}, {"pin": True}):
        assert decide(loaded("a", ttl_s=100.0, **busy)).actions == []


def test_sleeping_models_go_after_theirs() -> None:
    asleep = loaded("a", state="asleep", asleep_ttl_s=100.0)
    assert decide(asleep).actions == [PutAway("a", "unload", "idle")]
    assert decide(loaded("a", state="asleep", ttl_s=1.0)).actions == []


def test_a_changed_entry_is_put_away_as_soon_as_it_is_free_pinned_or_not() -> None:
    assert decide(loaded("a", outdated=True, pin=True, can_sleep=True)).actions == [PutAway("a", "unload", "outdated")]
    assert decide(loaded("a", outdated=True, running=1)).actions == []
    asleep = wanted("a", state="asleep", outdated=True)
    assert decide(asleep).actions == [PutAway("a", "unload", "outdated")]


def test_groups_that_are_kept_apart_although_there_is_room() -> None:
    apart = (Group("g", frozenset({"a", "b"}), together=False),)
    assert decide(loaded("b"), wanted("a"), room=2, groups=apart).actions == [PutAway("b", "unload", "room")]
    found = decide(loaded("b", running=1), wanted("a"), room=2, groups=apart)
    assert found.waits == {"a": "there is no room: 'b' is in use"}
    found = decide(Facts("b", "changing"), wanted("a"), room=2, groups=apart)
    assert found.waits == {"a": "'b' makes room for it"}
    assert decide(loaded("b"), wanted("a"), room=2, groups=(Group("g", frozenset({"a", "b"})),)).actions == [Load("a")]


def test_a_group_that_wants_the_box_for_itself() -> None:
    alone = (Group("g", frozenset({"a"}), exclusive=True),)
    assert decide(loaded("b"), wanted("a"), room=2, groups=alone).actions == [PutAway("b", "unload", "room")]
    assert decide(loaded("a"), wanted("b"), room=2, groups=alone).actions == [PutAway("a", "unload", "room")]
    assert decide(loaded("c"), wanted("b"), room=2, groups=alone).actions == [Load("b")]


@pytest.mark.parametrize(
    ("field", "models"),
    [
        ("realtime", (wanted("a", waits_s=1.0), wanted("b", waits_s=9.0))),
        (
            "batch",
            (
                Facts("a", "unloaded", batch=1, batch_waits_s=1.0, waits_s=9.0),
                Facts("b", "unloaded", batch=1, batch_waits_s=9.0),
            ),
        ),
    ],
)
def test_who_has_waited_longest_in_its_class_comes_first(field: str, models: tuple[Facts, ...]) -> None:
    assert decide(*models).actions == [Load("b")], field


def test_who_goes_first_among_those_that_may() -> None:
    cheap = (loaded("a", idle_s=50.0, reload_s=50.0), loaded("b", idle_s=50.0, reload_s=5.0))
    assert decide(wanted("w"), *cheap, room=2).actions == [PutAway("b", "unload", "room")], "cheaper to load again"
    idle = (loaded("a", idle_s=20.0, reload_s=10.0), loaded("b", idle_s=90.0, reload_s=20.0))
    assert decide(wanted("w"), *idle, room=2).actions == [PutAway("b", "unload", "room")], "idle longer for its price"
    decided = (loaded("a", idle_s=900.0), loaded("b", running=1, retired=True, priority=9))
    assert decide(wanted("w"), *decided, room=2).actions == [], "b is on its way out already, and is enough"


def test_a_what_was_loaded_for_just_so_long_may_go_and_what_sleeps_gives_no_room() -> None:
    assert decide(wanted("w"), loaded("a", loaded_s=10.0)).actions == [PutAway("a", "unload", "room")]
    asleep = loaded("s", state="asleep")
    assert decide(wanted("w"), asleep, loaded("p", pin=True)).actions == []


def test_g_lines_that_run_count_as_work_as_those_that_wait() -> None:
    batch = Facts("w", "unloaded", batch=1)
    assert decide(batch, loaded("a", running_batch=1)).actions == []
    assert decide(batch, loaded("a", running_batch=1, loaded_s=600.0)).actions == [Retire("a", "w")]


def test_a_load_of_what_an_entry_was_before_ends_at_once() -> None:
    assert decide(loaded("a", state="loading", outdated=True)).actions == [PutAway("a", "unload", "outdated")]
    assert decide(loaded("a", state="loading")).actions == []
    asleep = loaded("a", outdated=True, can_sleep=True)
    assert decide(wanted("w"), asleep).actions == [PutAway("a", "unload", "outdated")], "it must not sleep on"


def test_groups_count_what_is_coming_and_what_is_loading() -> None:
    apart = (Group("apart", frozenset({"a", "b"}), together=False),)
    assert decide(wanted("a", waits_s=2.0), wanted("b"), room=2, groups=apart).actions == [Load("a")]
    assert decide(wanted("a"), loaded("b", state="loading"), room=2, groups=apart).actions == []
    together = (Group("together", frozenset({"a", "b"})),)
    assert decide(wanted("a"), loaded("c"), room=2, groups=together).actions == [Load("a")], "it excludes nobody"
