"""A sequence, who is told of it, and the queue in which it waits. Shared by the two ways of batching. PURE.

Invariant: the queue gives the lowest priority number first and the longest waiting among equals; a sequence that was
taken out of it costs no memory for long.
It must not know requests, sockets or text: a sequence is a number of tokens and a sink that is told of each.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count
from typing import Protocol

# LEAVING: the engine is done with it, the API server has tokens of it still to hand out.
WAITING, PREFILL, DECODE, LEAVING, ENDED = range(5)
_MAY_BE_GONE = 64


class Timer(Protocol):
    def cancel(self) -> None: ...


class Sink(Protocol):
    """Who is told. ``on_token``: ``produced`` grew; ``on_end``: all tokens are there and the slot is free;
    ``on_failure``: the engine died under it. None of them may raise."""

    def on_token(self, sequence: Sequence) -> None: ...
    def on_end(self, sequence: Sequence) -> None: ...
    def on_failure(self, sequence: Sequence, message: str) -> None: ...


class Batch(Protocol):
    """The engine as the routes see it. ``dead`` says what it died of."""

    dead: str | None

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    @property
    def cache_usage(self) -> float: ...
    def submit(self, sequence: Sequence) -> None: ...
    def abort(self, sequence: Sequence) -> None: ...
    def freeze(self, reason: str) -> None: ...
    def thaw(self, reason: str) -> None: ...
    def fail(self, message: str) -> None: ...


class Sequence:
    """One sequence of one request. ``total`` tokens are wanted (0: only prefill, as for an embedding).

    ``streamed`` sequences get their tokens one by one even when no time is to pass between them. ``prefix``: a hash
    of each full block of the prompt and all before it, for the prefix cache. ``produced`` tokens were handed out.
    """

    __slots__ = (
        "admitted_at", "arrived_at", "computed", "finish_reason", "first_at", "generated", "held", "index", "last_at",
        "length", "order", "prefix", "priority", "produced", "prompt_tokens", "queued_at", "remembered", "room",
        "sent", "sink", "state", "streamed", "timer", "total",
    )  # fmt: skip

    def __init__(
        self, sink: Sink, *, prompt_tokens: int, total: int, priority: int = 0, index: int = 0,
        streamed: bool = False, finish_reason: str = "stop", prefix: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.sink = sink
        self.prompt_tokens = prompt_tokens
        self.total = total
        self.priority = priority
        self.index = index
        self.streamed = streamed
        self.finish_reason = finish_reason
        self.prefix = prefix
        self.produced = 0
        self.sent = 0
        self.state = WAITING
        self.timer: Timer | None = None
        self.arrived_at = self.admitted_at = self.first_at = self.last_at = self.queued_at = 0.0
        self.order = 0
        # Of the engine with a KV cache: tokens that are to be in the cache, that are, and that have room; tokens made;
        # which blocks of ``prefix`` are held, and how many of them were looked at.
        self.length = max(1, prompt_tokens)
        self.computed = self.room = self.generated = self.remembered = 0
        self.held: list[int] = []


class Waiting:
    """The waiting queue. ``len`` is the number of sequences that wait."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, Sequence]] = []
        self._order = count(1)
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence; one that was queued before keeps its place among equals."""
        sequence.order = sequence.order or next(self._order)
        heappush(self.entries, (sequence.priority, sequence.order, sequence))
        self._waiting += 1

    def peek(self) -> Sequence | None:
        """Who is next."""
        while self.entries:
            if self.entries[0][2].state == WAITING:
                return self.entries[0][2]
            heappop(self.entries)
        return None

    def pop(self) -> None:
        """Take out the one that ``peek`` showed."""
        heappop(self.entries)
        self._waiting -= 1

    def gone(self) -> None:
        """A sequence in the queue is no longer ``WAITING``."""
        self._waiting -= 1
        # Those gone stay in the heap until their turn; without this a full engine would keep every one of them.
        if len(self.entries) > 2 * self._waiting + _MAY_BE_GONE:
            self.entries = [entry for entry in self.entries if entry[2].state == WAITING]
            heapify(self.entries)

    def clear(self) -> list[Sequence]:
        """Empty the queue; those that waited."""
        waiting = [entry[2] for entry in sorted(self.entries, key=lambda e: e[:2]) if entry[2].state == WAITING]
        self.entries.clear()
        self._waiting = 0
        return waiting
