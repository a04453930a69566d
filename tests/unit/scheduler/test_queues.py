from __future__ import annotations

import itertools

from tests.support.desk import Desk, launch
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import QueueFull
from vllm_bootstrap.scheduler.queues import _FEW
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel

MIB = 1024 * 1024


def drained(desk: Desk) -> list[int]:
    """The order in which the waiting get their turn, one at a time."""
    order = []
    while desk.granted:
        (request,) = desk.granted
        order.append(request)
        desk.done(request)
    return order[1:]


def test_a_key_with_a_thousand_requests_does_not_starve_one_with_one() -> None:
    desk = Desk(launch(slots=1), max_queued=2000)
    desk.ask(owner="blocker")
    many = [desk.ask(owner="many") for _ in range(1000)]
    one = desk.ask(owner="one")
    order = drained(desk)
    assert order.index(one) <= 1
    assert [request for request in order if request != one] == many


def test_keys_take_turns_by_sequences() -> None:
    desk = Desk(launch(slots=4))
    desk.ask(owner="blocker", sequences=4)
    big = [desk.ask(owner="big", sequences=4) for _ in range(2)]
    small = [desk.ask(owner="small", sequences=1) for _ in range(8)]
    desk.done(1)
    order: list[int] = []
    while desk.granted:
        order += [request for request in desk.granted if request not in order]
        desk.done(next(iter(desk.granted)))
    assert order.index(big[1]) - order.index(small[0]) == 4  # as much for the one as for the other
    assert [request for request in order if request in small] == small


def test_7_an_arriving_request_whose_key_has_had_less_goes_before_one_that_waits_for_more_room() -> None:
    desk = Desk(launch(slots=2))
    desk.ask(owner="blocker", sequences=2)
    first, big = desk.ask(owner="busy"), desk.ask(owner="busy", sequences=2)
    other = desk.ask(owner="other")
    desk.done(1)
    assert desk.order() == [first, other]
    desk.done(first)
    newcomer = desk.ask(owner="newcomer")
    assert desk.order() == [other, newcomer]
    desk.done(other)
    desk.done(newcomer)
    assert desk.order() == [big]


def test_idling_saves_nothing_up() -> None:
    desk = Desk(launch(slots=1))
    desk.ask(owner="blocker")
    early = [desk.ask(owner="early") for _ in range(6)]
    for _ in range(3):
        desk.done(next(iter(desk.granted)))
    late = [desk.ask(owner="late") for _ in range(3)]
    assert drained(desk) == [late[0], early[3], late[1], early[4], late[2], early[5]]


def test_within_a_key_priority_and_then_arrival_decide() -> None:
    desk = Desk(launch(slots=1))
    desk.ask()
    low, first, second, high = (desk.ask(priority=priority) for priority in (-5, 0, 0, 100))
    assert drained(desk) == [high, first, second, low]


def test_a_priority_is_no_use_against_other_keys() -> None:
    desk = Desk(launch(slots=1))
    desk.ask(owner="blocker")
    modest = desk.ask(owner="modest")
    pushy = [desk.ask(owner="pushy", priority=100) for _ in range(3)]
    assert drained(desk) == [modest, *pushy]


def test_a_key_is_one_key_under_all_names_of_a_launch() -> None:
    desk = Desk(launch(slots=1, names=("m", "n")))
    desk.ask(owner="blocker")
    mine = [desk.ask(ByModel("mn"[number % 2]), owner="mine") for number in range(4)]
    pinned = desk.ask(ByLaunch("a"), owner="mine")
    other = desk.ask(ByModel("n"), owner="other")
    assert drained(desk) == [mine[0], other, *mine[1:], pinned]


def test_what_left_the_middle_of_a_queue_is_forgotten() -> None:
    desk = Desk(launch(slots=1), max_queued=10_000)
    desk.ask()
    stays = desk.ask()
    for request in [desk.ask() for _ in range(500)]:
        desk.cancel(request)
    (line,) = next(iter(desk.admission._directory._lanes.values())).lines.values()
    assert line.live == 1
    assert len(line._heap) <= _FEW + 2
    assert drained(desk) == [stays]


