"""What keeps the box busy at this moment, and which devices work: read off the parts that know.

Invariant: it only looks, in well under a millisecond, and changes nothing. Paused batches are nobody's work; work that
no engine there is or may come can do is none either. Requests that began and ended between two looks are noticed by
their count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from vllm_bootstrap.gateway.inflight import RequestInfo
from vllm_bootstrap.launches.types import LaunchView
from vllm_bootstrap.models.idle_box import Seen
from vllm_bootstrap.models.idle_time import Use
from vllm_bootstrap.serving import LoadReport

SETTLED = frozenset({"ready", "asleep", "stopped", "failed"})
NEEDS_NO_ENGINE = ("validating", "finalizing", "cancelling")


class Owners(Protocol):
    def owners(self, uuid: str) -> tuple[str, ...]: ...


class Launches(Protocol):
    def list(self, *, include_ended: bool) -> Sequence[LaunchView]: ...


class Loads(Protocol):
    def load(self, launch_id: str) -> LoadReport: ...


class Requests(Protocol):
    def list(self) -> Sequence[RequestInfo]: ...


class Batches(Protocol):
    def states(self) -> Mapping[str, int]: ...


class Items(Protocol):
    @property
    def waiting(self) -> int: ...


class Sense:
    """``served()``: how many requests engines have ended so far. ``reachable()``: whether any unfinished line or item
    has an engine or may get one. ``others``: further work, each None or what it is in a few words."""

    def __init__(
        self,
        owners: Owners,
        launches: Launches,
        loads: Loads,
        requests: Requests,
        batches: Batches,
        items: Items,
        *,
        served: Callable[[], int],
        reachable: Callable[[], bool],
        others: Sequence[Callable[[], str | None]] = (),
    ) -> None:
        self._owners, self._launches, self._loads = owners, launches, loads
        self._requests, self._batches, self._items = requests, batches, items
        self._served, self._reachable, self._others = served, reachable, others
        self._served_before = served()

    def look(self, devices: Sequence[str]) -> Seen:
        """The box now, with these devices."""
        views = self._launches.list(include_ended=False)
        running = {view.launch_id for view in views if sum(self._loads.load(view.launch_id).in_flight.values())}
        uses = {}
        for device in devices:
            owners = self._owners.owners(device)
            uses[device] = Use(bool(owners), any(owner in running for owner in owners))
        return Seen(self._busy(views), bool(running), uses)

    def _busy(self, views: Sequence[LaunchView]) -> str | None:
        served, self._served_before = self._served_before, self._served()
        # A request that needs no engine (a list of models, say) is no work; one that is still read may become some.
        if any(info.cls is not None or info.state == "reading" for info in self._requests.list()):
            return "requests are under way"
        if served != self._served_before:
            return "requests have just ended"
        moving = next((view for view in views if view.state not in SETTLED), None)
        if moving is not None:
            return f"launch {moving.launch_id} is {moving.state}"
        return self._batch_work() or next((why for other in self._others if (why := other())), None)

    def _batch_work(self) -> str | None:
        states = self._batches.states()
        for state in NEEDS_NO_ENGINE:
            if states.get(state):
                return f"a batch is {state}"
        unpaused = states.get("in_progress", 0) - states.get("paused", 0)
        if (unpaused > 0 or self._items.waiting) and self._reachable():
            return "batch work is left to do" if unpaused > 0 else "single items are left to do"
        return None
