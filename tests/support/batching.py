"""A simulated engine under a clock that stands still: a profile of round numbers, and a sink that remembers."""

from __future__ import annotations

from typing import Any

from tests.support.fake_time import FakeTime
from vllm_bootstrap.engines.simulator.batching import Batching
from vllm_bootstrap.engines.simulator.blocks import Blocks, prefix_hashes
from vllm_bootstrap.engines.simulator.metrics import Metrics
from vllm_bootstrap.engines.simulator.sequence import Sequence
from vllm_bootstrap.engines.simulator.stepcost import Profile

BLOCK = 4


def profile(**changed: Any) -> Profile:
    """A step takes a second, whatever is in it, unless said otherwise."""
    fields = {"name": "round", "source": "a test", "measured": False, "step_base_s": 1.0, "block_size": BLOCK}
    return Profile(**{**fields, **changed})


class Engine:
    """``notes``: (time, what, sequence) of everything that sinks were told."""

    def __init__(self, *, slots=2, budget=100, blocks=100, caching=True, fcfs=False, cut=0, **costs: Any) -> None:
        self.time, self.metrics = FakeTime(0.0), Metrics()
        self.blocks = Blocks(blocks, BLOCK, caching=caching)
        self.notes: list[tuple[float, str, Sequence]] = []
        self.batch = Batching(
            profile(**costs), slots=slots, budget=budget, blocks=self.blocks, metrics=self.metrics,
            clock=self.time.now, call_later=self.time.call_later, fcfs=fcfs, cut=cut,
        )  # fmt: skip

    def on_token(self, sequence: Sequence) -> None:
        self.notes.append((self.time.now(), "token", sequence))

    def on_end(self, sequence: Sequence) -> None:
        self.notes.append((self.time.now(), "end", sequence))

    def on_failure(self, sequence: Sequence, message: str) -> None:
        self.notes.append((self.time.now(), message, sequence))

    def submit(self, prompt=4, total=3, priority=0, words: list[object] | None = None) -> Sequence:
        """``words``: the prompt itself, for the prefix cache; its length is then the prompt's."""
        prefix = prefix_hashes(words, BLOCK) if words else ()
        sequence = Sequence(
            self, prompt_tokens=len(words) if words else prompt, total=total, priority=priority, prefix=prefix
        )
        self.batch.submit(sequence)
        return sequence

    def times(self, sequence: Sequence, what: str = "token") -> list[float]:
        return [round(at, 6) for at, told, of in self.notes if told == what and of is sequence]

    def ended(self) -> list[Sequence]:
        return [of for _, told, of in self.notes if told == "end"]

    def used(self) -> int:
        return self.blocks.total - self.blocks.free

    def run(self, seconds: float = 1000.0) -> None:
        self.time.advance(seconds)