def test_a_big_request_at_the_head_is_waited_for_by_all_keys() -> None:
    desk = Desk(launch(slots=4))
    running = [desk.ask(owner="others") for _ in range(4)]
    big = desk.ask(owner="big", sequences=4)
    small = [desk.ask(owner="others") for _ in range(4)]
    desk.done(running[0])  # nobody passes: their turn comes after
    desk.done(running[1])
    assert [request for request in small if request in desk.granted] == []
    desk.done(running[2])
    desk.done(running[3])
    assert desk.order() == [big]


def test_what_waited_behind_a_big_request_elsewhere_goes_when_that_has_gone() -> None:
    desk = Desk(launch("a", slots=2), launch("b", slots=2))
    first = desk.ask(ByLaunch("a"), sequences=2)
    desk.ask(ByLaunch("b"))
    big, small = desk.ask(sequences=2), desk.ask()
    assert small not in desk.granted
    desk.done(first)
    assert desk.granted[big] == "a"
    assert desk.granted[small] == "b"


def test_a_request_that_came_back_is_first_of_its_key() -> None:
    desk = Desk(launch(slots=1))
    desk.ask(owner="blocker")
    first = desk.ask(owner="key", cls="batch", replayable=True)
    second = desk.ask(owner="key", cls="batch")
    other = desk.ask(owner="other", cls="batch")
    desk.done(1)
    assert desk.order() == [first]
    realtime = desk.ask(owner="chat")
    desk.again(first)
    assert desk.order() == [realtime]
    assert drained(desk) == [first, other, second]


def test_bodies_that_wait_are_bounded() -> None:
    desk = Desk(launch(slots=1), max_queued_bytes=10 * MIB)
    desk.ask(body_bytes=50 * MIB)
    desk.ask(body_bytes=6 * MIB)
    error = desk.refusal(body_bytes=5 * MIB)
    assert isinstance(error, QueueFull)
    assert "6.0 MiB" in error.message
    assert "10.0 MiB" in error.message
    desk.ask(body_bytes=4 * MIB)


def test_8_realtime_takes_the_place_of_the_youngest_batch_request_in_a_full_queue() -> None:
    desk = Desk(launch(slots=1), max_queued=3)
    desk.ask()
    _oldest, middle, youngest = (desk.ask(cls="batch") for _ in range(3))
    assert isinstance(desk.refusal(cls="batch"), QueueFull)
    desk.ask()
    assert list(desk.rejected) == [youngest]
    assert isinstance(desk.rejected[youngest], QueueFull)
    assert "realtime requests come before batch" in desk.rejected[youngest].message
    desk.ask()
    assert list(desk.rejected) == [youngest, middle]
    desk.ask()  # the last of batch stays, for the floor's sake, and takes nobody's place
    assert isinstance(desk.refusal(), QueueFull)
    assert list(desk.rejected) == [youngest, middle]


def test_8_one_batch_request_of_each_key_may_wait_where_realtime_fills_the_queue() -> None:
    desk = Desk(launch(slots=1), max_queued=2, max_queued_bytes=10 * MIB)
    desk.ask()
    desk.ask(body_bytes=5 * MIB)
    desk.ask(body_bytes=5 * MIB)
    assert isinstance(desk.refusal(), QueueFull)
    assert isinstance(desk.refusal(owner="a", cls="batch", body_bytes=11 * MIB), QueueFull), "alone more than may wait"
    lone = [desk.ask(owner="a", cls="batch", body_bytes=6 * MIB), desk.ask(owner="b", cls="batch", body_bytes=4 * MIB)]
    assert isinstance(desk.refusal(owner="c", cls="batch", body_bytes=1), QueueFull), "together more than may wait"
    assert "2 requests are waiting" in desk.refusal(owner="a", cls="batch").message
    assert "2 requests are waiting" in desk.refusal().message
    assert desk.rejected == {}
    assert drained(desk)[-2:] == lone


