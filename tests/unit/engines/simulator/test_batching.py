"""Continuous batching in round numbers: a step takes a second and a block has four tokens, unless a test differs."""

import pytest

from tests.support.batching import Engine


def test_a_token_at_the_end_of_every_step():
    engine = Engine()
    sequence = engine.submit(total=3)
    engine.run()
    assert engine.times(sequence) == [1, 2, 3]
    assert engine.times(sequence, "end") == [3]
    assert engine.time.pending == 0
    assert not engine.batch.busy


def test_what_arrives_together_shares_the_step_and_what_comes_during_it_waits_for_the_next():
    engine = Engine(slots=3)
    one, two = engine.submit(), engine.submit()
    engine.run(0.5)
    late = engine.submit(total=1)
    engine.run()
    assert engine.times(one) == engine.times(two) == [1, 2, 3]
    assert engine.times(late) == [2]


def test_a_step_costs_what_is_in_it():
    engine = Engine(
        step_base_s=0.5, step_sequence_s=0.1, step_context_token_s=0.01, step_prefill_token_s=0.02,
        step_prefill_pair_s=0.001, step_prompt_s=0.3,
    )  # fmt: skip
    sequence = engine.submit(prompt=10, total=2)
    engine.run()
    prefill = 0.5 + 0.3 + 10 * 0.02 + 10 * 5 * 0.001
    assert engine.times(sequence) == [pytest.approx(prefill), pytest.approx(prefill + 0.5 + 0.1 + 10 * 0.01)]


def test_long_prompts_are_read_in_chunks_beside_the_decoding_ones():
    engine = Engine(budget=10)
    decoding = engine.submit(prompt=2, total=8)
    engine.run(1.5)
    long = engine.submit(prompt=25, total=1)
    engine.run()
    # Nine tokens a step are left beside the decoding one: 9 + 9 + 7.
    assert engine.times(long) == [5]
    assert engine.times(decoding) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert engine.metrics.histograms["iteration_tokens_total"].total == 2 + 25 + 7


def test_a_long_prompt_is_cut_so_that_others_share_its_steps():
    engine = Engine(slots=3, budget=10, cut=4)
    decoding = engine.submit(prompt=2, total=8)
    engine.run(1.5)
    long = engine.submit(prompt=15, total=1)
    engine.run(1)
    late = engine.submit(prompt=4, total=1)
    engine.run()
    assert engine.times(late) == [4], "beside the long one's second part"
    assert engine.times(long) == [6], "four a step"
    assert engine.times(decoding) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_long_prompt_that_is_all_there_is_is_not_cut():
    engine = Engine(budget=10, cut=4)
    long = engine.submit(prompt=18, total=1)
    engine.run()
    assert engine.times(long) == [2]


def test_the_budget_goes_to_running_prompts_before_waiting_ones():
    engine = Engine(budget=10)
    first, second = engine.submit(prompt=15, total=1), engine.submit(prompt=10, total=1)
    engine.run(1.5)
    assert (engine.batch.running, engine.batch.waiting) == (
        2,
        0,
    )  # ten of the first; then its five and five of the second
    engine.run()
    assert (engine.times(first), engine.times(second)) == ([2], [3])


def test_slots_are_a_limit_and_a_free_one_is_taken_in_the_next_step():
    engine = Engine(slots=2)
    one, two, three = (engine.submit(total=n) for n in (1, 3, 1))
    engine.run(0.5)
    assert (engine.batch.running, engine.batch.waiting) == (2, 1)
    engine.run()
    assert (engine.times(one), engine.times(three)) == ([1], [2])
    assert engine.ended() == [one, three, two]


def test_waiting_by_priority_then_arrival():
    engine = Engine(slots=1)
    running = engine.submit(total=1)
    engine.run(0.5)
    late, first, second, third = (engine.submit(total=1, priority=p) for p in (5, -1, 0, 0))
    engine.run()
    assert engine.ended() == [running, first, second, third, late]


def test_a_prompt_is_not_begun_before_all_of_it_fits():
    engine = Engine(blocks=4, slots=3)
    one, two = engine.submit(prompt=9, total=1), engine.submit(prompt=8, total=1)
    small = engine.submit(prompt=1, total=1)
    engine.run(0.5)
    # Three of four blocks are taken: the second needs two, and nobody overtakes it.
    assert (engine.batch.running, engine.batch.waiting, engine.used()) == (1, 2, 3)
    engine.run()
    assert engine.ended() == [one, two, small]
    assert engine.metrics.preemptions == 0


