from __future__ import annotations

import pytest

from vllm_bootstrap.batches import isolation
from vllm_bootstrap.batches.isolation import MAX_CLEARED, POISON_DEATHS, Isolation


def lane_with(*keys: str) -> Isolation[str]:
    lane: Isolation[str] = Isolation()
    for key in keys:
        assert lane.admits(key)
        lane.started(key)
    return lane


def start_wanted(lane: Isolation[str], most: int | None = None) -> list[str]:
    wanted = lane.wanted(most)
    for key in wanted:
        assert lane.admits(key)
        lane.started(key)
    return list(wanted)


def test_without_suspects_anything_may_run() -> None:
    lane = lane_with("a", "b")
    assert not lane.isolating
    assert lane.in_flight == 2
    lane.ended("a")
    lane.came_back("b")
    assert lane.in_flight == 0
    assert lane.suspects == lane.wanted() == ()
    assert lane.admits("b")


def test_the_half_that_was_started_later_goes_first_and_nothing_else() -> None:
    lane = lane_with("a", "b", "c", "d", "e")
    assert lane.died(["a", "b", "c", "d", "e"]) is None
    assert set(lane.suspects) == set("abcde")
    assert lane.wanted() == ("c", "d", "e")
    assert lane.wanted(2) == ("c", "d")
    assert not lane.admits("a")
    assert not lane.admits("new")


def test_a_poison_line_is_found_and_the_others_are_cleared() -> None:
    lane = lane_with(*"abcdefgh")
    died = [lane.died("abcdefgh")]
    while lane.isolating:
        running = start_wanted(lane)
        assert running
        if "f" in running:
            died.append(lane.died(running))
        else:
            for key in running:
                lane.ended(key)
    # In company of eight, four and two, then alone as often as it takes.
    assert died == [None, None, None, None, "f"]
    assert lane.admits("g")


def test_a_group_begins_when_the_others_have_ended() -> None:
    lane = lane_with("a", "b", "elsewhere")
    assert lane.died(["a", "b"]) is None
    assert lane.wanted() == ()
    assert not lane.admits("b")
    lane.ended("elsewhere")
    assert lane.wanted() == ("b",)
    assert lane.suspects == ("a", "b")


def test_a_death_alone_by_accident_gives_no_line_up() -> None:
    lane = lane_with("a")
    assert lane.died(["a"]) is None
    assert start_wanted(lane) == ["a"]
    assert not lane.admits("a"), "it is in flight"
    lane.ended("a")
    assert not lane.isolating
    lane.started("a")
    assert lane.died(["a"]) is None, "an answer between two deaths takes the first one back"
    start_wanted(lane)
    assert lane.died(["a"]) == "a"
    assert not lane.isolating


def test_a_line_that_came_back_is_as_suspect_as_before() -> None:
    lane = lane_with("a")
    lane.died(["a"])
    start_wanted(lane)
    lane.came_back("a")
    assert lane.wanted() == ("a",)
    start_wanted(lane)
    assert lane.died(["a"]) == "a"


def test_what_is_withdrawn_holds_nothing_up_and_is_suspected_when_it_comes_again() -> None:
    lane = lane_with("a", "b")
    lane.died(["a", "b"])
    lane.withdrawn("b")
    assert lane.wanted() == ("a",)
    lane.withdrawn("a")
    assert lane.admits("fresh")
    lane.started("fresh")
    assert not lane.admits("b", deaths=1), "others are in flight"
    assert not lane.admits("other")
    lane.ended("fresh")
    assert lane.admits("b", deaths=1)
    assert not lane.admits("other")


def test_lines_with_deaths_of_an_earlier_run_form_a_group() -> None:
    lane: Isolation[str] = Isolation()
    assert lane.admits("a", deaths=1)
    assert lane.admits("b", deaths=3)
    assert not lane.admits("c")
    start_wanted(lane)
    assert lane.admits("d", deaths=1)
    assert lane.died(["a", "b"]) is None
    assert lane.wanted() == ("b",), "what has died just now goes before the newcomers"
    for expected in ("b", "a", "d"):
        assert start_wanted(lane) == [expected]
        lane.ended(expected)
    assert lane.admits("c")


