"""All lanes: which engines there are for each, whose key a line goes under, and the way into the data plane.

Invariant: a lane exists while it has sources; what launches announce reaches every lane it concerns. Must not know:
batches, storage, what becomes of a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from vllm_bootstrap.auth.scopes import BATCH, allows
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches import joining
from vllm_bootstrap.batches.flight import Carriage, Flight
from vllm_bootstrap.batches.lane import Lane
from vllm_bootstrap.batches.verdicts import Verdict
from vllm_bootstrap.batches.work import Outcome, Source
from vllm_bootstrap.errors import LaunchNotReady, NotFound
from vllm_bootstrap.gateway.call import Call, Failure, Reply
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Target
from vllm_bootstrap.serving import Advert

_BATCH = frozenset({BATCH})
LaneKey = tuple[str, str | None]
ENDED = frozenset({"stopped", "failed"})


class Dispatcher:
    """``key_named(name)``: that key as it is now, None when it is not valid. ``attempts`` and ``max_joined``: see
    ``Lane``."""

    def __init__(
        self,
        gateway: Gateway,
        *,
        key_named: Callable[[str], Principal | None],
        attempts: int,
        max_joined: int,
        adverts: Iterable[Advert] = (),
    ) -> None:
        self._gateway, self._key_named = gateway, key_named
        self.hope_for: Callable[[str], str | None] = lambda _model: None
        """Why a model that nothing serves is not loaded yet; None where it is not loaded on demand."""
        self._attempts, self._max_joined = attempts, max_joined
        self._lanes: dict[LaneKey, Lane] = {}
        self._lane_of: dict[str, LaneKey] = {}
        self._adverts: dict[str, Advert] = {advert.launch_id: advert for advert in adverts}

    # Sources

    def add(self, source: Source, model: str, launch_id: str | None) -> Callable[[], None]:
        """Carry the jobs of ``source`` to whatever serves ``model``, or to one launch or group, from now on. Returns
        what it is to call when it has something to take again."""
        key = ("", launch_id) if launch_id is not None else (model, None)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(_Desk(self, key), attempts=self._attempts, max_joined=self._max_joined)
            self._tell_engines(key, lane)
        self._lane_of[source.id] = key
        lane.add(source)
        return lambda: lane.ready(source.id)

    def check_launch(self, owner: str, launch_id: str) -> None:
        """Whether lines of this key can go to that launch or group some day. Raises ``NotFound`` where it is not there,
        or not for this key, and ``LaunchNotReady`` where it has ended for good."""
        meant = self._meant(("", launch_id))
        key = self._key_named(owner)
        allowed = key is None or any(_may_use(key, advert) for advert in meant)
        if not meant or not allowed:
            raise NotFound(f"There is no launch {launch_id!r}.", param="launch_id")
        if all(advert.state in ENDED for advert in meant):
            raise LaunchNotReady(f"The launch {launch_id} has ended: name its model instead.", param="launch_id")

    def withdraw(self, source_id: str) -> None:
        """Idempotent."""
        key = self._lane_of.pop(source_id, None)
        if key is None:
            return
        lane = self._lanes[key]
        lane.withdraw(source_id)
        if lane.empty:
            lane.close()
            del self._lanes[key]

    def pause(self, source_id: str) -> None:
        self._lanes[self._lane_of[source_id]].pause(source_id)

    def resume(self, source_id: str) -> None:
        self._lanes[self._lane_of[source_id]].resume(source_id)

    def change(self, source_id: str, priority: int) -> None:
        self._lanes[self._lane_of[source_id]].change(source_id, priority)

    def drop(self, source_id: str, number: int) -> None:
        """One job of a source is not wanted any more. Idempotent."""
        key = self._lane_of.get(source_id)
        if key is not None:
            self._lanes[key].drop((source_id, number))

    def waits_for(self, source_id: str) -> str | None:
        key = self._lane_of.get(source_id)
        said = None if key is None else self._lanes[key].waits_for(source_id)
        if key is None or key[1] is not None or said is None:
            return said
        meant = self._meant(key)
        hope = self.hope_for(key[0]) if said == _absence(meant, key) else None
        return said if hope is None else f"the model {key[0]!r} is not loaded yet: {hope}"

    def under_way(self, source_id: str) -> int:
        key = self._lane_of.get(source_id)
        return 0 if key is None else self._lanes[key].under_way(source_id)

    def demand(self) -> Mapping[str, int]:
        """Models that lines are to be run on, with about how many have not ended yet. Those of one launch are left
        out: no other one helps them."""
        return {model: lane.left for (model, launch_id), lane in self._lanes.items() if launch_id is None}

    def reachable(self, may_come: Callable[[str], bool]) -> bool:
        """Whether any line or item that has not ended, paused ones included, has an engine or may get one.
        ``may_come(model)``: that model is loaded when it is asked for."""
        return any(lane.left and self._has_prospects(key, may_come) for key, lane in self._lanes.items())

    def _has_prospects(self, key: LaneKey, may_come: Callable[[str], bool]) -> bool:
        there = any(advert.state not in ENDED for advert in self._meant(key))
        return there or (key[1] is None and may_come(key[0]))

    # What others say

    def advert(self, advert: Advert) -> None:
        """A launch announced itself or changed."""
        before = self._adverts.get(advert.launch_id)
        self._adverts[advert.launch_id] = advert
        gone = advert.launch_id if before is not None and _ended(before, advert) else None
        self._changed(gone, Verdict.STOPPED if advert.stopped else Verdict.DIED)

    def forget(self, launch_id: str) -> None:
        """A launch was deleted."""
        before = self._adverts.pop(launch_id, None)
        was_there = before is not None and before.state not in ENDED  # else all that matters was said when it ended
        self._changed(launch_id if was_there else None, Verdict.STOPPED)

    def keys_changed(self) -> None:
        for lane in self._lanes.values():
            lane.keys_changed()

    def look_at_keys(self) -> None:
        """Where lines wait for a key: has the file of keys changed? With nothing else to do, nobody looks."""
        if any(lane.wait_for_keys for lane in self._lanes.values()):
            self._key_named("")

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self._lane_of.clear()

    def _changed(self, gone: str | None, verdict: Verdict) -> None:
        for key, lane in self._lanes.items():
            if gone is not None:
                lane.engine_ended(gone, verdict)
            self._tell_engines(key, lane)

    def _tell_engines(self, key: LaneKey, lane: Lane) -> None:
        meant = self._meant(key)
        slots = sum(advert.instance.slots for advert in meant if advert.instance is not None)
        lane.engines(slots, _absence(meant, key))

    def _meant(self, key: LaneKey) -> list[Advert]:
        """The launches that a lane's lines may go to, whatever state they are in."""
        return [advert for advert in self._adverts.values() if _answers(advert, key)]

    # For lanes

    def principal(self, owner: str, key: LaneKey) -> Principal | None:
        found = self._key_named(owner)
        if found is None or not allows(found.scopes, _BATCH):
            return None
        if key[1] is not None and not any(_may_use(found, advert) for advert in self._meant(key)):
            return None
        return found

    def send(self, flight: Flight, principal: Principal, key: LaneKey) -> Carriage:
        model, launch_id = key
        path = flight.jobs[0].path
        target: Target = ByModel(model, ("POST", path)) if launch_id is None else ByLaunch(launch_id)
        bodies = [job.body for job in flight.jobs]
        body = bodies[0] if len(bodies) == 1 else joining.join(path, bodies)
        request_id = self._gateway.new_request_id()
        call = Call(
            self._gateway,
            principal,
            target,
            path,
            body,
            on_end=partial(_landed, flight, request_id),
            on_move=partial(_moved, flight),
            priority=flight.source.priority,
            request_id=request_id,
        )
        call.start()
        return call


