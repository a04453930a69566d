import pytest

from tests.support.fake_time import FakeTime
from vllm_bootstrap.engines.simulator.metrics import Metrics
from vllm_bootstrap.engines.simulator.model import Model
from vllm_bootstrap.engines.simulator.sequence import Sequence


class Notes:
    """A sink that remembers."""

    def __init__(self):
        self.tokens, self.ended, self.failed = [], [], []

    def on_token(self, sequence):
        self.tokens.append(sequence)

    def on_end(self, sequence):
        self.ended.append(sequence)

    def on_failure(self, sequence, message):
        self.failed.append((sequence, message))


class Rig:
    def __init__(self, *, slots=2, tps=10.0, prefill=0.0, capacity=1000):
        self.time, self.metrics, self.notes = FakeTime(), Metrics(), Notes()
        self.model = Model(
            slots=slots, tokens_per_second=tps, prefill_tokens_per_second=prefill, capacity_tokens=capacity,
            metrics=self.metrics, clock=self.time.now, call_later=self.time.call_later,
        )  # fmt: skip

    def submit(self, total=3, prompt=1, priority=0, *, streamed=False):
        sequence = Sequence(
            self.notes, prompt_tokens=prompt, total=total, priority=priority, streamed=streamed, finish_reason="length"
        )
        self.model.submit(sequence)
        return sequence


def test_one_token_a_step_and_the_first_after_the_prompt():
    rig = Rig(tps=10, prefill=100)
    sequence = rig.submit(total=3, prompt=50)
    rig.time.advance(0.49)
    assert sequence.produced == 0
    rig.time.advance(0.02)
    assert sequence.produced == 1
    rig.time.advance(0.1)
    assert sequence.produced == 2
    rig.time.advance(0.1)
    assert rig.notes.ended == [sequence]
    assert (rig.metrics.prompt_tokens, rig.metrics.generation_tokens, rig.metrics.finished["length"]) == (50, 3, 1)
    rig.time.advance(1)
    assert rig.time.pending == 0


def test_slots_are_a_limit_and_are_taken_over_at_once():
    rig = Rig(slots=2)
    one, two, three = (rig.submit(total=n) for n in (2, 5, 1))
    rig.time.advance(0.01)
    assert (rig.model.running, rig.model.waiting) == (2, 1)
    rig.time.advance(0.1)
    assert rig.notes.ended == [one, three]
    rig.time.advance(1)
    assert rig.notes.ended == [one, three, two]


def test_lower_priority_numbers_go_first_then_the_longest_waiting():
    rig = Rig(slots=1)
    running = rig.submit(total=1)
    late, first, second = rig.submit(1, priority=5), rig.submit(1, priority=-1), rig.submit(1, priority=0)
    third = rig.submit(1, priority=0)
    rig.time.advance(1)
    assert rig.notes.ended == [running, first, second, third, late]


def test_without_waiting_a_whole_answer_comes_at_once_and_a_stream_token_by_token():
    rig = Rig(tps=0)
    whole, stream = rig.submit(total=100), rig.submit(total=3, streamed=True)
    rig.time.advance(0)
    assert rig.notes.tokens.count(whole) == 1
    assert rig.notes.tokens.count(stream) == 3
    assert rig.notes.ended == [whole, stream]
    assert rig.metrics.generation_tokens == 103


def test_an_abort_frees_the_slot_at_once_wherever_the_sequence_is():
    rig = Rig(slots=1, prefill=10)
    prefilling, waiting, next_one = rig.submit(prompt=10), rig.submit(), rig.submit(prompt=0)
    rig.model.abort(waiting)
    rig.model.abort(prefilling)
    rig.model.abort(prefilling)
    assert (rig.model.running, rig.model.waiting) == (1, 0)
    rig.time.advance(0.05)
    assert next_one.produced == 1
    rig.model.abort(next_one)
    rig.time.advance(1)
    assert rig.notes.ended == []
    assert rig.metrics.finished["abort"] == 3
    assert (rig.model.running, rig.model.waiting, rig.time.pending) == (0, 0, 0)


def test_aborted_ones_do_not_pile_up_behind_a_full_engine():
    rig = Rig(slots=1)
    rig.submit(total=1000)
    for _ in range(500):
        rig.model.abort(rig.submit())
    assert len(rig.model._queue.entries) < 100
    assert rig.model.waiting == 0


