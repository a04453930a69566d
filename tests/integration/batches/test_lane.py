"""A lane with a model of all that lies outside: what it does with each thing that can happen to a line."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.hasty import run
from tests.support.lanes import COMPLETIONS, OWNER, Desk, Jobs, answered, failed, join_in, make_lane, prompt, turn
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches import brakes, isolation, verdicts
from vllm_bootstrap.batches.lane import SUSPECT_DELAY_S
from vllm_bootstrap.batches.work import Answered, GaveUp
from vllm_bootstrap.errors import (
    BadRequest,
    Cancelled,
    ConcurrencyLimit,
    Forbidden,
    ModelNotFound,
    QueueFull,
    TooManyRequests,
    UpstreamError,
)

BATCH = frozenset({"batch"})
CUT = failed(UpstreamError("cut"), sent=True)


def test_no_more_is_under_way_than_engines_have_slots_and_few_wait_for_them() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 100)
        lane = make_lane(desk, source, slots=4)
        await turn()
        assert len(desk.under_way) == brakes.LOOKAHEAD
        assert lane.waits_for("s") == "realtime requests and others come first"
        for sent in desk.under_way[:]:
            sent.place()
        await turn()
        assert len(desk.under_way) == 4 + brakes.LOOKAHEAD
        assert lane.waits_for("s") is None
        assert lane.under_way("s") == 20
        assert lane.left == 100

    run(go())


def test_the_last_word_on_a_line() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 4)
        make_lane(desk, source)
        await turn()
        for number in (1, 2, 3, 4):
            desk.of(number).place()
        desk.of(1).end(answered(200, b"one"))
        desk.of(2).end(answered(400, b"bad"))
        desk.of(3).end(failed(Cancelled("no")))
        desk.of(4).end(failed(BadRequest("never")))
        assert source.endings == {
            1: Answered(200, b"one", "req"),
            2: Answered(400, b"bad", "req"),
            3: GaveUp("cancelled", "no"),
            4: GaveUp("bad_request", "never"),
        }

    run(go())


def test_an_engine_that_lives_and_fails_uses_the_attempts_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_bootstrap.batches.lane.random.random", lambda: 0.99)

    async def go() -> None:
        desk, source = Desk(), Jobs("s", 1)
        lane = make_lane(desk, source, attempts=2)
        await turn()
        desk.of(1).place()
        desk.of(1).end(answered(500, b"no"))
        assert not desk.under_way
        assert "found out" in (lane.waits_for("s") or "")
        await asyncio.sleep(verdicts.VERDICT_S + 0.001)
        assert lane.waits_for("s") == "the next try is due in a moment"
        await asyncio.sleep(2)
        assert source.notes == {1: 1}
        desk.of(1).place()
        desk.of(1).end(answered(500, b"no"))
        await asyncio.sleep(verdicts.VERDICT_S + 0.001)
        assert source.endings == {1: Answered(500, b"no", "req")}

    run(go())


@pytest.mark.parametrize("news_first", [True, False])
def test_a_line_that_kills_engines_is_found_and_the_others_are_not_charged(news_first: bool) -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 8)
        jobs = {job.number: job for job in source.here}
        lane = make_lane(desk, source, slots=8, attempts=1)
        await turn()
        deaths = 0
        while len(source.endings) < 8:
            assert desk.under_way, lane.waits_for("s")
            numbers = [sent.numbers[0] for sent in desk.under_way]
            for sent in desk.under_way:
                sent.place()
            if 3 in numbers:
                deaths += 1
                if news_first:
                    lane.engine_ended("l1")
                for sent in desk.under_way[:]:
                    sent.end(CUT)
                if not news_first:
                    lane.engine_ended("l1")
                await asyncio.sleep(1)
            else:
                for sent in desk.under_way[:]:
                    sent.end(answered())
                await turn()
        assert source.endings[3] == GaveUp(isolation.POISON_CODE, isolation.POISON_MESSAGE)
        assert all(isinstance(source.endings[one], Answered) for one in (1, 2, 4, 5, 6, 7, 8))
        assert deaths <= 3 + isolation.POISON_DEATHS
        assert jobs[3].executions > jobs[3].attempts == 0
        assert all(job.executions == 1 + job.deaths for number, job in jobs.items() if number != 3)

    run(go())


def test_old_news_of_an_engines_end_does_not_condemn_what_was_sent_to_the_next() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 1)
        lane = make_lane(desk, source, attempts=1)
        await turn()
        lane.engine_ended("l1")
        desk.of(1).place("l1")
        desk.of(1).end(CUT)
        await asyncio.sleep(verdicts.SETTLING_S * 2)
        assert not source.endings
        await asyncio.sleep(verdicts.VERDICT_S)
        assert source.endings[1] == GaveUp("upstream_error", "cut")

    run(go())


@pytest.mark.parametrize("news_first", [True, False])
def test_an_engine_that_somebody_stops_accuses_no_line(news_first: bool) -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 1)
        lane = make_lane(desk, source, attempts=1)
        for _ in range(2 * isolation.POISON_DEATHS):
            await turn()
            desk.of(1).place("l1")
            if news_first:
                lane.engine_ended("l1", verdicts.Verdict.STOPPED)
            desk.of(1).end(CUT)
            if not news_first:
                lane.engine_ended("l1", verdicts.Verdict.STOPPED)
            await asyncio.sleep(verdicts.SETTLING_S * 2)
            assert not source.endings
            assert not source.notes
        desk.of(1).end(answered())
        assert isinstance(source.endings[1], Answered)

    run(go())


def test_ends_of_engines_are_not_remembered_for_ever() -> None:
    async def go() -> None:
        lane = make_lane(Desk())
        for number in range(verdicts.MOST_REMEMBERED + 10):
            lane.engine_ended(f"l{number}")
        assert len(lane._verdicts._ended) == verdicts.MOST_REMEMBERED

    run(go())


def test_a_suspect_that_found_no_room_is_soon_tried_again() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 2)
        lane = make_lane(desk, source, slots=1)
        source.here[0].deaths = 1
        await turn()
        assert [sent.numbers for sent in desk.under_way] == [[1]]
        for _ in range(8):  # their back-off would be half a minute by now
            desk.of(1).place()
            desk.of(1).end(answered(429))
            await turn()
            assert not desk.under_way
            assert "looked for" in (lane.waits_for("s") or "")
            await asyncio.sleep(SUSPECT_DELAY_S)
            await turn()
        desk.of(1).place()
        desk.of(1).end(answered())
        await turn()
        assert [sent.numbers for sent in desk.under_way] == [[2]]

    run(go())


def test_one_of_a_joined_request_is_dropped_and_the_others_get_their_answers() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 3, path=COMPLETIONS)
        lane = make_lane(desk, source, max_joined=3)
        await turn()
        (sent,) = desk.under_way
        assert sent.numbers == [1, 2, 3]
        job = sent.flight.jobs[1]
        source.out.remove(job)
        source.dropped.add(2)
        lane.drop(job.key)
        sent.place()
        choices = [{"index": at, "text": f"t{at}"} for at in range(3)]
        sent.end(answered(200, json.dumps({"id": "c", "choices": choices}).encode()))
        texts = {at: json.loads(one.body)["choices"][0]["text"] for at, one in source.endings.items()}
        assert texts == {1: "t0", 3: "t2"}
        assert lane._isolation.in_flight == 0

    run(go())


def test_dropped_ones_are_judged_with_their_company_and_never_heard_of_again() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 3, path=COMPLETIONS)
        lane = make_lane(desk, source, max_joined=3)
        await turn()
        (sent,) = desk.under_way
        first, second, third = sent.flight.jobs
        for job in (first, second):
            source.out.remove(job)
            source.dropped.add(job.number)
        lane.drop(first.key)
        sent.place()
        sent.end(CUT)
        lane.drop(second.key)
        lane.drop(second.key)
        lane.engine_ended("l1")
        await asyncio.sleep(1)
        assert lane._isolation._alone == {}  # it did not die alone
        assert desk.of(third.number).numbers == [third.number]
        desk.of(third.number).place()
        desk.of(third.number).end(answered())
        assert set(source.endings) == {3}
        assert not lane._isolation.suspects

    run(go())


def test_when_all_of_a_request_are_dropped_it_is_cancelled_and_what_waits_for_its_next_try_is_forgotten() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 2)
        lane = make_lane(desk, source, slots=1)
        await turn()
        job = desk.of(1).flight.jobs[0]
        source.out.remove(job)
        source.dropped.add(1)
        lane.drop(job.key)
        assert [sent.numbers for sent in desk.under_way] == [[2]]
        desk.of(2).place()
        later = desk.of(2).flight.jobs[0]
        desk.of(2).end(answered(429))
        source.out.remove(later)
        source.dropped.add(2)
        lane.drop(later.key)
        await asyncio.sleep(100)
        assert not desk.under_way
        assert not source.endings

    run(go())


@pytest.mark.parametrize(
    "outcome", [answered(400), answered(200, b"[]"), failed(BadRequest("too many sequences")), answered(501)]
)
def test_what_a_joined_request_comes_to_is_not_held_against_its_lines(outcome) -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 3, path=COMPLETIONS)
        make_lane(desk, source, max_joined=8, attempts=1)
        await turn()
        (sent,) = desk.under_way
        sent.place()
        sent.end(outcome)
        await asyncio.sleep(verdicts.VERDICT_S + 0.1)
        assert sorted(sent.numbers for sent in desk.under_way) == [[1], [2], [3]]
        for one in desk.under_way[:]:
            one.place()
            one.end(answered())
        assert len(source.endings) == 3

    run(go())


def test_a_failing_joined_request_charges_no_line_with_an_attempt() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 2, path=COMPLETIONS)
        make_lane(desk, source, max_joined=8, attempts=1)
        await turn()
        desk.of(1).place()
        desk.of(1).end(answered(500))
        await asyncio.sleep(verdicts.VERDICT_S + 0.1)
        assert not source.endings
        assert [sent.flight.jobs[0].attempts for sent in desk.under_way] == [0, 0]

    run(go())


def test_a_joined_request_that_somebody_cancels_is_cancelled() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 2, path=COMPLETIONS)
        make_lane(desk, source, max_joined=8)
        await turn()
        desk.of(1).end(failed(Cancelled("no")))
        assert source.endings == {1: GaveUp("cancelled", "no"), 2: GaveUp("cancelled", "no")}

    run(go())


def test_no_more_travel_together_than_the_key_may_ask_for_at_once() -> None:
    async def go() -> None:
        desk = Desk({OWNER: Principal(OWNER, BATCH, max_sequences=5)})
        source = Jobs("s", 4, path=COMPLETIONS)
        for job in source.here:
            job.body = prompt("x", n=2)
        make_lane(desk, source, max_joined=8)
        await turn()
        assert [sent.numbers for sent in desk.under_way] == [[1, 2], [3, 4]]
        assert [sent.flight.cost for sent in desk.under_way] == [4, 4]

    run(go())


def test_only_what_is_alike_travels_together() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 5, path=COMPLETIONS)
        source.here[2].body = prompt("x", temperature=1)
        source.here[3].body = b"[" * 100_000  # no plan can be made of that
        make_lane(desk, source, max_joined=8)
        await turn()
        assert [sent.numbers for sent in desk.under_way] == [[1, 2], [3], [4], [5]]

    run(go())


def test_a_pause_takes_back_what_no_engine_has_and_leaves_what_one_has() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 6)
        lane = make_lane(desk, source, slots=2)
        await turn()
        desk.of(1).place()
        desk.of(2).place()
        desk.of(2).end(answered(429))
        lane.pause("s")
        assert [sent.numbers for sent in desk.under_way] == [[1]]
        assert {job.number for job in source.out} == {1}
        desk.of(1).end(answered(429))
        assert not source.out
        assert lane.waits_for("s") == "it is paused"
        await asyncio.sleep(100)
        assert not desk.under_way
        lane.resume("s")
        await turn()
        assert len(desk.under_way) == 6

    run(go())


def test_a_pause_while_an_engine_is_judged_lets_suspects_go_without_holding_others_up() -> None:
    async def go() -> None:
        desk, mine, other = Desk(), Jobs("s", 2), Jobs("t", 1)
        lane = make_lane(desk, mine, slots=2)
        await turn()
        for number in (1, 2):
            desk.of(number).place()
            desk.of(number).end(CUT)
        lane.engine_ended("l1")
        lane.pause("s")
        join_in(lane, other)
        await asyncio.sleep(1)
        assert not mine.out
        assert mine.notes == {1: 1, 2: 1}
        assert [sent.flight.source.id for sent in desk.under_way] == ["t"]

    run(go())


def test_withdrawal_ends_everything_of_a_source_wherever_it_is() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 4)
        lane = make_lane(desk, source)
        await turn()
        desk.of(1).place()
        desk.of(2).place()
        desk.of(2).end(answered(429))
        desk.of(3).place()
        desk.of(3).end(CUT)
        lane.withdraw("s")
        lane.withdraw("s")
        await asyncio.sleep(100)
        assert not desk.under_way
        assert not source.endings
        assert lane.empty
        assert lane.waits_for("s") is None
        assert (lane._under_way, lane._waiting, lane._isolation.in_flight) == (0, 0, 0)
        lane.close()
        lane.close()

    run(go())


def test_without_a_valid_key_a_source_waits_and_others_go_on() -> None:
    async def go() -> None:
        desk, mine, other = Desk(), Jobs("s", 2), Jobs("t", 1, owner="b", first=11)
        desk.keys["b"] = Principal("b", BATCH)
        del desk.keys[OWNER]
        lane = make_lane(desk, mine, other)
        await turn()
        assert [sent.flight.source.id for sent in desk.under_way] == ["t"]
        assert "is not valid now" in (lane.waits_for("s") or "")
        assert lane.wait_for_keys
        desk.keys[OWNER] = Principal(OWNER, BATCH)
        lane.keys_changed()
        await turn()
        assert len(desk.under_way) == 3
        desk.of(2).end(failed(Forbidden("not this model")))
        desk.of(1).end(failed(Forbidden("not this model")))
        await asyncio.sleep(100)
        assert "refused (insufficient_scope)" in (lane.waits_for("s") or "")
        assert not mine.out

    run(go())


def test_the_limits_of_one_key_hold_up_nobody_else() -> None:
    async def go() -> None:
        desk, mine, other = Desk(), Jobs("s", 2), Jobs("t", 2, owner="b")
        desk.keys["b"] = Principal("b", BATCH)
        lane = make_lane(desk, mine, other, slots=1)
        await turn()
        for sent in [sent for sent in desk.under_way if sent.flight.source is mine]:
            sent.end(failed(TooManyRequests("two a minute", retry_after=30)))
        assert lane.waits_for("s") == "two a minute"
        assert not mine.out
        assert not lane.wait_for_keys
        assert len(desk.under_way) == 2
        await asyncio.sleep(30.1)
        assert len(desk.under_way) == 4

    run(go())


def test_a_key_that_may_ask_few_things_at_once_goes_on_when_one_ends() -> None:
    async def go() -> None:
        desk = Desk({OWNER: Principal(OWNER, BATCH, max_parallel=2)})
        source = Jobs("s", 5)
        lane = make_lane(desk, source, slots=8)
        await turn()
        assert len(desk.under_way) == desk.sent == 2
        desk.of(1).place()
        desk.of(1).end(answered())
        await turn()
        assert (len(desk.under_way), desk.sent) == (2, 3)
        desk.of(2).end(failed(ConcurrencyLimit("others of this key run", retry_after=20)))
        assert len(source.out) == 1
        desk.of(3).place()
        assert lane.waits_for("s") is None
        desk.of(3).end(answered())
        await turn()
        assert len(desk.under_way) == 2

    run(go())


def test_any_limit_of_a_key_is_asked_again_when_one_of_its_requests_ends() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 5)
        make_lane(desk, source, slots=1)
        await turn()
        desk.of(1).place()
        for number in (2, 3, 4, 5):
            desk.of(number).end(failed(TooManyRequests("enough tokens under way", retry_after=30)))
        await turn()
        assert [sent.numbers for sent in desk.under_way] == [[1]]
        desk.of(1).end(answered())
        await turn()
        assert len(desk.under_way) == 4

    run(go())


def test_a_key_for_which_the_model_is_not_there_holds_up_nobody_else() -> None:
    async def go() -> None:
        desk, mine, other = Desk(), Jobs("s", 2), Jobs("t", 2, owner="b")
        desk.keys["b"] = Principal("b", BATCH)
        lane = make_lane(desk, mine, other, slots=1)
        await turn()
        for sent in [sent for sent in desk.under_way if sent.flight.source is mine]:
            sent.end(failed(ModelNotFound("not for this key")))
        for _ in range(2):
            next(sent for sent in desk.under_way if sent.flight.source is other).end(answered())
            await turn()
        assert len(other.endings) == 2
        assert lane.waits_for("s") == "not for this key"

    run(go())


def test_batches_of_a_key_that_is_full_elsewhere_do_not_wake_one_another() -> None:
    async def go() -> None:
        desk, one, two = Desk(), Jobs("s", 3), Jobs("t", 3)
        make_lane(desk, one, two)
        await turn()
        asked = desk.sent
        for _ in range(20):
            for sent in desk.under_way[:]:
                sent.end(failed(ConcurrencyLimit("others of this key run", retry_after=1)))
            await turn()
        assert desk.sent == asked
        assert not one.out
        assert not two.out
        await asyncio.sleep(1.001)
        assert desk.sent > asked

    run(go())


def test_a_queue_shorter_than_what_a_lane_would_send_ahead_does_not_stop_it() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 200)
        make_lane(desk, source, slots=2)
        await turn()
        for sent in desk.under_way[4:]:
            sent.end(failed(QueueFull("full", retry_after=30)))
        await turn()
        assert len(desk.under_way) == 4
        sent_before = desk.sent
        for _ in range(20):
            one = desk.under_way[0]
            one.place()
            one.end(answered())
            await turn()
            assert len(desk.under_way) == 4
        assert desk.sent == sent_before + 20
        await asyncio.sleep(brakes.FULL_QUEUE_S)
        await turn()
        assert len(desk.under_way) == brakes.LOOKAHEAD

    run(go())


def test_where_others_fill_the_queue_it_is_asked_again_after_a_while() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 1)
        lane = make_lane(desk, source)
        await turn()
        desk.of(1).end(failed(QueueFull("full", retry_after=30)))
        await turn()
        assert not desk.under_way
        assert lane.waits_for("s") == "full"
        await asyncio.sleep(brakes.STANDS_STILL_MAX_S)
        await turn()
        assert desk.sent == 2

    run(go())


def test_a_model_that_is_not_there_is_waited_for() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 3)
        lane = make_lane(desk, source, slots=0)
        await turn()
        assert lane.waits_for("s") == "nothing serves it"
        assert not desk.under_way
        lane.engines(1, "")
        await turn()
        for sent in desk.under_way[:]:
            sent.end(failed(ModelNotFound("gone again")))
        await turn()
        assert lane.waits_for("s") == "gone again"
        assert desk.sent == 3
        lane.engines(2, "")
        await turn()
        assert len(desk.under_way) == 3

    run(go())


def test_an_error_in_sending_costs_no_line_and_does_not_stop_the_lane() -> None:
    async def go() -> None:
        desk, source = Desk(), Jobs("s", 2)
        desk.breaks = ZeroDivisionError()
        lane = make_lane(desk, source, attempts=1)
        await turn()
        assert desk.sent == 2
        assert lane._under_way == 0
        desk.breaks = None
        await asyncio.sleep(2)
        assert len(desk.under_way) == 2
        assert [job.attempts for job in source.out] == [0, 0]

    run(go())


def test_priorities_and_turns_between_owners() -> None:
    async def go() -> None:
        desk, first, second, other = Desk(), Jobs("a", 30), Jobs("b", 3), Jobs("c", 3, owner="b")
        desk.keys["b"] = Principal("b", BATCH)
        lane = make_lane(desk, first, second, other, slots=0)
        lane.change("b", 5)
        lane.engines(1, "")
        await turn()
        order = [sent.flight.source.id for sent in desk.under_way]
        assert order[:6] == ["b", "c", "b", "c", "b", "c"]
        assert set(order[6:]) == {"a"}
        assert lane.waits_for("a") is not None

    run(go())


def test_a_line_that_nobody_can_look_into_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_deep(*_: object) -> None:
        raise RecursionError

    monkeypatch.setattr("vllm_bootstrap.batches.outcomes.joining.plan", too_deep)

    async def go() -> None:
        desk, source = Desk(), Jobs("s", 2, path=COMPLETIONS)
        make_lane(desk, source, max_joined=8)
        await turn()
        assert [sent.numbers for sent in desk.under_way] == [[1], [2]]

    run(go())
