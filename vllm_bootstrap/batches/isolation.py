"""A line that kills its engine is found and given up, alone: which lines of a lane may run after a death. PURE.

When an engine dies, the lines that it was working on are suspects. As long as there are any, exactly one group of them
is in flight in the lane and nothing else:

1. the lines in flight at a death are split in halves; the half that was started later goes first, since what was in
   flight for long has shown that it does no harm at once;
2. a line that ends without a death (any answer, or a failure that is none) is innocent;
3. a group whose engine dies is split again;
4. a line that is alone when its engine dies has died alone; after ``POISON_DEATHS`` such deaths in a row it is poison;
5. a line that comes with deaths of an earlier run is a suspect from the start; those that come meanwhile form a group;
6. a group begins when nothing is in flight in the lane; what other replicas are working on ends first.

Invariants (a hypothesis machine checks them): an innocent line is never called poison by one accidental death, nor by
any number of deaths in company; a line that always kills its engine, in flight with at most N - 1 others, costs at most
ceil(log2 N) + ``POISON_DEATHS`` deaths; unless all that wait are withdrawn, something may run or is in flight.

What the caller owes: a line whose connection broke, or that got a 5xx, is neither ``ended`` nor ``came_back`` before it
is known whether its engine died (a dying engine may still say 500 to all it has); each of ``wanted()`` is started as
soon as there is a place, or ``withdrawn``: a suspect that nobody starts holds up the lane.

Nothing here knows clocks, engines, files or what a line says. Keys are opaque.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import islice
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

POISON_DEATHS = 2
POISON_CODE = "engine_killed"
POISON_MESSAGE = f"The engine died {POISON_DEATHS} times while it had no request but this one: it is not tried again"
MAX_CLEARED = 4096


class Isolation(Generic[K]):
    """The suspicions of one lane. An idle one knows nothing: it may be thrown away when nothing is in flight and there
    are no ``suspects``."""

    def __init__(self) -> None:
        self._flight: dict[K, None] = {}
        # The last group goes next. Newcomers (case 5) are no group but ``_late``, and go when there is no group.
        self._groups: list[dict[K, None]] = []
        self._late: dict[K, None] = {}
        self._now: dict[K, None] = {}
        self._suspects: dict[K, None] = {}
        self._alone: dict[K, int] = {}
        # Innocent, though stored deaths say otherwise. What is forgotten here is merely suspected once more.
        self._cleared: dict[K, None] = {}

    # What may run

    @property
    def suspects(self) -> tuple[K, ...]:
        """All that are suspected, in flight or not."""
        return tuple(self._suspects)

    @property
    def isolating(self) -> bool:
        """Whether only suspects may run."""
        return bool(self._suspects)

    @property
    def in_flight(self) -> int:
        return len(self._flight)

    def admits(self, key: K, deaths: int = 0) -> bool:
        """Whether this line, which is not in flight, may be started now. ``deaths`` as they are stored: with some, it
        is a suspect from now on (case 5), to be started or withdrawn like all of them."""
        if deaths and key not in self._suspects and key not in self._cleared:
            self._suspects[key] = self._late[key] = None
            self._advance()
        if not self._suspects:
            return True
        return key in self._now and key not in self._flight

    def wanted(self, most: int | None = None) -> tuple[K, ...]:
        """The suspects to be started now: the rest of the group whose turn it is. Empty while others must end."""
        waiting = (key for key in self._now if key not in self._flight)
        return tuple(islice(waiting, most))

    # What happened

    def started(self, key: K) -> None:
        """It is in flight. It must have been admitted just now."""
        if not self.admits(key):
            raise ValueError(f"{key!r} was not admitted")
        self._flight[key] = None

    def ended(self, key: K) -> None:
        """It is not in flight any more, and its engine lives (case 2)."""
        self._flight.pop(key, None)
        if key in self._suspects:
            self._clear(key)
        self._advance()

    def came_back(self, key: K) -> None:
        """It is not in flight any more and nothing is known of it: no engine had it, or none was there."""
        self._flight.pop(key, None)
        self._advance()

    def withdrawn(self, key: K) -> None:
        """It is not in flight any more and nobody will start it: cancelled, or its source pauses. If it comes again
        later, its stored deaths make it a suspect."""
        self._flight.pop(key, None)
        self._forget(key)
        self._advance()

    def died(self, keys: Iterable[K]) -> K | None:
        """An engine ended that had these lines, in the order they were started; those not in flight do not matter.
        Returns the one that is poison by that, if any: it is not known here any more."""
        lines = [key for key in dict.fromkeys(keys) if key in self._flight]
        for key in lines:
            del self._flight[key]
            self._cleared.pop(key, None)
            self._unlist(key)
        poison = self._died_alone(lines[0]) if len(lines) == 1 else None
        if poison is None:
            self._split(lines)
        self._advance()
        return poison

    def _died_alone(self, key: K) -> K | None:
        """Case 4."""
        self._alone[key] = self._alone.get(key, 0) + 1
        if self._alone[key] < POISON_DEATHS:
            return None
        self._forget(key)
        return key

    def _split(self, lines: list[K]) -> None:
        """Cases 1 and 3. The rest of the group goes after the halves."""
        self._suspects.update(dict.fromkeys(lines))
        if self._now is not self._late:
            self._groups.append(self._now)
        self._now = {}
        middle = len(lines) // 2
        self._groups += [dict.fromkeys(lines[:middle]), dict.fromkeys(lines[middle:])]

    def _advance(self) -> None:
        """Case 6. A group that is over is let go, so that newcomers do not join it while others are in flight."""
        if self._now:
            return
        self._now = {}
        if self._flight:
            return
        while self._groups and not self._now:
            self._now = self._groups.pop()
        if not self._now and self._late:
            self._now = self._late

    def _clear(self, key: K) -> None:
        self._forget(key)
        self._cleared[key] = None
        if len(self._cleared) > MAX_CLEARED:
            del self._cleared[next(iter(self._cleared))]

    def _forget(self, key: K) -> None:
        self._unlist(key)
        self._suspects.pop(key, None)
        self._alone.pop(key, None)

    def _unlist(self, key: K) -> None:
        for group in (self._now, self._late, *self._groups):
            group.pop(key, None)
