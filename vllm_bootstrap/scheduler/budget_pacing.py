"""When batch prompts are let in while realtime is active. PURE.

Invariant: the next batch prompt waits at least as long as the last one takes to be processed, as far as is known, so
that no more than one of them lies in a step with a realtime prompt; and it lets a realtime answer begin that is about
to, but does not wait for more than one of them: where there is always one, batch goes on.

An answer that comes whole shows no first byte, so the end of its prompt is reckoned: tokens times the seconds a token
took lately. The engine counts the seconds from a prompt's first step to its first token; where prompts overlap, that
is more than each took, so the least of the last looks counts.

A realtime request that comes while a batch prompt is processed waits for the end of it, or of the part that the engine
takes at once. Where that is more than realtime bears, one prompt at a time is too many: then batch rests after each for
a multiple of what it takes. That multiple follows realtime's answers alone, whatever the engine is: twice as much for
a prompt that has made some late, and for each other answer so much less that both even out where ``LATE_SHARE`` of
all are made late. It does not depend on how well the time of a prompt is known.

Engines stand still for a moment for other reasons, and a dozen answers are late at once. So a dozen double the multiple
once only, and keep it for longer: they have to be evened out before it falls, up to ``MOST_OWED``. And an answer that
is late where no prompt was in its way shows that some that came after one are late by chance: the first since the last
prompt takes a part of a doubling back.
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
# What one answer in a hundred may be, less what is late for other reasons; and by what the multiple moves.
LATE_SHARE = 0.006
STRETCH_BY = 2.0
# In doublings: what an answer takes back that was late without a prompt in its way, and most that is kept in mind.
ELSEWHERE, MOST_OWED = 0.25, 4.0
# The eighth late answer from the last that doubled it, none in time between them, doubles it once more: prompts that
# last longer than is known.
RUN = 8
LONGEST_REST_S = 60.0
# Of the requests that come while a prompt is processed four in five come within so many times what it makes them late.
IN_THE_WAY = 4.0
# What was learnt so long ago is forgotten: realtime that shows no first byte would never unlearn it.
FORGET_S = 600.0


class Pacing:
    """Knows the one batch prompt that is in the engine, if any."""

    def __init__(self) -> None:
        self._looks: deque[float] = deque(maxlen=LOOKS)
        self._request: int | None = None
        self._granted_at = self._until = -math.inf
        self._took_s = 0.0
        self._stretch = 1.0
        self._suspect = self._blamed = self._excused = False
        # Doublings that are kept in mind, and late answers in a row.
        self._owed, self._run = 0.0, 0
        self._answered_at = -math.inf
        self._wanted_at: float | None = None
        self._begins_at, self._begins_in_s = -math.inf, 0.0

    @property
    def token_s(self) -> float:
        """Seconds that a prompt token takes."""
        return min(self._looks, default=FIRST_GUESS_S)

    def granted(self, request: int, prompt_tokens: int, now: float, *, beside: bool) -> None:
        """A batch prompt goes to the engine; behind another one where that was let in for some other reason.
        ``beside``: while realtime is active."""
        self._request, self._wanted_at, self._granted_at = request, None, now
        self._suspect, self._blamed, self._excused = beside, False, False
        if now - self._answered_at > FORGET_S:
            self._stretch, self._owed, self._run = 1.0, 0.0, 0
        self._took_s = min(prompt_tokens * self.token_s, LONGEST_S)
        self._until = max(now, self._until) + self._took_s

    def over(self, request: int, now: float, *, worked: bool = True) -> None:
        """That prompt is done: its answer has begun, or it ended; not ``worked``: it was taken back before that."""
        if request == self._request:
            self._request, self._until = None, min(self._until, now)
            if not worked:
                self._took_s, self._suspect = 0.0, False

    @property
    def rest_s(self) -> float:
        """How long no batch prompt comes after the last one."""
        return min((self._stretch - 1) * self._took_s, LONGEST_REST_S)

    def answered(self, sent_at: float, late_s: float, late: bool, now: float, *, batch: bool = True) -> None:
        """A realtime answer began now, ``late_s`` later than is usual alone. ``late``: that is more than it bears.
        ``batch``: there is any, running or waiting; else nothing is learnt."""
        self._answered_at = now
        if not late:
            self._run = 0
        if not batch:
            return
        if not late:
            self._forgive(LATE_SHARE)
        elif sent_at - self._granted_at > max(self._took_s, IN_THE_WAY * late_s):
            # Once for each prompt: where it lasts longer than is known, those it makes late seem to come after it.
            self._forgive(LATE_SHARE if self._excused else ELSEWHERE)
            self._excused = True
        elif self._suspect and now - late_s >= self._granted_at:
            self._blame()

    def _blame(self) -> None:
        """A prompt may have made this answer late."""
        self._run += 1
        if self._blamed or 1 < self._run < RUN:
            self._owed = min(self._owed + 1, MOST_OWED)
            return
        self._blamed, self._run = True, 1
        most = 1 + LONGEST_REST_S / max(self._took_s, LEAST_S)
        self._stretch = max(self._stretch, min(self._stretch * STRETCH_BY, most))

    def _forgive(self, doublings: float) -> None:
        """This answer speaks for the prompts."""
        paid = min(self._owed, doublings)
        self._owed -= paid
        self._stretch = max(1.0, self._stretch * STRETCH_BY ** (paid - doublings))

    def wanted(self, now: float) -> None:
        """A batch request ended, so that another may come."""
        if self._wanted_at is None:
            self._wanted_at = now

    def realtime(self, begins_in_s: float, now: float) -> None:
        """A realtime prompt goes to the engine; its answer is expected to begin so much later."""
        self._begins_at, self._begins_in_s = now + begins_in_s, begins_in_s

    def until(self, now: float, *, rest: bool = True) -> float | None:
        """When the next may go; None: at once. ``rest``: whether batch rests after the last one."""
        over_at = self._until + self.rest_s if rest else self._until
        since = over_at if self._wanted_at is None else max(over_at, self._wanted_at)
        until = max(over_at, min(self._begins_at, since + self._begins_in_s))
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