def test_a_sequence_without_tokens_ends_after_the_prompt():
    rig = Rig()
    sequence = rig.submit(total=0, prompt=5)
    rig.time.advance(0)
    assert (rig.notes.ended, rig.metrics.prompt_tokens, rig.metrics.generation_tokens) == ([sequence], 5, 0)


def test_frozen_it_produces_nothing_and_goes_on_where_it_was():
    rig = Rig()
    sequence = rig.submit(total=5)
    rig.time.advance(0.15)
    rig.model.freeze("a")
    rig.model.freeze("b")
    later, gone = rig.submit(total=1), rig.submit(total=1)
    rig.time.advance(5)
    rig.model.abort(gone)
    assert (sequence.produced, later.produced, rig.model.running) == (2, 0, 2)
    rig.model.thaw("a")
    rig.time.advance(5)
    assert sequence.produced == 2
    rig.model.thaw("b")
    rig.time.advance(0.12)
    assert (sequence.produced, later.produced) == (3, 1)
    rig.time.advance(5)
    assert rig.notes.ended == [later, sequence]


def test_a_dead_engine_fails_all():
    rig = Rig(slots=1)
    one, two, gone = rig.submit(), rig.submit(), rig.submit()
    rig.model.abort(gone)
    rig.model.fail("died")
    assert rig.notes.failed == [(one, "died"), (two, "died")]
    assert (rig.model.running, rig.model.waiting, rig.model.dead) == (0, 0, "died")
    rig.time.advance(5)
    assert rig.time.pending == 0


def test_a_machine_too_slow_for_the_rate_does_not_run_after_the_clock():
    rig = Rig(tps=1000)
    sequence = rig.submit(total=500)
    rig.time.advance(0.01)
    rig.time.jump(10.0)
    rig.time.advance(0.1)
    assert sequence.produced < 200


@pytest.mark.parametrize("tps", [30.0, 7.0, 900.0])
def test_the_rate_is_kept_on_average(tps):
    rig = Rig(tps=tps)
    sequence = rig.submit(total=10**6)
    rig.time.advance(5)
    assert sequence.produced == pytest.approx(5 * tps, rel=0.05)


def test_the_cache_fills_with_what_runs():
    rig = Rig(capacity=20)
    rig.submit(prompt=5)
    rig.time.advance(0)
    assert rig.model.cache_usage == pytest.approx(6 / 20)
    rig.submit(prompt=500)
    assert rig.model.cache_usage == 1


def test_it_is_busy_until_nobody_is_to_be_answered_any_more():
    rig = Rig(slots=1)
    assert not rig.model.busy
    running, waiting = rig.submit(), rig.submit()
    assert rig.model.busy
    rig.model.abort(running)
    assert rig.model.busy
    rig.model.abort(waiting)
    assert not rig.model.busy


def test_a_pause_between_two_steps_moves_neither():
    rig = Rig(tps=10)
    sequence = rig.submit(total=4)
    rig.time.advance(0.12)
    rig.model.freeze("a")
    rig.time.advance(0.05)
    rig.model.thaw("a")
    assert sequence.produced == 2
    rig.time.advance(0.05)
    assert sequence.produced == 3
    rig.time.advance(0.1)
    assert rig.notes.ended == [sequence]


def test_what_is_aborted_while_it_stands_still_does_not_begin_when_it_goes_on():
    rig = Rig()
    stays, gone = rig.submit(total=1), rig.submit(total=1)
    rig.model.freeze("a")
    rig.time.advance(1)
    rig.model.abort(gone)
    rig.model.thaw("a")
    rig.time.advance(1)
    assert rig.notes.tokens == rig.notes.ended == [stays]


def test_one_that_is_aborted_because_of_a_token_of_another_makes_none_in_the_same_step():
    rig = Rig(tps=10)
    first, second = rig.submit(total=5), rig.submit(total=5)
    rig.time.advance(0)
    assert (first.produced, second.produced) == (1, 1)
    note = rig.notes.on_token

    def on_token(sequence):
        note(sequence)
        rig.model.abort(second)

    rig.notes.on_token = on_token
    rig.time.advance(0.1)
    assert (first.produced, second.produced) == (2, 1)
