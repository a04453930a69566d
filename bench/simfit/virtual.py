"""The simulator's engine without sockets, in time that costs none: traces in seconds, the same result every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any

from bench.simfit import trace
from vllm_bootstrap.engines.simulator import sequence
from vllm_bootstrap.engines.simulator.batching import Batching
from vllm_bootstrap.engines.simulator.blocks import Blocks
from vllm_bootstrap.engines.simulator.metrics import Metrics
from vllm_bootstrap.engines.simulator.stepcost import Profile


class Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Time:
    """A clock that jumps from timer to timer."""

    def __init__(self) -> None:
        self.at = 0.0
        self._order = count()
        self._timers: list[tuple[float, int, Timer]] = []

    def now(self) -> float:
        return self.at

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heappush(self._timers, (self.at + delay, next(self._order), timer))
        return timer

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._timers:
            self.at, _, timer = heappop(self._timers)
            if timer.callback is not None:
                timer.callback()


class Client:
    """One request and what its client sees. ``done`` is called at its end."""

    def __init__(self, request: trace.Request, time: Time, done: Callable[[], None]) -> None:
        self.request, self._time, self._done = request, time, done
        self.sent = self.first = self.last = 0.0

    def send(self, engine: Batching) -> None:
        self.sent = self._time.at
        asked = self.request
        engine.submit(
            sequence.Sequence(
                self, prompt_tokens=asked.prompt_tokens, total=asked.output_tokens, priority=asked.priority
            )
        )

    def on_token(self, _: sequence.Sequence) -> None:
        self.last = self._time.at
        self.first = self.first or self.last

    def on_end(self, _: sequence.Sequence) -> None:
        self._done()

    def on_failure(self, _: sequence.Sequence, message: str) -> None:
        raise AssertionError(message)


def engine(profile: Profile, time: Time, slots: int) -> Batching:
    blocks = Blocks(profile.kv_blocks, profile.block_size)
    return Batching(
        profile, slots=slots, budget=profile.max_num_batched_tokens, blocks=blocks, metrics=Metrics(),
        clock=time.now, call_later=time.call_later,
    )  # fmt: skip


def replay(profile: Profile, requests: Sequence[trace.Request], slots: int) -> dict[str, Any]:
    """The figures of ``measure.summary`` for a trace."""
    time = Time()
    batch = engine(profile, time, slots)
    clients = [Client(request, time, lambda: None) for request in requests]
    for client in clients:
        time.call_later(client.request.at, lambda client=client: client.send(batch))
    time.run()
    seconds = max(client.last for client in clients) - requests[0].at
    return {
        "requests": len(clients),
        "failed": 0,
        "seconds": seconds,
        "tokens_per_s": sum(request.output_tokens for request in requests) / seconds,
        "ttft_s": sorted(c.first - c.sent for c in clients),
        "realtime_ttft_s": sorted(c.first - c.sent for c in clients if c.request.cls == "realtime"),
        "token_gap_s": sorted(
            (c.last - c.first) / (c.request.output_tokens - 1) for c in clients if c.request.output_tokens > 1
        ),
    }


def capacity(profile: Profile, requests: Sequence[trace.Request], slots: int) -> float:
    """Requests a second when ``slots`` clients send their next as soon as their last was answered."""
    time = Time()
    batch = engine(profile, time, slots)
    left = list(requests)[::-1]
    ends: list[float] = []

    def following() -> None:
        ends.append(time.at)
        if left:
            Client(left.pop(), time, following).send(batch)

    for _ in range(slots):
        Client(left.pop(), time, following).send(batch)
    time.run()
    middle = ends[slots:-slots]
    return (len(middle) - 1) / (middle[-1] - middle[0])