def test_8_what_is_displaced_is_of_a_key_that_has_more_as_long_as_there_is_one() -> None:
    desk = Desk(launch(slots=1), max_queued=3, max_queued_bytes=10 * MIB)
    desk.ask()
    first, second = (desk.ask(owner="many", cls="batch", body_bytes=4 * MIB) for _ in range(2))
    lone = desk.ask(owner="one", cls="batch", body_bytes=6 * MIB)
    desk.ask()
    desk.ask()
    assert list(desk.rejected) == [second]
    desk.ask(body_bytes=MIB)
    assert list(desk.rejected) == [second]
    desk.cancel(first)
    big = desk.ask(owner="many", cls="batch", body_bytes=4 * MIB)
    assert isinstance(desk.refusal(), QueueFull)
    assert sorted(drained(desk)[-2:]) == [lone, big]


def test_8_lone_batch_requests_that_have_become_too_large_together_count_again() -> None:
    desk = Desk(launch(slots=1), max_queued=3, max_queued_bytes=10 * MIB)
    desk.ask()
    lone = desk.ask(owner="one", cls="batch", body_bytes=6 * MIB)
    first, second = desk.ask(owner="two", cls="batch"), desk.ask(owner="two", cls="batch", body_bytes=10 * MIB)
    desk.cancel(first)  # two of one request each now, which hold 16 MiB together
    desk.ask()
    assert list(desk.rejected) == [second]
    assert drained(desk)[-1] == lone


def test_8_who_waited_behind_what_is_displaced_gets_its_turn() -> None:
    desk = Desk(launch("a", slots=1), launch("b", slots=2), max_queued=2)
    desk.ask(ByLaunch("a"))
    running = [desk.ask(ByLaunch("b"), cls="batch") for _ in range(2)]
    small = desk.ask(ByLaunch("b"), cls="batch")
    big = desk.ask(ByLaunch("b"), cls="batch", sequences=2, priority=1)
    desk.done(running[0])
    assert small not in desk.granted
    desk.ask(ByLaunch("a"))
    assert list(desk.rejected) == [big]
    assert desk.granted[small] == "b"


def test_8_nobody_is_displaced_in_vain() -> None:
    desk = Desk(launch(slots=1), max_queued_bytes=10 * MIB)
    desk.ask()
    desk.ask(cls="batch", body_bytes=MIB)
    assert isinstance(desk.refusal(body_bytes=11 * MIB), QueueFull)
    assert desk.rejected == {}


def test_8_what_came_back_is_not_displaced() -> None:
    desk = Desk(launch(slots=1), max_queued=1)
    taken_back = desk.ask(cls="batch", replayable=True)
    realtime = desk.ask()
    desk.again(taken_back)
    assert desk.order() == [realtime]
    desk.ask()
    assert isinstance(desk.refusal(), QueueFull)
    assert desk.rejected == {}


def test_what_comes_back_is_taken_off_the_account_of_a_key_of_which_nobody_waited_any_more() -> None:
    desk = Desk(launch(slots=6))
    desk.ask(owner="blocker", sequences=6)
    big = desk.ask(owner="big", cls="batch", sequences=3, replayable=True)
    small = [desk.ask(owner="small", cls="batch") for _ in range(6)]
    desk.done(1)
    assert desk.order() == [big, *small[:3]]
    desk.again(big)  # as if it had never had a place: at the level of the last grant, and the older one
    assert desk.order() == [*small[:3], big]
    another = desk.ask(owner="big", cls="batch")
    desk.done(big)
    assert desk.order() == [*small[:3], *small[3:5], another]


def test_turns_of_keys_that_see_different_models() -> None:
    narrow = Principal("narrow", frozenset({"realtime"}), models=("m", "base"))
    desk = Desk(launch(slots=1))
    desk.ask(owner="blocker")
    wide = [desk.ask(owner="wide") for _ in range(3)]
    mine = [desk.ask(owner="narrow", principal=narrow) for _ in range(3)]
    assert drained(desk) == list(itertools.chain.from_iterable(zip(wide, mine, strict=True)))
