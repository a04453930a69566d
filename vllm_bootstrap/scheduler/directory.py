"""Who serves what: launches as announced, lanes of requests they could serve, one shelf for each model. PURE.

Invariant: a lane holds at any moment exactly the launches that may serve its requests now; it exists while somebody
waits in it or until the next change of a launch. Who may serve it depends on what it is for: the target, and the
models that the key may use. Nothing here knows who waits in which order, or slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.scheduler import refusals
from vllm_bootstrap.scheduler.capacity import Launch
from vllm_bootstrap.scheduler.queues import CLASSES, Lane, Request
from vllm_bootstrap.scheduler.shelf import Shelf
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Target
from vllm_bootstrap.serving import Advert, LoadReport


class Directory:
    """The launches by id, and what is looked up among them. ``ended(id)``: see ``Admission``."""

    def __init__(self, ended: Callable[[str], bool]) -> None:
        self.launches: dict[str, Launch] = {}
        self._ended = ended
        self._lanes: dict[tuple[Target, tuple[str, ...] | None], Lane] = {}
        self._shelves: dict[str, Shelf] = {}

    def lane(self, target: Target, principal: Principal | None) -> Lane:
        """Where requests of such a key to such a target belong. Raises the refusal when nobody may serve them now."""
        globs = None if principal is None else principal.models
        lane = self._lanes.get((target, globs))
        if lane is None:
            launches = self._pool(target, principal)
            if not launches:
                raise self.refusal(target, principal)
            name = target.name if isinstance(target, ByModel) else _first_name(launches[0].advert)
            lane = self._lanes[target, globs] = Lane(target, principal, launches, self._shelves[name])
        return lane

    def refusal(self, target: Target, principal: Principal | None) -> ApiError:
        """Why nobody may serve such a request now."""
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
            if not lane.launches or not any(lane.waiting.values()):
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
        """Running and waiting by served model, for all models that are announced."""
        announced = {name for launch in self.launches.values() for name in launch.advert.served_names}
        return {name: self._shelves[name].report() for name in sorted(announced)}

    def _pool(self, target: Target, principal: Principal | None) -> tuple[Launch, ...]:
        return tuple(
            one for one in self.launches.values() if one.answers_to(target) and _may_run(target, principal, one)
        )

    def _tidy_shelves(self) -> None:
        announced = {
            name for one in self.launches.values() for name in one.advert.served_names or (one.advert.launch_id,)
        }
        for name in announced - self._shelves.keys():
            self._shelves[name] = Shelf(name)
        for name in self._shelves.keys() - announced:
            if self._shelves[name].idle:
                del self._shelves[name]


def _first_name(advert: Advert) -> str:
    return next(iter(advert.served_names), advert.launch_id)


def _as_routed(launch: Launch) -> Advert:
    """Its advert, where one that is ejected looks like one that does not respond."""
    return replace(launch.advert, instance=None) if launch.ejected else launch.advert


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