def test_without_blocks_the_lowest_priority_loses_all_and_computes_it_anew():
    engine = Engine(blocks=4, step_prefill_token_s=0.1)
    important = engine.submit(prompt=8, total=6)
    other = engine.submit(prompt=8, total=2, priority=9)
    engine.run()
    # Both prompts fill the cache; the first token of the important one takes the other's blocks.
    assert engine.metrics.preemptions == 1
    assert engine.ended() == [important, other]
    assert len(engine.times(other)) == 2
    assert engine.times(other)[0] < engine.times(important)[1]
    # Nine tokens are read again: its prompt and the token it had made, which is not told twice.
    waited = engine.times(important)[-1]
    assert engine.times(other)[1] == pytest.approx(waited + 1 + 9 * 0.1)
    assert engine.used() == 0


def test_a_sequence_that_has_the_lowest_priority_itself_gives_way():
    engine = Engine(blocks=4)
    low, high = engine.submit(prompt=8, total=2, priority=9), engine.submit(prompt=7, total=2)
    engine.run()
    assert engine.metrics.preemptions == 1
    assert engine.ended() == [high, low]


def test_first_come_first_served_preempts_the_one_admitted_last_whatever_its_priority():
    engine = Engine(blocks=5, fcfs=True)
    first = engine.submit(prompt=8, total=4, priority=9)
    engine.run(0.5)
    last = engine.submit(prompt=8, total=4)
    engine.run()
    assert engine.metrics.preemptions == 1
    assert engine.ended() == [first, last]


def test_nobody_is_admitted_in_a_step_that_had_to_preempt():
    engine = Engine(blocks=5, slots=4)
    engine.submit(prompt=8, total=5)
    engine.submit(prompt=8, total=5, priority=5)
    engine.run(0.5)
    engine.submit(prompt=4, total=1, priority=9)
    engine.run(1)
    # The fifth block went to the first, so the second lost its two, which the third could have.
    assert engine.metrics.preemptions == 1
    assert (engine.batch.running, engine.batch.waiting) == (1, 2)
    engine.run()
    assert engine.used() == 0
    assert engine.metrics.finished["stop"] == 3


def test_prompts_with_the_same_beginning_share_blocks_and_time():
    engine = Engine(step_prefill_token_s=0.1, slots=1)
    words = list(range(10))
    one, two = engine.submit(words=words, total=1), engine.submit(words=words, total=1)
    engine.run()
    assert engine.times(one) == [2.0]
    assert engine.times(two) == [pytest.approx(2.0 + 1 + 2 * 0.1)]  # two of ten tokens are in no full block
    assert (engine.metrics.prefix_queries, engine.metrics.prefix_hits) == (20, 8)
    assert engine.used() == 0


def test_the_last_token_is_computed_even_if_all_are_known():
    engine = Engine(slots=1, step_prefill_token_s=0.1)
    words = list(range(8))
    engine.submit(words=words, total=1)
    again = engine.submit(words=words, total=1)
    engine.run()
    assert engine.metrics.prefix_hits == 4
    assert len(engine.times(again)) == 1


def test_what_is_remembered_gives_way_to_what_runs():
    engine = Engine(blocks=3, slots=1)
    words = list(range(8))
    engine.submit(words=words, total=1)
    engine.submit(prompt=12, total=1)
    engine.submit(words=words, total=1)
    engine.run()
    assert engine.metrics.finished["stop"] == 3
    assert engine.metrics.prefix_hits == 0


def test_without_prefix_caching_nothing_is_remembered():
    engine = Engine(caching=False, slots=1)
    for _ in range(2):
        engine.submit(words=list(range(8)), total=1)
    engine.run()
    assert engine.metrics.prefix_hits == 0


@pytest.mark.parametrize("at", [0.0, 0.25, 1.2, 2.5, 3.6])
def test_an_abort_frees_slot_and_blocks_wherever_the_sequence_is(at):
    engine = Engine(slots=1, budget=8, api_request_s=0.1, api_token_s=0.3, latency_s=0.4)
    gone = engine.submit(prompt=12, total=2)
    engine.run(at)
    engine.batch.abort(gone)
    engine.batch.abort(gone)
    assert engine.used() == 0
    assert (engine.batch.running, engine.batch.waiting, engine.batch.busy) == (0, 0, False)
    other = engine.submit(total=1)
    engine.run()
    assert engine.ended() == [other]
    assert engine.metrics.finished["abort"] == 1
    assert engine.time.pending == 0


def test_an_abort_in_the_waiting_queue_lets_the_next_one_by():
    engine = Engine(slots=1)
    engine.submit(total=2)
    waiting, following = engine.submit(), engine.submit(total=1)
    engine.run(0.5)
    engine.batch.abort(waiting)
    assert engine.batch.waiting == 1
    engine.run()
    assert engine.times(following) == [3]


