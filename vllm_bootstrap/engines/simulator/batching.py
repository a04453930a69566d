"""Continuous batching as vLLM does it, in the time that a profile says. PURE.

Each step takes one token of every running sequence that decodes and as many prompt tokens as the token budget leaves;
then, if nobody had to be preempted, sequences from the waiting queue while there are slots, budget and blocks. Who
runs first was admitted first. When blocks run out the sequence with the highest priority number, the youngest of them,
loses all of its blocks and waits again; what is not remembered of it is computed anew. A step takes what the profile
says; the tokens come out at its end and then pass the API server, which serves one thing at a time.

Invariant: at most ``slots`` sequences run; no step has more tokens than the budget; blocks are never over-committed,
and a sequence that ended, was preempted or aborted holds none. Time is planned: a late timer moves nothing after it,
unless the machine is too slow for the profile.
It must not know requests, sockets or text. Clock and timers are given, so that tests bring their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from vllm_bootstrap.engines.simulator.blocks import Blocks
from vllm_bootstrap.engines.simulator.metrics import Metrics
from vllm_bootstrap.engines.simulator.sequence import DECODE, ENDED, LEAVING, PREFILL, WAITING, Sequence, Timer, Waiting
from vllm_bootstrap.engines.simulator.stepcost import Profile

# How far the plan may lie behind the clock before the time is given up as lost.
MAX_LAG_S = 0.25


class Batching:
    """The engine. ``slots``: sequences that run at once; ``budget``: tokens of a step; ``cut``: of one prompt in a
    step, if it is not alone (0: no limit); ``fcfs``: the one admitted last is preempted, whatever its priority."""

    def __init__(
        self,
        profile: Profile,
        *,
        slots: int,
        budget: int,
        blocks: Blocks,
        metrics: Metrics,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], Timer],
        cut: int = 0,
        fcfs: bool = False,
    ) -> None:
        self.slots = slots
        self.dead: str | None = None
        self._profile = profile
        self._budget = budget
        self._cut = cut or budget
        self._blocks = blocks
        self._metrics = metrics
        self._clock = clock
        self._call_later = call_later
        self._fcfs = fcfs
        self._queue = Waiting()
        self._arriving: dict[Sequence, None] = {}
        self._running: dict[Sequence, None] = {}
        self._chunks: dict[Sequence, int] = {}
        self._outbox: deque[tuple[float, list[Sequence]]] = deque()
        self._leaving: dict[Sequence, None] = {}
        self._step_timer: Timer | None = None
        self._step_ends = 0.0
        self._api_free_at = 0.0
        self._frozen_by: set[str] = set()
        self._frozen_at = 0.0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Those that wait for a place, and those still on their way through the API server."""
        return len(self._queue) + len(self._arriving)

    @property
    def busy(self) -> bool:
        """Whether anybody is still to be answered."""
        return bool(self._running or self.waiting or self._leaving)

    @property
    def cache_usage(self) -> float:
        return self._blocks.usage

    # requests

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence; it is in the engine when the API server is through with it."""
        profile = self._profile
        sequence.arrived_at = self._clock()
        cost = profile.api_request_s + profile.api_prompt_token_s * sequence.prompt_tokens
        self._api_free_at = max(self._api_free_at, sequence.arrived_at) + cost
        self._arriving[sequence] = None
        at = self._api_free_at + profile.latency_s
        sequence.timer = self._call_later(max(0.0, at - sequence.arrived_at), partial(self._enqueue, sequence, at))

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence nobody waits for any more. Frees its slot and blocks at once. Idempotent."""
        if sequence.state == ENDED:
            return
        self._remove(sequence)
        self._metrics.finished["abort"] += 1

    def freeze(self, reason: str) -> None:
        """Stand still until every reason is gone: nothing is computed, requests stay where they are."""
        if not self._frozen_by:
            self._frozen_at = self._clock()
            if self._step_timer is not None:
                self._step_timer.cancel()
        self._frozen_by.add(reason)

    def thaw(self, reason: str) -> None:
        if reason not in self._frozen_by:
            return
        self._frozen_by.discard(reason)
        if self._frozen_by:
            return
        if self._step_timer is not None:
            self._step_ends += self._clock() - self._frozen_at
            self._arm()
        else:
            self._wake(self._clock())

    def fail(self, message: str) -> None:
        """The engine died: everything that is not answered fails, nothing more is taken."""
        self.dead = message
        if self._step_timer is not None:
            self._step_timer.cancel()
            self._step_timer = None
        for sequence in [*self._leaving, *self._running, *self._queue.clear(), *self._arriving]:
            self._remove(sequence)
            self._metrics.finished["error"] += 1
            sequence.sink.on_failure(sequence, message)
        self._outbox.clear()

    def _enqueue(self, sequence: Sequence, at: float) -> None:
        sequence.timer = None
        del self._arriving[sequence]
        sequence.queued_at = at
        self._queue.push(sequence)
        self._wake(at)

    def _remove(self, sequence: Sequence) -> None:
        was, sequence.state = sequence.state, ENDED
        if sequence.timer is not None:
            sequence.timer.cancel()
            sequence.timer = None
        if sequence in self._arriving:
            del self._arriving[sequence]
        elif was == WAITING and self._queue.entries:
            self._queue.gone()
        self._running.pop(sequence, None)
        self._leaving.pop(sequence, None)
        self._blocks.release(sequence)

    # steps

    def _wake(self, at: float) -> None:
        """Begin a step at the planned time when none is under way and there is work."""
        if self._step_timer is None and not self._frozen_by and (self._running or self._queue):
            # At the loop's next turn: what arrives together shares the step.
            self._chunks = {}
            self._step_ends = at
            self._arm()

    def _arm(self) -> None:
        self._step_timer = self._call_later(max(0.0, self._step_ends - self._clock()), self._step)

    def _step(self) -> None:
        """The end of one step, and the beginning of the next."""
        self._step_timer = None
        now = self._step_ends
        chunks, self._chunks = self._chunks, {}
        produced = self._finish(chunks, now) if chunks else []
        self._chunks = self._plan(now)
        if self._chunks:
            lag = self._clock() - now
            began = now + lag if lag > MAX_LAG_S else now
            self._step_ends = began + self._duration()
            self._arm()
        if produced:
            self._send(produced, now)

    def _plan(self, now: float) -> dict[Sequence, int]:
        """Who computes how many tokens in the step that begins now. There is budget for all that run: each was admitted
        with some left over from those before it, which take one token each from then on."""
        chunks: dict[Sequence, int] = {}
        left, preempted = self._budget, False
        most = self._cut if len(self._running) + len(self._queue) > 1 else left
        for sequence in [*self._running]:
            if sequence.state == WAITING:  # preempted for one before it
                continue
            tokens = min(sequence.length - sequence.computed, left, most)
            while sequence.computed + tokens > sequence.room and not self._room(sequence, tokens):
                victim = self._victim()
                left += chunks.pop(victim, 0)
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            if sequence.state != WAITING:
                chunks[sequence] = tokens
                left -= tokens
        if not preempted:
            self._admit(chunks, left, most, now)
        return chunks

    def _room(self, sequence: Sequence, tokens: int) -> bool:
        if not self._blocks.grow(sequence, sequence.computed + tokens):
            return False
        self._blocks.remember(sequence, sequence.computed + tokens)
        return True

    def _admit(self, chunks: dict[Sequence, int], left: int, most: int, now: float) -> None:
        while left > 0 and len(self._running) < self.slots and (sequence := self._queue.peek()) is not None:
            hits = self._blocks.hits(sequence)
            if not self._blocks.fits(sequence, hits):
                return
            self._queue.pop()
            self._blocks.adopt(sequence, hits)
            tokens = min(sequence.length - sequence.computed, left, most)
            self._room(sequence, tokens)
            self._running[sequence] = None
            sequence.state = PREFILL
            if not sequence.admitted_at:
                sequence.admitted_at = now
                self._metrics.prefix_queries += sequence.prompt_tokens
                self._metrics.prefix_hits += sequence.computed
                self._metrics.observe("request_queue_time_seconds", now - sequence.queued_at)
            chunks[sequence] = tokens
            left -= tokens

    def _victim(self) -> Sequence:
        if self._fcfs:
            return next(reversed(self._running))
        return max(self._running, key=lambda sequence: (sequence.priority, sequence.order))

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence]
        self._blocks.release(sequence)
        sequence.state = WAITING
        self._queue.push(sequence)
        self._metrics.preemptions += 1

    def _duration(self) -> float:
        decodes = context = prompts = prefill = tokens = 0
        pairs = 0.0
        for sequence, size in self._chunks.items():
            tokens += size
            if sequence.state == DECODE:
                decodes += 1
                context += sequence.computed
            else:
                prompts += 1
                prefill += size
                pairs += size * (sequence.computed + size / 2)
        self._metrics.observe("iteration_tokens_total", tokens)
        return self._profile.step_s(decodes, context, prompts, prefill, pairs)

    def _finish(self, chunks: dict[Sequence, int], now: float) -> list[Sequence]:
        """Book what was computed; those that have a token, or are read to the end, are to be told."""
        told: list[Sequence] = []
        gaps: dict[float, int] = {}
        for sequence, tokens in chunks.items():
            if sequence.state not in (PREFILL, DECODE):
                continue  # aborted meanwhile
            sequence.computed += tokens
            if sequence.computed < sequence.length:
                continue
            sequence.state = DECODE
            if not sequence.first_at:
                sequence.first_at = now
            else:
                gap = now - sequence.last_at
                gaps[gap] = gaps.get(gap, 0) + 1
            sequence.last_at = now
            told.append(sequence)
            if sequence.total:
                sequence.length += 1
                sequence.generated += 1
            if sequence.generated >= sequence.total:
                self._retire(sequence)
        for gap, times in gaps.items():
            self._metrics.observe("inter_token_latency_seconds", gap, times)
        return told

    def _retire(self, sequence: Sequence) -> None:
        del self._running[sequence]
        self._blocks.release(sequence)
        sequence.state = LEAVING
        self._leaving[sequence] = None

    # the way out

    def _send(self, sequences: list[Sequence], now: float) -> None:
        """Hand out one token of each, after the API server had its time for them."""
        cost = self._profile.api_step_s + self._profile.api_token_s * len(sequences)
        if not cost and not self._outbox:
            self._deliver(sequences, now)
            return
        self._api_free_at = max(self._api_free_at, now) + cost
        self._outbox.append((self._api_free_at, sequences))
        self._call_later(max(0.0, self._api_free_at - self._clock()), self._deliver_next)

    def _deliver_next(self) -> None:
        if self._outbox:  # else the engine died meanwhile
            at, sequences = self._outbox.popleft()
            self._deliver(sequences, at)

    def _deliver(self, sequences: list[Sequence], at: float) -> None:
        metrics = self._metrics
        for sequence in sequences:
            if sequence.state == ENDED:
                continue
            if not sequence.produced:
                metrics.prompt_tokens += sequence.prompt_tokens
                metrics.observe("time_to_first_token_seconds", at - sequence.arrived_at)
            if sequence.total:
                sequence.produced += 1
                metrics.generation_tokens += 1
                sequence.sink.on_token(sequence)
            if sequence.produced >= sequence.total and sequence.state == LEAVING:
                self._end(sequence, at)

    def _end(self, sequence: Sequence, at: float) -> None:
        self._remove(sequence)
        metrics = self._metrics
        decode = sequence.last_at - sequence.first_at
        metrics.finished[sequence.finish_reason] += 1
        metrics.observe("e2e_request_latency_seconds", at - sequence.arrived_at)
        metrics.observe("request_inference_time_seconds", sequence.last_at - sequence.admitted_at)
        metrics.observe("request_prefill_time_seconds", sequence.first_at - sequence.admitted_at)
        metrics.observe("request_decode_time_seconds", decode)
        metrics.observe("request_prompt_tokens", sequence.prompt_tokens)
        metrics.observe("request_generation_tokens", sequence.produced)
        if sequence.produced > 1:
            metrics.observe("request_time_per_output_token_seconds", decode / (sequence.produced - 1))
        sequence.sink.on_end(sequence)
