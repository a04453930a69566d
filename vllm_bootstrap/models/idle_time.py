"""How long devices and the whole box were claimed, at work and idle, out of samples of the present. PURE.

Invariants: of any device ``working_s + idle_s == observed_s``, ``working_s <= claimed_s <= observed_s`` (a device works
only for whoever owns it), and ``observed_s`` never exceeds the time between its first and its last sample. Time that
nobody saw counts as nothing: not before the first sample of a device, and not over a gap between samples.

It does not know what a launch, a request or a GPU is: it gets yes and no. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

MAX_GAP_S = 5.0
BOX = "box"


class Use(NamedTuple):
    """A device at one moment. ``working``: a request is in flight on a launch that owns it."""

    claimed: bool
    working: bool


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one device. ``idle_s`` is all that was seen and was not work, whether it was claimed or not: a loaded
    model that nobody uses costs as much as an empty GPU."""

    claimed_s: float = 0.0
    working_s: float = 0.0
    idle_s: float = 0.0

    @property
    def observed_s(self) -> float:
        return self.working_s + self.idle_s

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.claimed_s + other.claimed_s, self.working_s + other.working_s, self.idle_s + other.idle_s)


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """``since``: unix time from which ``total`` is counted. ``index`` None: not among the devices of this start."""

    device: str
    index: int | None
    since: float
    total: Spent
    this_start: Spent


ActionState = Literal["waiting", "running", "completed", "failed", "given_up"]


@dataclass(frozen=True, slots=True)
class ActionView:
    """What came of one action of the hook in the present spell of idleness, and how the last attempt ended.
    ``failed``: it is tried again."""

    name: str
    state: ActionState
    attempts: int = 0
    last_at: float | None = None
    last_error: str | None = None


@dataclass(frozen=True, slots=True)
class IdleReport:
    """``idle_s``: how long the box has been idle now, 0 while it is not; ``busy_because`` then says why.
    ``fires_in_s`` None: the hook is off, nothing is to be done, or it was done for this spell."""

    idle_s: float
    busy_because: str | None
    box: DeviceTime
    gpus: tuple[DeviceTime, ...] = ()
    after_s: float = 0.0
    fires_in_s: float | None = None
    actions: tuple[ActionView, ...] = ()


@dataclass(slots=True)
class IdleAccount:
    """Adds samples up. ``before``: what earlier starts had counted, by device."""

    before: Mapping[str, Spent] = field(default_factory=dict)
    max_gap_s: float = MAX_GAP_S
    _at: float | None = field(default=None, init=False)
    _last: frozenset[str] = field(default=frozenset(), init=False)
    _now: dict[str, Spent] = field(default_factory=dict, init=False)

    def sample(self, now: float, devices: Mapping[str, Use]) -> float:
        """The present state of all devices. The time since the sample before is counted as what is seen now, for
        devices that both samples have. Returns the seconds that were counted, 0 for a gap."""
        elapsed = 0.0 if self._at is None else max(0.0, now - self._at)
        counted = elapsed if elapsed <= self.max_gap_s else 0.0
        self._at = now
        for device, use in devices.items():
            spent = self._now.setdefault(device, Spent())
            if counted and device in self._last:
                self._now[device] = spent + _as_spent(use, counted)
        self._last = frozenset(devices)
        return counted

    def this_start(self, device: str) -> Spent:
        """What this start has counted."""
        return self._now.get(device, Spent())

    def total(self, device: str) -> Spent:
        """What all starts have counted."""
        return self.before.get(device, Spent()) + self.this_start(device)

    def totals(self) -> dict[str, Spent]:
        """Of each device that this start has seen, for keeping."""
        return {device: self.total(device) for device in self._now}


def _as_spent(use: Use, seconds: float) -> Spent:
    working = use.working and use.claimed
    return Spent(
        claimed_s=seconds if use.claimed else 0.0,
        working_s=seconds if working else 0.0,
        idle_s=0.0 if working else seconds,
    )
