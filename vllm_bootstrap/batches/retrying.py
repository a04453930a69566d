"""An attempt of a line has ended: is that its record, or is it tried again, and when? Facts in, decision out. PURE.

Invariant: every input resolves to exactly one outcome, and a line is tried a bounded number of times unless what keeps
it from running lies outside of it (no model, no key, no room), in which case nothing is counted against it.

The engine died with it:

1. who did that is found elsewhere (``isolation``)           -> Again, at once, not counted

The engine answered:

2. 2xx                                                       -> Final
3. 429: it has no room                                       -> Again, not counted; from ``MAX_UNCOUNTED`` in a row on
                                                                as (5)
4. 408, 409, 425, 5xx but 501: it may be otherwise next time -> as (5)
5. counted tries are left                                    -> Again, counted; else Final
6. anything else: the same request gets the same answer      -> Final

The gateway has an error instead:

7. cancelled by somebody                                     -> Final
8. 401, 403: the key is not valid or may not do this         -> WaitForKey
9. 429: the key's limits, or a full queue                    -> SlowDown
10. the disk is full or fails                                -> SlowDown, for the longest time
11. the model or launch is not there or not ready, 503       -> WaitForModel
12. 408 and 5xx, and the engine had got nothing of it        -> as (3)
13. 408 and 5xx otherwise                                    -> as (5)
14. anything else                                            -> Final

Delays grow with each try in a row and are drawn from the whole of what they may be (full jitter), so that lines that
failed together do not come back together. Nothing here knows clocks, chance, storage or who carries the decision out.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_bootstrap.errors import (
    ApiError,
    Cancelled,
    Forbidden,
    LaunchNotReady,
    ModelNotFound,
    StorageFailed,
    StorageFull,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)

BACKOFF_S, BACKOFF_MAX_S = 0.5, 60.0
MAX_UNCOUNTED = 20
SLOW_DOWN_S = 1.0
LOOK_AGAIN_S = 5.0
_TRANSIENT_4XX = frozenset({408, 409, 425})


@dataclass(frozen=True, slots=True)
class Facts:
    """``attempts``: those that count, this one included; ``limit`` are allowed. ``chance``: a random number in [0, 1).
    What happened is either the engine's ``status`` (``retry_after`` as it said) or the gateway's ``error`` (``sent``:
    the engine had got the request, at least in part), or else the engine's end (``died``), whatever the rest says.
    ``uncounted``: tries in a row before this one that were not counted."""

    attempts: int
    limit: int
    chance: float
    status: int | None = None
    error: ApiError | None = None
    sent: bool = False
    died: bool = False
    uncounted: int = 0
    retry_after: float | None = None

    def __post_init__(self) -> None:
        if not self.died and (self.status is None) == (self.error is None):
            raise ValueError("either a status or an error says what happened")


@dataclass(frozen=True, slots=True)
class Final:
    """What happened is the line's record."""

    reason: str


@dataclass(frozen=True, slots=True)
class Again:
    """The line goes once more, not before ``delay_s``. ``counts``: this was an attempt."""

    delay_s: float
    counts: bool
    reason: str


@dataclass(frozen=True, slots=True)
class WaitForModel:
    """The line goes back uncounted; its lane waits until something changes there, and looks again after
    ``look_again_s`` at the latest."""

    look_again_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class WaitForKey:
    """The line goes back uncounted; its owner's work waits until the key is valid again and may do this."""

    reason: str


@dataclass(frozen=True, slots=True)
class SlowDown:
    """The line goes back uncounted; its lane sends nothing for ``delay_s``."""

    delay_s: float
    reason: str


Decision = Final | Again | WaitForModel | WaitForKey | SlowDown


def decide(facts: Facts) -> Decision:
    """The decision tree of the module's docstring."""
    if facts.died:
        return Again(0.0, counts=False, reason="the engine ended while it had this request")  # 1
    if facts.error is not None:
        return _after_error(facts, facts.error)
    return _after_answer(facts, facts.status or 0)


def backoff(tries: int, chance: float) -> float:
    """Seconds to wait after so many tries in a row (1 and up)."""
    # The exponent is bounded first: the cap is reached long before 60 doublings, and 2.0 ** 5000 overflows.
    return chance * min(BACKOFF_S * 2.0 ** min(max(tries, 1) - 1, 60), BACKOFF_MAX_S)


def _after_answer(facts: Facts, status: int) -> Decision:
    if 200 <= status < 300:
        return Final("the engine answered")  # 2
    if status == 429:
        return _uncounted(facts, "the engine has no room (429)", facts.retry_after)  # 3
    if status in _TRANSIENT_4XX or (status >= 500 and status != 501):
        return _counted(facts, f"the engine answered {status}", facts.retry_after)  # 4
    return Final(f"the engine answered {status}, and would do so again")  # 6


def _after_error(facts: Facts, error: ApiError) -> Decision:
    match error:
        case Cancelled():
            return Final("it was cancelled")  # 7
        case Unauthorized() | Forbidden():
            return WaitForKey(f"the key that owns it is refused ({error.code})")  # 8
        case TooManyRequests():
            return SlowDown(error.retry_after or SLOW_DOWN_S, error.message)  # 9
        case StorageFull() | StorageFailed():
            return SlowDown(BACKOFF_MAX_S, error.message)  # 10
        case ModelNotFound() | LaunchNotReady() | Unavailable():
            return WaitForModel(error.retry_after or LOOK_AGAIN_S, error.message)  # 11
    if error.status >= 500 or error.status == 408:
        if not facts.sent:
            return _uncounted(facts, f"the engine was not reached ({error.code})", error.retry_after)  # 12
        return _counted(facts, f"the engine gave no whole answer ({error.code})", error.retry_after)  # 13
    return Final(f"it was refused ({error.code}), and would be again")  # 14


def _uncounted(facts: Facts, what: str, retry_after: float | None) -> Decision:
    tries = facts.uncounted + 1
    if tries > MAX_UNCOUNTED:
        return _counted(facts, f"{what}, {tries} times in a row", retry_after)
    return Again(_delay(tries, facts.chance, retry_after), counts=False, reason=what)


def _counted(facts: Facts, what: str, retry_after: float | None) -> Decision:
    if facts.attempts >= facts.limit:
        return Final(f"{what}, in attempt {facts.attempts} of {facts.limit}")  # 5
    delay = _delay(facts.attempts, facts.chance, retry_after)
    return Again(delay, counts=True, reason=f"{what}, in attempt {facts.attempts} of {facts.limit}")  # 5


def _delay(tries: int, chance: float, retry_after: float | None) -> float:
    """What the other side asks for is waited at least, as far as it is sensible."""
    asked = min(max(retry_after or 0.0, 0.0), BACKOFF_MAX_S)
    return max(backoff(tries, chance), asked)
