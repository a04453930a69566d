"""What to load, what to put away, and for whom: the policy of making room. PURE: facts in, a plan out.

Invariants (a hypothesis machine checks them):

* nothing with a request in flight is put away, nothing pinned, and nothing that has been loaded for less than
  ``min_loaded_s``, unless its entry has changed. So a GPU changes hands at most once in that time;
* what is decided for one model never takes the room that was decided for another before it in the same plan;
* the same facts give the same plan: it may be made again at any moment, and what was begun is gone on with or, when
  nobody needs it any more, taken back (``Keep``).

A model is *wanted* when somebody waits for it and it may be loaded. Wanted ones are served in this order: realtime
before batch before preloading, higher ``priority`` first, those for whom somebody waits here before those whose callers
were all told to come back (a name costs a client nothing), then who has waited longest. For each of them, first match:

1. there is room, also once those before it have theirs     -> Load or Wake
2. there will be, once what is on its way out has gone      -> it waits, and nobody behind it takes that room
3. putting others away would make room                      -> they are: PutAway when nothing runs there, else Retire
4. it sleeps, and there is room where it did not run        -> PutAway: it is unloaded, then loaded there
5. otherwise                                                -> it waits; ``Plan.waits`` says for what

Who may be put away for whom:

a. pinned, changing or just loaded                          -> never
b. already retired                                          -> yes: it was decided
c. for preloading                                           -> nobody
d. for realtime: without realtime in flight or waiting      -> yes (batch ends at a line's boundary); but one that was
                                                               used in the last ``pause_s`` counts as busy until it
                                                               was there for as long as its load took
e. for realtime: busy with realtime                         -> when it has lower priority, or the other has waited
                                                               ``max_wait_s`` and as long as its own load will take
f. for batch: used by realtime in the last ``quiet_s``      -> never
g. for batch: with batch work of its own                    -> after ``batch_turn_s``, unless its priority is higher
h. for batch: otherwise                                     -> yes

Among those who may go, lower ``priority`` goes first, then those without batch work, then the highest idle time for
each second that a load takes: idle longest and cheapest to load again. Of those found, the ones that turn out not to be
needed stay.

Without anybody wanting room: a changed entry's engine goes as soon as nothing runs there, idle models go after their
time to live, sleeping ones after theirs. Nothing here knows clocks, GPUs, processes or requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from vllm_bootstrap.models.types import Group

State = Literal["unloaded", "loading", "loaded", "asleep", "changing"]
"""``changing``: on its way out, to sleep or awake; nothing is decided about it until that is over."""
How = Literal["sleep", "unload"]


@dataclass(frozen=True, slots=True)
class Facts:
    """One model now. ``realtime`` and ``batch`` count who waits for it (requests, lines, somebody who was told to come
    back); ``waits_s``, ``batch_waits_s``: the longest of them so far. ``running`` and ``running_batch`` count requests
    in flight. ``idle_s``: since anything was done for anybody, or since it was loaded; ``quiet_s``: since anything was
    done for realtime, for ever where nothing was. ``reload_s``: what loading it again will probably take, ``load_s``
    where that is known from earlier loads, else 0. ``ttl_s`` and ``asleep_ttl_s`` 0: for ever. ``absent``: all who want
    it were told to come back; nobody stands here meanwhile. ``may_load`` False: its last load failed and the next one
    is not due, or nobody may load it."""

    name: str
    state: State
    realtime: int = 0
    batch: int = 0
    waits_s: float = 0.0
    batch_waits_s: float = 0.0
    running: int = 0
    running_batch: int = 0
    retired: bool = False
    idle_s: float = 0.0
    quiet_s: float = 0.0
    loaded_s: float = 0.0
    reload_s: float = 0.0
    load_s: float = 0.0
    ttl_s: float = 0.0
    asleep_ttl_s: float = 0.0
    priority: int = 0
    pin: bool = False
    preload: bool = False
    absent: bool = False
    may_load: bool = True
    can_sleep: bool = False
    outdated: bool = False

    @property
    def in_flight(self) -> int:
        return self.running + self.running_batch

    @property
    def wanted(self) -> int | None:
        """Its class among the wanted: 0 realtime, 1 batch, 2 preloading; None: nobody wants it."""
        if self.state not in ("unloaded", "asleep") or not self.may_load:
            return None
        return 0 if self.realtime else 1 if self.batch else 2 if self.preload and self.state == "unloaded" else None


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds. See the module."""

    min_loaded_s: float = 2.0
    max_wait_s: float = 15.0
    batch_turn_s: float = 600.0
    quiet_s: float = 30.0
    pause_s: float = 10.0


