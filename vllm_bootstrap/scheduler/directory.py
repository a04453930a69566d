"""Who serves what: launches as announced, lanes of requests they could serve, one shelf for each model. PURE.

Invariant: a lane holds at any moment exactly the launches that may serve its requests now; it exists while somebody
waits in it or, where it has launches, until the next change of one. Who may serve it depends on what it is for: the
target, and the models that the key may use. A lane without launches exists only for a model that may be loaded on
demand (see ``Prospects``). Nothing here knows who waits in which order, or slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.scheduler import refusals
from vllm_bootstrap.scheduler.capacity import Launch
from vllm_bootstrap.scheduler.ports import Demand, Prospects
from vllm_bootstrap.scheduler.queues import CLASSES, Lane, Request
from vllm_bootstrap.scheduler.shelf import Shelf
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Target
from vllm_bootstrap.serving import Advert, LoadReport


class Directory:
    """The launches by id, and what is looked up among them. ``ended(id)`` and ``prospects``: see ``Admission``."""

    def __init__(self, ended: Callable[[str], bool], prospects: Prospects) -> None:
        self.launches: dict[str, Launch] = {}
        self._ended, self._prospects = ended, prospects
        self._lanes: dict[tuple[Target, tuple[str, ...] | None], Lane] = {}
        self._shelves: dict[str, Shelf] = {}

    def lane(self, target: Target, principal: Principal | None) -> Lane:
        """Where requests of such a key to such a target belong. Raises the refusal when nobody may serve them now, nor
        will on demand."""
        globs = None if principal is None else principal.models
        lane = self._lanes.get((target, globs))
        if lane is not None and lane.launches:
            return lane
        launches = self._pool(target, principal) if lane is None else ()
        if not launches:
            return self._cold_lane(target, principal, lane)
        name = target.name if isinstance(target, ByModel) else _first_name(launches[0].advert)
        lane = self._lanes[target, globs] = Lane(target, principal, launches, self._shelves[name])
        return lane

    def _cold_lane(self, target: Target, principal: Principal | None, lane: Lane | None) -> Lane:
        """The lane of a model that nothing serves now. Raises the refusal when nobody will."""
        if not isinstance(target, ByModel) or not self._hoped_for(target, principal):
            raise self.refusal(target, principal)
        refusal = self._prospects.refusal(target.name)
        if refusal is not None:
            raise refusal
        if lane is None:
            shelf = self._shelves.get(target.name) or self._shelves.setdefault(target.name, Shelf(target.name))
            globs = None if principal is None else principal.models
            lane = self._lanes[target, globs] = Lane(target, principal, (), shelf)
        return lane

    def let_go(self, lane: Lane) -> None:
        """Somebody has left it, or was refused at it. Without launches and without anybody who waits it is not kept:
        clients may name as many models as they like."""
        if lane.launches or any(lane.waiting.values()):
            return
        key = lane.target, None if lane.principal is None else lane.principal.models
        if self._lanes.get(key) is lane:
            del self._lanes[key]
        name = lane.shelf.name
        if lane.shelf.idle and self._shelves.get(name) is lane.shelf and name not in self._announced():
            del self._shelves[name]

    def _hoped_for(self, target: Target, principal: Principal | None) -> bool:
        """Whether what such a request needs may be loaded, and its key may use that. A launch that runs and merely
        lacks the route would lack it after a load, too."""
        if not isinstance(target, ByModel):
            return False
        base = self._prospects.base_of(target.name)
        if base is None or not (principal is None or principal.may_use(target.name, base)):
            return False
        return all(one.instance is None for one in self.launches.values() if one.answers_to(target))

    def refusal(self, target: Target, principal: Principal | None) -> ApiError:
        """Why nobody may serve such a request now."""
        if isinstance(target, ByModel) and self._hoped_for(target, principal):
            return refusals.loading(target.name, self._prospects)
        known = [launch for launch in self.launches.values() if launch.answers_to(target)]
        visible = [_as_routed(launch) for launch in known if _may_see(target, principal, launch.advert)]
        if isinstance(target, ByLaunch):
            return refusals.launch_refusal(target, visible, ended=not known and self._ended(target.id))
        return refusals.model_refusal(target, visible)

    def regroup(self) -> list[Request]:
        """Launches have changed: give each lane those that may serve it now, and each launch those that wait for it.
        Returns the requests nobody may serve any more; they are in lanes without launches now."""
        for launch in self.launches.values():
            launch.nobody_waits()
        stranded: list[Request] = []
        for key, lane in list(self._lanes.items()):
            lane.launches = self._pool(lane.target, lane.principal)
            waits = any(lane.waiting.values())
            if not waits or not (lane.launches or self._hoped_for(lane.target, lane.principal)):
                stranded += lane
                del self._lanes[key]
            else:
                for launch in lane.launches:
                    launch.all_wait(lane)
        self._tidy_shelves()
        return stranded

    def lanes(self) -> Iterable[Lane]:
        """All lanes, those in which nobody waits included."""
        return self._lanes.values()

    def waiting(self) -> Iterator[Request]:
        """All that wait."""
        for lane in self._lanes.values():
            yield from lane

    def shelf(self, name: str) -> Shelf | None:
        """The books of a served model; None when nothing of that name is announced or runs."""
        return self._shelves.get(name)

    def load(self, launch_id: str) -> LoadReport:
        """In flight on one launch; queued for it by id or under any model name it serves."""
        launch = self.launches.get(launch_id)
        queued: dict[str, int] = dict.fromkeys(CLASSES, 0)
        if launch is None:
            return LoadReport(dict.fromkeys(CLASSES, 0), queued)
        for lane in self._lanes.values():
            if launch.answers_to(lane.target):
                for cls in CLASSES:
                    queued[cls] += lane.waiting[cls]
        return LoadReport(dict(launch.in_flight.items()), queued)

    def queues(self) -> dict[str, LoadReport]:
        """Running and waiting by served model, for all models that are announced or waited for."""
        named = {name for launch in self.launches.values() for name in launch.advert.served_names}
        named |= {name for name, shelf in self._shelves.items() if shelf.depth}
        return {name: self._shelves[name].report() for name in sorted(named)}

    def demand(self) -> dict[str, Demand]:
        """Who waits by model name, of those who wait for a model and not for one launch."""
        found: dict[str, Demand] = {}
        for lane in self._lanes.values():
            if isinstance(lane.target, ByModel) and any(lane.waiting.values()):
                name = lane.target.name
                found[name] = _added(found.get(name), lane)
        return found

    def cold(self, name: str) -> list[Request]:
        """Those who wait for a model that nothing serves."""
        lanes = [lane for lane in self._lanes.values() if isinstance(lane.target, ByModel) and not lane.launches]
        return [request for lane in lanes if lane.target[0] == name for request in lane]

    def _pool(self, target: Target, principal: Principal | None) -> tuple[Launch, ...]:
        return tuple(
            one for one in self.launches.values() if one.answers_to(target) and _may_run(target, principal, one)
        )

    def _tidy_shelves(self) -> None:
        announced = self._announced()
        for name in announced - self._shelves.keys():
            self._shelves[name] = Shelf(name)
        for name in self._shelves.keys() - announced:
            if self._shelves[name].idle:
                del self._shelves[name]

    def _announced(self) -> set[str]:
        return {name for one in self.launches.values() for name in one.advert.served_names or (one.advert.launch_id,)}


def _added(known: Demand | None, lane: Lane) -> Demand:
    since: dict[str, float | None] = dict.fromkeys(CLASSES)
    for request in lane:
        began, before = request.since - request.waited, since[request.ticket.cls]
        since[request.ticket.cls] = began if before is None else min(before, began)
    fresh = Demand(
        lane.waiting["realtime"], lane.waiting["batch"], since["realtime"], since["batch"], bool(lane.launches)
    )
    if known is None:
        return fresh
    return Demand(
        known.realtime + fresh.realtime,
        known.batch + fresh.batch,
        _earlier(known.since, fresh.since),
        _earlier(known.batch_since, fresh.batch_since),
        known.served or fresh.served,
    )


def _earlier(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _first_name(advert: Advert) -> str:
    return next(iter(advert.served_names), advert.launch_id)


def _as_routed(launch: Launch) -> Advert:
    """Its advert, where one that is ejected or retired looks like one that does not respond."""
    return replace(launch.advert, instance=None) if launch.ejected or launch.retired else launch.advert


def _may_see(target: Target, principal: Principal | None, advert: Advert) -> bool:
    """Whether the key's model list covers what the launch is and the name it was asked under."""
    if principal is None or principal.models is None:
        return True
    name = target.name if isinstance(target, ByModel) else (*advert.served_names, advert.base_model)[0]
    return principal.may_use(name, advert.base_model)


def _may_run(target: Target, principal: Principal | None, launch: Launch) -> bool:
    if launch.instance is None or not _may_see(target, principal, launch.advert):
        return False
    return not isinstance(target, ByModel) or target.route is None or launch.offers(target.route)
