"""Batching at fixed rates: slots, a waiting queue by priority, prefill time, one token per step. PURE.

What a sequence takes does not depend on what else runs, which is what tests of everything around an engine want; see
``batching`` for an engine that behaves as a real one under load.

Invariant: at most ``slots`` sequences run; a sequence that ended or was aborted holds no slot from that moment on,
and the longest waiting of the lowest priority number takes it. Counters move exactly when tokens do.
It must not know requests, sockets or text: a sequence is a number of tokens and a sink that is told of each.
Clock and timers are given, so that tests bring their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vllm_bootstrap.engines.simulator.metrics import Metrics
from vllm_bootstrap.engines.simulator.sequence import DECODE, ENDED, PREFILL, WAITING, Sequence, Timer, Waiting

# Below this a timer cannot be kept: the step is made at once and the clock catches up.
SHORTEST_WAIT_S = 0.0005
MAX_LAG_STEPS = 20


class Model:
    """The batch. Rates in tokens per second: ``tokens_per_second`` of each running sequence, 0 for no waiting."""

    def __init__(
        self,
        *,
        slots: int,
        tokens_per_second: float,
        prefill_tokens_per_second: float,
        capacity_tokens: int,
        metrics: Metrics,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], Timer],
    ) -> None:
        self.slots = slots
        self.dead: str | None = None
        self._interval = 1 / tokens_per_second if tokens_per_second else 0.0
        self._prefill_rate = prefill_tokens_per_second
        self._capacity = capacity_tokens
        self._metrics = metrics
        self._clock = clock
        self._call_later = call_later
        self._queue = Waiting()
        self._running: dict[Sequence, None] = {}
        self._decoding: dict[Sequence, None] = {}
        self._held: list[Sequence] = []
        self._frozen_by: set[str] = set()
        self._step_timer: Timer | None = None
        self._next_step_at = 0.0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether anybody is still to be answered."""
        return bool(self._running or self._queue)

    @property
    def cache_usage(self) -> float:
        """Part of the pretended KV cache in use, 0 to 1."""
        used = sum(s.prompt_tokens + s.produced for s in self._running)
        return min(1.0, used / self._capacity)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; it may start at once."""
        sequence.arrived_at = self._clock()
        self._queue.push(sequence)
        self._admit()

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence nobody waits for any more. Frees its slot at once. Idempotent."""
        if sequence.state != ENDED:
            self._leave(sequence, "abort")
            self._admit()

    def freeze(self, reason: str) -> None:
        """Stand still until every reason is gone: nothing is produced, requests stay where they are."""
        self._frozen_by.add(reason)

    def thaw(self, reason: str) -> None:
        self._frozen_by.discard(reason)
        if not self._frozen_by:
            if self._step_timer is None:
                self._next_step_at = self._clock()
                self._schedule_step()
            held, self._held = self._held, []
            for sequence in held:
                if sequence.state == PREFILL:
                    self._prefilled(sequence)

    def fail(self, message: str) -> None:
        """The engine died: everything running or waiting fails, nothing more is taken."""
        self.dead = message
        for sequence in [*self._running, *self._queue.clear()]:
            self._leave(sequence, "error")
            sequence.sink.on_failure(sequence, message)

    def _admit(self) -> None:
        while len(self._running) < self.slots and (sequence := self._queue.peek()) is not None:
            self._queue.pop()
            self._running[sequence] = None
            sequence.state = PREFILL
            sequence.admitted_at = self._clock()
            delay = sequence.prompt_tokens / self._prefill_rate if self._prefill_rate else 0.0
            sequence.timer = self._call_later(delay, partial(self._prefilled, sequence))

    def _prefilled(self, sequence: Sequence) -> None:
        sequence.timer = None
        if self._frozen_by:
            self._held.append(sequence)
            return
        sequence.first_at = self._clock()
        self._metrics.prompt_tokens += sequence.prompt_tokens
        if sequence.total == 0:
            self._end(sequence)
            return
        sequence.state = DECODE
        self._decoding[sequence] = None
        at_once = not self._interval and not sequence.streamed
        self._produce(sequence, sequence.total if at_once else 1)
        if self._step_timer is None:
            self._next_step_at = sequence.first_at
            self._schedule_step()

    def _produce(self, sequence: Sequence, tokens: int) -> None:
        sequence.produced += tokens
        self._metrics.generation_tokens += tokens
        sequence.sink.on_token(sequence)
        if sequence.produced >= sequence.total and sequence.state == DECODE:
            self._end(sequence)

    def _schedule_step(self) -> None:
        if not self._decoding or self._frozen_by or self._step_timer is not None:
            return
        now = self._clock()
        self._next_step_at += self._interval
        if self._next_step_at < now - MAX_LAG_STEPS * self._interval:
            self._next_step_at = now  # the machine is too slow for this rate: time lost is lost
        wait = self._next_step_at - now
        self._step_timer = self._call_later(wait if wait > SHORTEST_WAIT_S else 0.0, self._step)

    def _step(self) -> None:
        self._step_timer = None
        if self._frozen_by:
            return
        batch = [*self._decoding]
        self._metrics.observe("iteration_tokens_total", len(batch))
        for sequence in batch:
            if sequence.state == DECODE:
                self._produce(sequence, 1)
        self._schedule_step()

    def _end(self, sequence: Sequence) -> None:
        self._leave(sequence, sequence.finish_reason)
        sequence.sink.on_end(sequence)
        self._admit()

    def _leave(self, sequence: Sequence, reason: str) -> None:
        was, sequence.state = sequence.state, ENDED
        if was == WAITING and self._queue:
            self._queue.gone()
        if sequence.timer is not None:
            sequence.timer.cancel()
            sequence.timer = None
        self._running.pop(sequence, None)
        self._decoding.pop(sequence, None)
        self._metrics.finished[reason] += 1
        self._observe(sequence)

    def _observe(self, sequence: Sequence) -> None:
        now, m = self._clock(), self._metrics
        m.observe("e2e_request_latency_seconds", now - sequence.arrived_at)
        if sequence.admitted_at:
            m.observe("request_queue_time_seconds", sequence.admitted_at - sequence.arrived_at)
            m.observe("request_inference_time_seconds", now - sequence.admitted_at)
        if sequence.first_at:
            decode = now - sequence.first_at
            m.observe("time_to_first_token_seconds", sequence.first_at - sequence.arrived_at)
            m.observe("request_prefill_time_seconds", sequence.first_at - sequence.admitted_at)
            m.observe("request_decode_time_seconds", decode)
            m.observe("request_prompt_tokens", sequence.prompt_tokens)
            m.observe("request_generation_tokens", sequence.produced)
            if sequence.produced > 1:
                m.observe("inter_token_latency_seconds", decode / (sequence.produced - 1), sequence.produced - 1)
                m.observe("request_time_per_output_token_seconds", decode / (sequence.produced - 1))
