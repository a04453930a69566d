from __future__ import annotations

from vllm_bootstrap.batches.turns import Source, Turns


def turns_with(*sources: Source) -> Turns:
    turns = Turns()
    for source in sources:
        turns.put(source)
    return turns


def order(turns: Turns, times: int, sequences: int = 1) -> list[str | None]:
    found = []
    for _ in range(times):
        found.append(turns.next())
        turns.taken(found[-1] or "", sequences)
    return found


def test_nothing_has_a_turn_where_nothing_is_ready() -> None:
    assert Turns().next() is None
    assert turns_with(Source("a", "x", ready=False)).next() is None


def test_within_an_owner_priority_then_deadline_then_age() -> None:
    turns = turns_with(
        Source("4", "x", priority=-1),
        Source("3", "x", deadline=20.0),
        Source("2", "x", deadline=10.0),
        Source("1", "x", deadline=20.0),
        Source("5", "x", priority=9, deadline=99.0),
    )
    assert len(turns) == 5
    seen = []
    while (best := turns.next()) is not None:
        seen.append(best)
        turns.drop(best)
        assert best not in turns
    assert seen == ["5", "2", "1", "3", "4"]


def test_asking_changes_nothing() -> None:
    turns = turns_with(Source("a", "x"), Source("b", "y"))
    assert [turns.next() for _ in range(3)] == ["a", "a", "a"]


def test_owners_take_turns_whatever_the_number_of_their_sources() -> None:
    turns = turns_with(Source("a1", "x"), Source("a2", "x", priority=5), Source("b", "y"))
    assert order(turns, 6) == ["a2", "b", "a2", "b", "a2", "b"]


def test_shares_are_counted_in_sequences() -> None:
    turns = turns_with(Source("a", "x"), Source("b", "y"))
    turns.taken("a", 3)
    assert order(turns, 4) == ["b", "b", "b", "a"]


def test_idling_saves_nothing_up() -> None:
    turns = turns_with(Source("a", "x"), Source("b", "y", ready=False))
    order(turns, 50)
    turns.set_ready("b", True)
    assert order(turns, 4) in (["b", "a", "b", "a"], ["b", "b", "a", "b"])


def test_who_was_ahead_stays_ahead_when_it_comes_back() -> None:
    turns = turns_with(Source("a", "x"), Source("b", "y"))
    turns.taken("a", 10)
    turns.drop("a")
    turns.put(Source("a", "x"))
    assert order(turns, 10) == ["b"] * 10


def test_what_an_owner_that_had_no_work_took_is_charged() -> None:
    turns = turns_with(Source("a", "x"), Source("b", "y"))
    turns.set_ready("a", False)
    turns.taken("a", 2)
    turns.set_ready("a", True)
    assert order(turns, 3) == ["b", "b", "a"]


def test_a_new_priority_counts_at_once() -> None:
    turns = turns_with(Source("1", "x"), Source("2", "x"), Source("3", "x", ready=False))
    turns.change("2", 1)
    assert turns.next() == "2"
    turns.change("2", 1)
    assert turns.next() == "2"
    turns.change("3", 2)
    assert turns.next() == "2"
    turns.set_ready("3", True)
    assert turns.next() == "3"


def test_a_source_can_be_put_again() -> None:
    turns = turns_with(Source("1", "x"), Source("2", "x"))
    turns.put(Source("1", "y", ready=False))
    assert len(turns) == 2
    assert turns.next() == "2"


def test_what_is_not_there_changes_nothing() -> None:
    turns = turns_with(Source("1", "x"))
    turns.drop("2")
    turns.change("2", 3)
    turns.set_ready("2", True)
    turns.taken("2")
    turns.set_ready("1", True)
    assert "1" in turns
    assert len(turns) == 1


def test_owners_that_are_gone_are_forgotten() -> None:
    turns = turns_with(Source("a", "x"))
    for number in range(20):
        turns.put(Source("b", f"y{number}"))
        order(turns, 3)
        turns.drop("b")
    order(turns, 3)
    assert len(turns._owners) == 1