class Room(Protocol):
    """Where models would find place. ``gone``: those that have given theirs back; ``coming``: those that have taken
    theirs before, in this order."""

    def fits(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> bool: ...

    def fits_elsewhere(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> bool:
        """For one that sleeps: if it need not wake where it was."""


@dataclass(frozen=True, slots=True)
class Load:
    name: str


@dataclass(frozen=True, slots=True)
class Wake:
    name: str


@dataclass(frozen=True, slots=True)
class Retire:
    """Send nothing new there: ``wanted_by`` needs its room."""

    name: str
    wanted_by: str


@dataclass(frozen=True, slots=True)
class Keep:
    """It was retired and is not needed to go any more."""

    name: str


@dataclass(frozen=True, slots=True)
class PutAway:
    """``why``: ``room``, ``idle`` or ``outdated``."""

    name: str
    how: How
    why: Literal["room", "idle", "outdated"]


Action = Load | Wake | Retire | Keep | PutAway


@dataclass(frozen=True, slots=True)
class Plan:
    """``waits``: for each model that is wanted and cannot be loaded now, why, in one sentence."""

    actions: Sequence[Action] = ()
    waits: Mapping[str, str] = field(default_factory=dict)


def plan(models: Iterable[Facts], room: Room, groups: Sequence[Group], policy: Policy) -> Plan:
    """See the module."""
    return _Planner(list(models), room, groups, policy).plan()


class _Planner:
    def __init__(self, models: list[Facts], room: Room, groups: Sequence[Group], policy: Policy) -> None:
        self._models = {model.name: model for model in models}
        self._room, self._groups, self._policy = room, groups, policy
        self._actions: list[Action] = []
        self._waits: dict[str, str] = {}
        self._leaving = {model.name for model in models if model.state == "changing"}
        self._coming: list[str] = []

    def plan(self) -> Plan:
        self._put_away_by_themselves()
        for wanted in sorted((m for m in self._models.values() if m.wanted is not None), key=_turn):
            self._serve(wanted)
        for model in self._models.values():
            if model.retired and model.name not in self._leaving:
                self._actions.append(Keep(model.name))
        return Plan(self._actions, self._waits)

    def _put_away_by_themselves(self) -> None:
        for model in self._models.values():
            if model.in_flight or model.state not in ("loading", "loaded", "asleep"):
                continue
            nobody = not (model.realtime or model.batch or model.pin)
            if model.outdated:
                self._put_away(model, "unload", "outdated")
            elif model.state == "loaded" and nobody and 0 < model.ttl_s <= model.idle_s:
                self._put_away(model, _how(model), "idle")
            elif model.state == "asleep" and nobody and 0 < model.asleep_ttl_s <= model.idle_s:
                self._put_away(model, "unload", "idle")

    def _put_away(self, model: Facts, how: How, why: Literal["room", "idle", "outdated"]) -> None:
        self._actions.append(PutAway(model.name, how, why))
        self._leaving.add(model.name)

    def _serve(self, wanted: Facts) -> None:
        if wanted.name in self._leaving:  # an outdated one that sleeps is unloaded first
            return
        name, leaving = wanted.name, frozenset(self._leaving)
        rivals = self._rivals(name)
        later = self._room.fits(name, leaving, tuple(self._coming))
        if not rivals and later and self._room.fits(name, frozenset(), tuple(self._coming)):  # 1
            self._actions.append(Wake(name) if wanted.state == "asleep" else Load(name))
        elif rivals <= leaving and later:  # 2
            self._waits[name] = f"{_listed(self._leaving)} makes room for it"
        else:
            victims = self._victims(wanted, rivals)
            if victims is None:
                self._waits[name] = self._obstacle()  # 5
                coming = tuple(self._coming)
                if wanted.state == "asleep" and not rivals and self._room.fits_elsewhere(name, frozenset(), coming):
                    self._put_away(wanted, "unload", "room")  # 4
                return
            for victim in victims:  # 3
                self._end(victim, name)
            self._waits[name] = f"{_listed(v.name for v in victims)} makes room for it"
        self._coming.append(name)

    def _end(self, victim: Facts, wanted_by: str) -> None:
        if not victim.in_flight:
            self._put_away(victim, _how(victim), "room")
            return
        self._leaving.add(victim.name)
        if not victim.retired:
            self._actions.append(Retire(victim.name, wanted_by))

    # Who must and who may go

    def _rivals(self, name: str) -> frozenset[str]:
        """What holds a place now, or will, and must not while ``name`` does, by its groups."""
        placed = {m.name for m in self._models.values() if m.state in ("loading", "loaded", "changing")}
        others = (placed | set(self._coming)) - {name}
        return frozenset(other for other in others if any(_excludes(group, name, other) for group in self._groups))

    def _victims(self, wanted: Facts, rivals: frozenset[str]) -> list[Facts] | None:
        """Those whose end makes room, None where that is not possible now."""
        may_go = [m for m in self._models.values() if m.name not in self._leaving and self._may_go(m, wanted)]
        chosen = [model for model in may_go if model.name in rivals]
        if not rivals <= {model.name for model in chosen} | self._leaving:
            return None
        others = sorted((model for model in may_go if model.name not in rivals), key=_order_of_going)
        while not self._fits_without(wanted, chosen):
            if not others:
                return None
            chosen.append(others.pop(0))
        for model in list(chosen):
            rest = [one for one in chosen if one is not model]
            if model.name not in rivals and self._fits_without(wanted, rest):
                chosen = rest
        return chosen

    def _fits_without(self, wanted: Facts, chosen: Sequence[Facts]) -> bool:
        gone = frozenset(self._leaving).union(model.name for model in chosen)
        return self._room.fits(wanted.name, gone, tuple(self._coming))

    def _may_go(self, model: Facts, wanted: Facts) -> bool:
        policy = self._policy
        if model.state != "loaded" or model.pin or model.loaded_s < policy.min_loaded_s:  # a
            return False
        if model.retired:  # b
            return True
        if wanted.wanted == 2:  # c
            return False
        busy = bool(model.realtime or model.running)
        if wanted.wanted == 0:
            pauses = model.quiet_s < policy.pause_s and model.loaded_s < model.load_s
            if not busy and not pauses:  # d
                return True
            return model.priority < wanted.priority or wanted.waits_s >= max(policy.max_wait_s, wanted.load_s)  # e
        if busy or model.quiet_s < policy.quiet_s:  # f
            return False
        if model.batch or model.running_batch:  # g
            return model.loaded_s >= policy.batch_turn_s and model.priority <= wanted.priority
        return True  # h

    def _obstacle(self) -> str:
        """Why there is no room and nobody goes."""
        there = [m for m in self._models.values() if m.state == "loaded" and m.name not in self._leaving]
        pinned = [m.name for m in there if m.pin]
        recent = [m.name for m in there if not m.pin and m.loaded_s < self._policy.min_loaded_s]
        busy = [m.name for m in there if m.name not in pinned and m.name not in recent]
        if busy:
            return f"there is no room: {_listed(busy)} is in use"
        if recent:
            return f"there is no room yet: {_listed(recent)} was loaded a moment ago"
        starting = [m.name for m in self._models.values() if m.state == "loading"]
        if starting or self._coming:
            return f"there is no room yet: {_listed([*starting, *self._coming])} is being loaded"
        if pinned:
            return f"there is no room: {_listed(pinned)} is pinned"
        return "there is no room for it on this machine's GPUs at present"


def _turn(model: Facts) -> tuple[int, int, bool, float, str]:
    wanted = model.wanted or 0
    waited = model.waits_s if wanted == 0 else model.batch_waits_s
    return wanted, -model.priority, model.absent, -waited, model.name


def _order_of_going(model: Facts) -> tuple[bool, int, bool, float, str]:
    worth = model.idle_s / max(1.0, model.reload_s)
    return not model.retired, model.priority, bool(model.batch or model.running_batch), -worth, model.name


def _how(model: Facts) -> How:
    return "sleep" if model.can_sleep and not model.outdated else "unload"


def _excludes(group: Group, one: str, other: str) -> bool:
    inside = (one in group.members, other in group.members)
    if all(inside):
        return not group.together
    return group.exclusive and any(inside)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
