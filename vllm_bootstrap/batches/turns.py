"""Whose line goes next to a lane: turns between the sources that have lines for one model or one launch. PURE.

Invariants:

* fair between owners (start-time fair queueing): each has an account of the sequences it was given here, and the
  smallest account goes next. ``level`` is the account at the last grant, before it was charged; whoever starts to have
  work begins there at the least, so idling saves nothing up. Of two owners that have work all the time neither gets
  more than the other plus the largest take of each, whatever the number of their sources;
* within an owner: the higher priority, then the earlier deadline, then the smaller id (ids sort by age);
* memory is bounded by the sources: an owner without any is forgotten as soon as its account says nothing any more.

Asking costs one comparison for each owner with work and none for its other sources; changing costs a binary search.
Nothing here knows what a line is, why a source is ready, clocks or launches.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from math import inf

Rank = tuple[int, float, str]


@dataclass(frozen=True, slots=True)
class Source:
    """Something that has lines: a running batch, or the single items of a key. ``deadline`` in unix seconds. ``ready``:
    it has a line that may go now."""

    id: str
    owner: str
    priority: int = 0
    deadline: float = inf
    ready: bool = True

    @property
    def rank(self) -> Rank:
        """Its place among its owner's sources."""
        return -self.priority, self.deadline, self.id


class _Owner:
    """``ranks``: its ready sources, in the order of their turns."""

    __slots__ = ("account", "ranks")

    def __init__(self) -> None:
        self.account = 0
        self.ranks: list[Rank] = []


class Turns:
    """The turns at one lane. Calls about a source that is not there change nothing."""

    def __init__(self) -> None:
        self._sources: dict[str, Source] = {}
        self._owners: dict[str, _Owner] = {}
        self._working: dict[str, _Owner] = {}
        self._level = 0

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, source_id: str) -> bool:
        return source_id in self._sources

    def put(self, source: Source) -> None:
        """It is there now, or is other than it was."""
        self.drop(source.id)
        self._sources[source.id] = source
        if source.ready:
            self._enlist(source)

    def drop(self, source_id: str) -> None:
        """It has no more lines for this lane."""
        source = self._sources.pop(source_id, None)
        if source is not None and source.ready:
            self._withdraw(source)

    def change(self, source_id: str, priority: int) -> None:
        """It has another priority from now on."""
        source = self._sources.get(source_id)
        if source is not None:
            self._become(source, replace(source, priority=priority))

    def set_ready(self, source_id: str, ready: bool) -> None:
        """Whether it has a line that may go now."""
        source = self._sources.get(source_id)
        if source is not None and source.ready != ready:
            self._become(source, replace(source, ready=ready))

    def next(self) -> str | None:
        """The ready source whose turn it is. Asking changes nothing: its turn is over when something was ``taken``."""
        best: tuple[int, str] | None = None
        for owner in self._working.values():
            turn = owner.account, owner.ranks[0][2]
            if best is None or turn < best:
                best = turn
        return None if best is None else best[1]

    def taken(self, source_id: str, sequences: int = 1) -> None:
        """A line of the source was given a place (its turn or not); to be told before the source is dropped."""
        source = self._sources.get(source_id)
        if source is None:
            return
        owner = self._owner(source.owner)
        self._level = max(self._level, min((one.account for one in self._working.values()), default=owner.account))
        owner.account += sequences
        self._forget_the_idle()

    def _become(self, old: Source, new: Source) -> None:
        self._sources[new.id] = new
        # First in, then out: its owner has work all the while where both are ready.
        if new.ready:
            self._enlist(new)
        if old.ready:
            self._withdraw(old)

    def _owner(self, name: str) -> _Owner:
        owner = self._owners.get(name)
        if owner is None:
            owner = self._owners[name] = _Owner()
            owner.account = self._level
        return owner

    def _enlist(self, source: Source) -> None:
        owner = self._owner(source.owner)
        if not owner.ranks:
            owner.account = max(owner.account, self._level)
            self._working[source.owner] = owner
        insort(owner.ranks, source.rank)

    def _withdraw(self, source: Source) -> None:
        owner = self._owners[source.owner]
        del owner.ranks[bisect_left(owner.ranks, source.rank)]
        if not owner.ranks:
            del self._working[source.owner]
            self._forget_the_idle()

    def _forget_the_idle(self) -> None:
        """Who has no work and no more than it would begin with."""
        if len(self._owners) > len(self._working):
            idle = self._owners.keys() - self._working.keys()
            for name in [name for name in idle if self._owners[name].account <= self._level]:
                del self._owners[name]