def test_the_api_server_serves_one_thing_at_a_time():
    engine = Engine(slots=4, api_request_s=0.1, api_prompt_token_s=0.01, api_token_s=0.2, latency_s=0.3)
    one, two = engine.submit(prompt=10, total=1), engine.submit(prompt=10, total=1)
    engine.run(0.45)
    assert engine.batch.waiting == 2
    engine.run()
    # In after 0.2 + 0.3, and 0.2 later; a step each, the second's right after the first's; then 0.2 to hand it out.
    assert engine.times(one) == [pytest.approx(0.5 + 1 + 0.2)]
    assert engine.times(two) == [pytest.approx(0.5 + 2 + 0.2)]


def test_a_slow_api_server_holds_answers_up_but_not_the_engine():
    engine = Engine(api_token_s=2.0)
    sequence = engine.submit(total=3)
    engine.run(3.5)
    assert engine.batch.running == 0
    assert engine.batch.busy
    engine.run()
    assert engine.times(sequence) == [3, 5, 7]
    assert engine.metrics.generation_tokens == 3


def test_embeddings_are_prompts_without_tokens():
    engine = Engine(budget=6)
    sequence = engine.submit(prompt=12, total=0)
    engine.run()
    assert engine.times(sequence, "end") == [2]
    assert (engine.metrics.prompt_tokens, engine.metrics.generation_tokens) == (12, 0)


def test_frozen_it_computes_nothing_and_goes_on_where_it_was():
    engine = Engine()
    sequence = engine.submit(total=2)
    engine.run(0.4)
    engine.batch.freeze("a")
    engine.batch.freeze("b")
    late = engine.submit(total=1)
    engine.run(10)
    engine.batch.thaw("a")
    engine.batch.thaw("unknown")
    engine.run(10)
    assert engine.times(sequence) == []
    engine.batch.thaw("b")
    engine.run()
    assert engine.times(sequence) == [21, 22]
    assert engine.times(late) == [22]


def test_thawed_it_begins_what_came_while_it_was_frozen():
    engine = Engine()
    engine.batch.freeze("a")
    sequence = engine.submit(total=1)
    engine.run(5)
    engine.batch.thaw("a")
    engine.run()
    assert engine.times(sequence) == [6]


def test_a_dead_engine_fails_all_wherever_they_are():
    engine = Engine(slots=1, api_token_s=0.5, api_request_s=0.1)
    leaving = engine.submit(total=1)
    engine.run(1.2)
    running, waiting = engine.submit(), engine.submit()
    engine.run(0.9)
    arriving = engine.submit()
    engine.batch.fail("died")
    failed = [of for _, told, of in engine.notes if told == "died"]
    assert set(failed) | set(engine.ended()) == {leaving, running, waiting, arriving}
    assert (engine.batch.dead, engine.batch.busy, engine.used()) == ("died", False, 0)
    engine.run()
    assert engine.time.pending == 0


def test_metrics_agree_with_what_happened():
    engine = Engine(slots=1, api_token_s=0.1)
    one, two = engine.submit(prompt=4, total=3), engine.submit(prompt=6, total=2)
    engine.run()
    histograms = engine.metrics.histograms
    assert (engine.metrics.prompt_tokens, engine.metrics.generation_tokens) == (10, 5)
    assert histograms["request_queue_time_seconds"].total == pytest.approx(3.0)
    assert histograms["time_to_first_token_seconds"].total == pytest.approx(1.1 + 4.1)
    assert (histograms["inter_token_latency_seconds"].count, histograms["inter_token_latency_seconds"].total) == (3, 3)
    assert histograms["request_prefill_time_seconds"].total == pytest.approx(2.0)
    assert histograms["request_decode_time_seconds"].total == pytest.approx(3.0)
    assert histograms["e2e_request_latency_seconds"].total == pytest.approx(3.1 + 5.1)
    assert engine.ended() == [one, two]


def test_a_late_timer_moves_nothing_after_it_but_a_slow_machine_loses_the_time():
    engine = Engine(step_base_s=0.1)
    sequence = engine.submit(total=100)
    engine.time.jump(0.15)
    engine.run(0.85)
    assert sequence.produced == 10
    engine.time.jump(5.0)
    engine.run(0.1)
    assert sequence.produced < 20


def test_no_more_run_than_the_budget_has_tokens_for():
    engine = Engine(slots=5, budget=2)
    first, second, third, fourth = (engine.submit(prompt=0, total=2) for _ in range(4))
    engine.run(0.5)
    assert (engine.batch.running, engine.batch.waiting) == (2, 2)
    engine.run()
    assert engine.times(first) == engine.times(second) == [1, 2]
    assert engine.times(third) == engine.times(fourth) == [3, 4]


def test_nobody_hears_of_a_token_that_was_on_its_way_out_when_the_engine_died():
    engine = Engine(api_token_s=0.5)
    sequence = engine.submit(total=1)
    engine.run(1.2)
    engine.batch.fail("died")
    engine.run()
    assert [told for _, told, of in engine.notes if of is sequence] == ["died"]
