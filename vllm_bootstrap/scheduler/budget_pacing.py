"""When batch prompts are let in while realtime is active. PURE.

Invariant: the next batch prompt waits at least as long as the last one takes to be processed, as far as is known, so
that no more than one of them lies in a step with a realtime prompt; and it lets a realtime answer begin that is about
to, but does not wait for more than one of them: where there is always one, batch goes on.

An answer that comes whole shows no first byte, so the end of its prompt is reckoned: tokens times the seconds a token
took lately. The engine counts the seconds from a prompt's first step to its first token; where prompts overlap, that
is more than each took, so the least of the last looks counts.
"""

from __future__ import annotations

import math
from collections import deque

from vllm_bootstrap.scheduler.ports import EngineSignals

# A slow engine until it is known better; bounds against nonsense.
FIRST_GUESS_S, LEAST_S, MOST_S = 1 / 4000, 1e-6, 1e-2
LOOKS = 8
# No prompt keeps the next one out for longer than this: an estimate of tokens can be far off.
LONGEST_S = 5.0


class Pacing:
    """Knows the one batch prompt that is in the engine, if any."""

    def __init__(self) -> None:
        self._looks: deque[float] = deque(maxlen=LOOKS)
        self._request: int | None = None
        self._until = -math.inf
        self._wanted_at: float | None = None
        self._begins_at, self._begins_in_s = -math.inf, 0.0

    @property
    def token_s(self) -> float:
        """Seconds that a prompt token takes."""
        return min(self._looks, default=FIRST_GUESS_S)

    def granted(self, request: int, prompt_tokens: int, now: float) -> None:
        """A batch prompt goes to the engine; behind another one where that was let in for some other reason."""
        self._request, self._wanted_at = request, None
        self._until = max(now, self._until) + min(prompt_tokens * self.token_s, LONGEST_S)

    def over(self, request: int, now: float) -> None:
        """That prompt is done: its answer has begun, or it ended."""
        if request == self._request:
            self._request, self._until = None, min(self._until, now)

    def wanted(self, now: float) -> None:
        """A batch request ended, so that another may come."""
        if self._wanted_at is None:
            self._wanted_at = now

    def realtime(self, begins_in_s: float, now: float) -> None:
        """A realtime prompt goes to the engine; its answer is expected to begin so much later."""
        self._begins_at, self._begins_in_s = now + begins_in_s, begins_in_s

    def until(self, now: float) -> float | None:
        """When the next may go; None: at once."""
        since = self._until if self._wanted_at is None else max(self._until, self._wanted_at)
        until = max(self._until, min(self._begins_at, since + self._begins_in_s))
        return until if now < until else None

    def signals(self, before: EngineSignals, now: EngineSignals) -> None:
        """Two looks at the engine's counters, one after the other."""
        token_s = ratio(
            grown(before.prefill_seconds_sum, now.prefill_seconds_sum), grown(before.prompt_tokens, now.prompt_tokens)
        )
        if token_s is not None:
            self._looks.append(min(max(token_s, LEAST_S), MOST_S))


def grown(before: float | None, now: float | None) -> float | None:
    """How much a counter has grown. None: unknown, or the engine was started anew."""
    return None if now is None or before is None or now < before else now - before


def ratio(part: float | None, whole: float | None) -> float | None:
    """None where either is unknown or nothing."""
    return part / whole if part and whole else None
