"""When an idle box is told so: once in a spell of idleness, and again a few times where telling failed. PURE.

Invariants: nothing is due before the box has been seen idle for ``after_s`` without a break; a success is not repeated
before the box was busy in between; an action that runs is not begun a second time; one spell sees at most ``ATTEMPTS``
of them. Idle time is the time that was seen: a daemon that was down or a machine that slept adds nothing to it.

It runs nothing and knows no clock: whoever samples says how many seconds were seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_bootstrap.models.idle_time import ActionState

ATTEMPTS = 4
FIRST_DELAY_S, GROWTH = 30.0, 4.0


@dataclass(slots=True)
class Spell:
    """How long the box has been idle, in seconds that were seen. ``number`` grows with each time it was busy."""

    idle_s: float = 0.0
    number: int = 0

    def sample(self, seconds: float, *, busy: bool) -> None:
        """What is seen now, and how many seconds of the time before count with it."""
        if not busy:
            self.idle_s += seconds
        else:
            self.idle_s = 0.0
            self.number += 1


@dataclass(slots=True)
class Alarm:
    """One action of the hook. ``after_s`` 0: never due."""

    after_s: float
    attempts: int = 0
    error: str | None = None
    _spell: int = field(default=-1, init=False)
    _begun_in: int = field(default=-1, init=False)
    _running: bool = field(default=False, init=False)
    _done: bool = field(default=False, init=False)
    _again_at: float = field(default=0.0, init=False)

    def due(self, spell: Spell) -> bool:
        """Whether to begin now; ``begin`` follows at once."""
        if spell.number != self._spell:
            self._spell, self._done, self.attempts, self._again_at = spell.number, False, 0, 0.0
        if self._running or self._done or self.attempts >= ATTEMPTS or self.after_s <= 0:
            return False
        return spell.idle_s >= max(self.after_s, self._again_at)

    def begin(self) -> None:
        """It is being done."""
        self._running = True
        self._begun_in = self._spell
        self.attempts += 1

    def ended(self, error: str | None, spell: Spell) -> None:
        """It was done, or failed with ``error``. What began in an earlier spell says nothing about this one."""
        self._running = False
        self.error = error
        if spell.number != self._begun_in:
            return
        self._done = error is None
        self._again_at = spell.idle_s + FIRST_DELAY_S * GROWTH ** (self.attempts - 1)

    def fires_in_s(self, spell: Spell) -> float | None:
        """Seconds until it is due if the box stays idle, None when it will not be."""
        if self.after_s <= 0 or self._running:
            return None
        if spell.number != self._spell:
            return max(0.0, self.after_s - spell.idle_s)
        if self._done or self.attempts >= ATTEMPTS:
            return None
        return max(0.0, max(self.after_s, self._again_at) - spell.idle_s)

    def state(self, spell: Spell) -> ActionState:
        """In this spell."""
        if self._running:
            return "running"
        if spell.number != self._spell or not self.attempts:
            return "waiting"
        if self._done:
            return "completed"
        return "given_up" if self.attempts >= ATTEMPTS else "failed"
