"""Which launch takes which request next, and what it takes back: rules (a) to (d) of ``admission``. PURE.

Invariant: after each call nothing waits that the rules let run, and every grant, revocation and end is counted at the
launch, the model and the queue alike. Nothing here knows keys' limits, or why requests come and go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_bootstrap.scheduler.capacity import Launch
from vllm_bootstrap.scheduler.queues import Lines, Request
from vllm_bootstrap.scheduler.tickets import Effect, Grant, Revoke


class Outcome:
    """What remains to be done after a call: ``effects`` are what holders must be told. ``batch_waiting``: so many batch
    requests wait anywhere; as long as there are any, budgets must be asked again when they change with time alone."""

    __slots__ = ("batch_waiting", "effects")

    def __init__(self) -> None:
        self.effects: list[Effect] = []
        self.batch_waiting = 0


class Dispatcher:
    """Moves requests between queues and launches."""

    def __init__(self) -> None:
        self.outcome = Outcome()
        self.lines = Lines()
        self._grants = 0

    # Waiting

    def queue(self, request: Request, now: float) -> Grant | None:
        """``request`` waits, or gets a place if its turn comes before all that do (7)."""
        ticket, lane = request.ticket, request.lane
        self.lines.add(request)
        lane.shelf.add(request)
        self.outcome.batch_waiting += ticket.cls == "batch"
        for launch in lane.launches:
            launch.count(request, 1, now)
            launch.turns[ticket.cls].enter(request)
        self.pump(lane.launches, now)
        return None if request.launch is None else self._own_grant(request)

    def leave(self, request: Request, now: float) -> None:
        """``request`` does not wait any more. What waits behind it may run now: ``pump``."""
        self.lines.remove(request)
        request.lane.shelf.remove(request)
        self.outcome.batch_waiting -= request.ticket.cls == "batch"
        for launch in request.lane.launches:
            launch.count(request, -1, now)

    def _own_grant(self, request: Request) -> Grant:
        """Out of the effects, because the caller hears of it at once."""
        effects = self.outcome.effects
        grant = next(one for one in effects if isinstance(one, Grant) and one.request == request.id)
        effects.remove(grant)
        return grant

    # Running

    def free_launch(self, request: Request, now: float) -> Launch | None:
        """The least busy launch that could take an arriving request at once because nobody comes before it (6)."""
        best: Launch | None = None
        realtime = request.ticket.cls == "realtime"
        for launch in request.lane.launches:
            waiting = launch.waiting
            if waiting["realtime"]:
                continue
            free = launch.fits(request) if realtime else not waiting["batch"] and launch.fits_batch(request, now)
            if free and (best is None or launch.busyness < best.busyness):
                best = launch
        return best

    def start(self, request: Request, launch: Launch, now: float, *, promoted: bool = False) -> Grant:
        """``request``, which does not wait (any more), gets its place."""
        instance = launch.advert.instance
        assert instance is not None  # noqa: S101 - only launches that can be routed to are in lanes
        self._grants += 1
        launch.start(request, self._grants, now, promoted=promoted)
        cls, shelf = request.ticket.cls, request.lane.shelf
        shelf.in_flight[cls] += 1
        request.waited += now - request.since
        if launch.revocable and cls == "realtime":
            self.take_back(launch, now)
        return Grant(request.id, instance, request.waited, promoted, shelf.name)

    def stop(self, request: Request, now: float, *, worked: bool) -> Launch:
        """``request`` gives its place back. What waits may run now: ``pump``. ``worked``: see ``KeyLimits.leave``."""
        launch = request.launch
        assert launch is not None  # noqa: S101 - the caller has looked
        launch.end(request, now, worked=worked)
        request.lane.shelf.in_flight[request.ticket.cls] -= 1
        return launch

    # Granting to those who wait

    def pump(self, launches: Iterable[Launch], now: float) -> None:
        """Grant as long as any of ``launches`` has room for the one whose turn it is there."""
        ready = [launch for launch in launches if launch.waiting["realtime"] or launch.waiting["batch"]]
        while ready:
            launch = min(ready, key=_busyness) if len(ready) > 1 else ready[0]
            request = self._grant_next(launch, now)
            if request is None:
                ready.remove(launch)
            else:  # others may have waited behind it elsewhere
                ready += [one for one in request.lane.launches if one not in ready]

    def _grant_next(self, launch: Launch, now: float) -> Request | None:
        waits = launch.waiting
        if waits["batch"] and launch.promotes(now):
            request = launch.turns["batch"].first()
            regular = not waits["realtime"] and launch.fits_batch(request, now)
            return self._grant(request, launch, now, promoted=not regular)  # (b), (c)
        if waits["realtime"]:
            request = launch.turns["realtime"].first()
            return self._grant(request, launch, now) if launch.fits(request) else None  # (a)
        if waits["batch"]:
            request = launch.turns["batch"].first()
            return self._grant(request, launch, now) if launch.fits_batch(request, now) else None  # (b)
        return None

    def _grant(self, request: Request, launch: Launch, now: float, *, promoted: bool = False) -> Request:
        self.leave(request, now)
        grant = self.start(request, launch, now, promoted=promoted)
        launch.turns[request.ticket.cls].granted(request)
        self.outcome.effects.append(grant)
        return request

    # Taking back

    def take_back(self, launch: Launch, now: float) -> None:
        """Revoke what the batch budget of ``launch`` has become too small for."""
        request = launch.youngest()
        if request is None:
            return
        too_many = launch.budget.take_back(now) - launch.returning
        while request is not None and too_many > 0:
            too_many -= request.cost
            self._revoke(request)
            request = launch.youngest()

    def make_room(self, launches: Sequence[Launch]) -> None:
        """Revoke as much as the realtime requests that wait for any of ``launches`` need and is not coming anyway."""
        if not launches:
            return
        wanted = max(one.wanted for one in launches)
        short = wanted - sum(one.free + one.returning for one in launches) if wanted else 0
        while short > 0:
            youngest = [request for one in launches if (request := one.youngest()) is not None]
            if not youngest:
                return
            request = max(youngest, key=_grant_number)
            short -= request.cost
            self._revoke(request)

    def _revoke(self, request: Request) -> None:
        assert request.launch is not None  # noqa: S101 - only what runs is revocable
        request.launch.revoke(request)
        self.outcome.effects.append(Revoke(request.id))


def _busyness(launch: Launch) -> tuple[int, int]:
    return launch.busyness


def _grant_number(request: Request) -> int:
    return request.grant_number