class _Desk:
    """What one lane asks for."""

    def __init__(self, dispatcher: Dispatcher, key: LaneKey) -> None:
        self._dispatcher, self._key = dispatcher, key

    def send(self, flight: Flight, principal: Principal) -> Carriage:
        return self._dispatcher.send(flight, principal, self._key)

    def principal(self, owner: str) -> Principal | None:
        return self._dispatcher.principal(owner, self._key)


def _moved(flight: Flight, launch_id: str | None) -> None:
    if launch_id is None:
        flight.unplaced()
    else:
        flight.placed(launch_id)


def _landed(flight: Flight, request_id: str, end: Reply | Failure) -> None:
    if isinstance(end, Reply):
        flight.ended(Outcome(end.status, end.body, None, True, request_id))
    else:
        flight.ended(Outcome(None, b"", end.error, end.sent, request_id))


def _ended(before: Advert, advert: Advert) -> bool:
    """Whether the engine that was there is not any more. One that is merely not to be asked, or has other slots, is."""
    was, now = before.instance, advert.instance
    if was is not None and now is not None:
        return was.endpoint != now.endpoint
    return before.state == "ready" and advert.state != "ready"


def _may_use(key: Principal, advert: Advert) -> bool:
    return key.may_use(*advert.served_names, advert.base_model)


def _answers(advert: Advert, key: LaneKey) -> bool:
    model, launch_id = key
    if launch_id is None:
        return model in advert.served_names
    return launch_id in (advert.launch_id, advert.group_id)


def _absence(meant: list[Advert], key: LaneKey) -> str:
    """Why there is no engine for a lane, in words, and what helps."""
    model, launch_id = key
    what = f"the model {model!r}" if launch_id is None else f"the launch {launch_id}"
    states = sorted({advert.state for advert in meant})
    if "bootstrapping" in states:
        return f"{what} is being loaded"
    if not {"falling_asleep", "asleep", "waking"}.isdisjoint(states):
        return f"{what} sleeps or is waking"
    if "ready" in states:
        return f"{what} does not answer at the moment"
    if "stopping" in states:
        return f"{what} is being stopped"
    if launch_id is None:
        return f"{what} is not loaded: launch it"
    end = f"has ended ({' or '.join(states)})" if states else "is not there"
    return f"{what} {end} and will not come back: cancel this, and submit it again for one that runs or for a model"
