"""Has an engine died, was it stopped, or has it only broken a request off? Jobs wait here until that is known.

Invariant: each job that is added leaves exactly once: judged together with the others of its engine, or taken out. Must
not know: what is done with the judgement.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

from vllm_bootstrap.batches.work import Job, Key, Outcome

VERDICT_S = 3.0
"""How long to wait, after an engine broke a request off, for the news that it has ended. A dying vLLM answers all it
has with 500 first, and its process takes a moment to go."""
SETTLING_S = 0.25
"""From that news on: until the others that it had have failed as well."""
MOST_REMEMBERED = 256
"""Engines that have ended and are remembered, for requests that are seen to fail after the news."""


class Verdict(Enum):
    """``STOPPED``: somebody wanted it to end. What it was working on is the cause of that in no case."""

    LIVES = "lives"
    DIED = "died"
    STOPPED = "stopped"


class Broken(NamedTuple):
    """A job that an engine did not carry out. ``number`` counts in the order in which requests were begun.
    ``joined``: it was one of several in its request."""

    number: int
    job: Job
    outcome: Outcome
    joined: bool = False


class _Trial:
    __slots__ = ("broken", "timer")

    def __init__(self, timer: asyncio.TimerHandle) -> None:
        self.broken: list[Broken] = []
        self.timer = timer


class Verdicts:
    """``judged(entries, verdict)`` is called with what one engine broke off, in the order of their beginning."""

    def __init__(self, judged: Callable[[Sequence[Broken], Verdict], None]) -> None:
        self._judged = judged
        self._loop = asyncio.get_running_loop()
        self._trials: dict[str, _Trial] = {}
        self._ended: dict[str, tuple[float, Verdict]] = {}

    @property
    def waiting(self) -> bool:
        """Whether anything waits here."""
        return any(trial.broken for trial in self._trials.values())

    def add(self, launch_id: str, since: float, broken: Sequence[Broken]) -> None:
        """Wait for the news of this engine, which had them ``since`` then (monotonic), unless it has come already."""
        trial = self._trials.get(launch_id)
        if trial is None:
            ended_at, verdict = self._ended.get(launch_id, (-1.0, Verdict.LIVES))
            ended = ended_at >= since
            wait_s, verdict = (SETTLING_S, verdict) if ended else (VERDICT_S, Verdict.LIVES)
            timer = self._loop.call_later(wait_s, self._over, launch_id, verdict)
            trial = self._trials[launch_id] = _Trial(timer)
        trial.broken += broken

    def engine_ended(self, launch_id: str, verdict: Verdict) -> None:
        """That engine is gone, or about to go."""
        self._ended.pop(launch_id, None)
        self._ended[launch_id] = time.monotonic(), verdict
        if len(self._ended) > MOST_REMEMBERED:
            del self._ended[next(iter(self._ended))]
        trial = self._trials.get(launch_id)
        if trial is not None:
            trial.timer.cancel()
            trial.timer = self._loop.call_later(SETTLING_S, self._over, launch_id, verdict)

    def drop(self, key: Key) -> None:
        """Nobody wants to hear of that job any more. It is judged with the others all the same."""
        for trial in self._trials.values():
            for one in trial.broken:
                one.job.dropped = one.job.dropped or one.job.key == key

    def take_out(self, wanted: Callable[[Job], bool]) -> list[Job]:
        """Jobs that are not to be judged any more."""
        taken: list[Job] = []
        for trial in self._trials.values():
            taken += [one.job for one in trial.broken if wanted(one.job)]
            trial.broken = [one for one in trial.broken if not wanted(one.job)]
        return taken

    def close(self) -> None:
        for trial in self._trials.values():
            trial.timer.cancel()
        self._trials.clear()

    def _over(self, launch_id: str, verdict: Verdict) -> None:
        broken = sorted(self._trials.pop(launch_id).broken, key=lambda one: one.number)
        if broken:
            self._judged(broken, verdict)