def test_a_newcomer_does_not_join_a_group_that_is_halved() -> None:
    lane = lane_with("a", "b", "c", "d")
    lane.died("abcd")
    assert not lane.admits("late", deaths=1)
    assert start_wanted(lane) == ["c", "d"]


def test_what_was_not_in_flight_at_a_groups_death_waits_behind_its_halves() -> None:
    lane = lane_with(*"abcdefgh")
    lane.died("abcdefgh")
    assert start_wanted(lane, 2) == ["e", "f"]
    lane.died(["e", "f"])
    order = []
    while lane.isolating:
        group = start_wanted(lane)
        order.append(group)
        for key in group:
            lane.ended(key)
    assert order == [["f"], ["e"], ["g", "h"], ["a", "b", "c", "d"]]


def test_the_rest_of_a_group_on_another_engine_ends_before_its_halves_begin() -> None:
    lane = lane_with(*"abcd", *"efgh")
    lane.died("abcdefgh")
    start_wanted(lane)
    assert lane.died(["e", "f"]) is None
    assert lane.wanted() == ()
    lane.ended("g")
    lane.came_back("h")
    assert lane.wanted() == ("f",)
    for expected in ("f", "e", "h"):
        assert start_wanted(lane) == [expected]
        lane.ended(expected)


def test_a_cleared_line_is_believed_whatever_is_stored_until_it_is_there_at_a_death_again() -> None:
    lane: Isolation[str] = Isolation()
    assert lane.admits("a", deaths=2)
    lane.started("a")
    lane.ended("a")
    assert lane.admits("a", deaths=2)
    assert not lane.isolating
    lane.started("a")
    lane.died(["a"])
    assert lane.suspects == ("a",)


def test_what_was_cleared_and_died_since_is_suspected_when_it_comes_again() -> None:
    lane: Isolation[str] = Isolation()
    assert lane.admits("a", deaths=1)
    lane.started("a")
    lane.ended("a")
    lane.started("a")
    lane.died(["a"])
    lane.withdrawn("a")
    assert not lane.isolating
    assert lane.admits("a", deaths=2)
    assert lane.isolating


def test_a_newcomer_does_not_join_a_group_that_is_over_while_others_are_in_flight() -> None:
    lane: Isolation[str] = Isolation()
    assert lane.admits("a", deaths=1)
    lane.started("a")
    lane.ended("a")
    lane.started("fresh")
    assert not lane.admits("b", deaths=1)
    lane.ended("fresh")
    assert lane.wanted() == ("b",)


def test_who_was_cleared_is_remembered_up_to_a_bound() -> None:
    lane: Isolation[int] = Isolation()
    for key in range(MAX_CLEARED + 1):
        assert lane.admits(key, deaths=1)
        lane.started(key)
        lane.ended(key)
    assert lane.admits(1, deaths=1)
    assert not lane.isolating
    assert lane.admits(0, deaths=1)
    assert lane.isolating


def test_a_death_with_nothing_of_the_lane_in_flight_changes_nothing() -> None:
    lane = lane_with("a")
    lane.ended("a")
    assert lane.died(["a", "unknown"]) is None
    assert not lane.isolating
    lane.admits("b", deaths=1)
    lane.died([])
    assert lane.wanted() == ("b",)


def test_what_was_not_admitted_cannot_be_started() -> None:
    lane = lane_with("a", "b")
    lane.died(["a", "b"])
    with pytest.raises(ValueError, match="not admitted"):
        lane.started("a")


def test_the_message_says_how_often() -> None:
    assert str(POISON_DEATHS) in isolation.POISON_MESSAGE
    assert isolation.POISON_CODE == "engine_killed"
