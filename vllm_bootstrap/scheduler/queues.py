"""Who waits, and whose turn it is: requests, lanes of requests, and turns between keys. PURE.

Invariants:

* a lane holds requests that the same launches may serve; within a lane and class a key's requests go by priority,
  then arrival;
* ``Turns`` are fair between the keys that wait for one launch in one class. Each key has an account of the sequences it
  was given there while others waited; the smallest account goes next, then the oldest head. Whoever starts to wait
  begins at the level of the last grant: idling saves nothing up. So of two keys that both wait all the time, neither
  gets more than the other plus their largest requests; and a newcomer waits for at most one request of each other key;
* finding the next request costs logarithms, never a walk over a queue: what left the middle of a queue is marked and
  dropped when it comes up, or all at once when such leftovers outnumber the rest.

Nothing here knows slots, limits, clocks or why somebody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.scheduler.tickets import Target, Ticket
from vllm_bootstrap.serving import RequestClass

if TYPE_CHECKING:
    from vllm_bootstrap.scheduler.capacity import Launch
    from vllm_bootstrap.scheduler.limits import Charge
    from vllm_bootstrap.scheduler.shelf import Shelf

CLASSES: tuple[RequestClass, RequestClass] = ("realtime", "batch")
_FEW = 16


class Request:
    """One request, from its acceptance to its end. ``launch`` is set while it holds ``cost`` slots there; ``since`` is
    when it began to wait this time, ``waited`` what it waited before, ``stint`` how often it has begun to."""

    __slots__ = (
        "began", "charge", "cost", "counted", "grant_number", "granted_at", "id", "lane", "launch", "promoted",
        "queued", "returning", "served", "since", "stint", "taken_back", "target", "ticket", "waited",
    )  # fmt: skip

    def __init__(self, request_id: int, target: Target, ticket: Ticket, lane: Lane, now: float) -> None:
        self.id = request_id
        self.target = target
        self.ticket = ticket
        self.lane = lane
        self.since = now
        self.launch: Launch | None = None
        self.charge: Charge | None = None
        self.waited = self.granted_at = 0.0
        self.queued = self.began = self.returning = self.promoted = False
        self.cost = self.counted = self.served = self.stint = self.taken_back = self.grant_number = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among the requests of its key and class."""
        return -self.ticket.priority, self.id


class Line:
    """One key's waiting requests of one class in one lane."""

    __slots__ = ("_heap", "live")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Request]] = []
        self.live = 0

    def add(self, request: Request) -> None:
        self.live += 1
        heappush(self._heap, (-request.ticket.priority, request.id, request.stint, request))

    def left(self) -> None:
        """One of its requests does not wait any more (its ``queued`` says so)."""
        self.live -= 1
        if len(self._heap) > 2 * self.live + _FEW:
            self._heap = [entry for entry in self._heap if _waits(entry)]
            heapify(self._heap)

    def head(self) -> Request:
        """The next one. There must be one."""
        while not _waits(self._heap[0]):
            heappop(self._heap)
        return self._heap[0][3]

    def __iter__(self) -> Iterator[Request]:
        return (entry[3] for entry in self._heap if _waits(entry))


def _waits(entry: tuple[int, int, int, Request]) -> bool:
    """Whether the entry is not a leftover: of a request that is gone, or of an earlier time it waited."""
    return entry[3].queued and entry[3].stint == entry[2]


class Lane:
    """Requests with one target from keys that see the same models, as ``principal`` (one of them; None: all models)
    does. ``launches`` may serve each of them now."""

    __slots__ = ("launches", "lines", "principal", "shelf", "target", "waiting")

    def __init__(self, target: Target, principal: Principal | None, launches: tuple[Launch, ...], shelf: Shelf) -> None:
        self.target = target
        self.principal = principal
        self.launches = launches
        self.shelf = shelf
        self.lines: dict[tuple[RequestClass, str], Line] = {}
        self.waiting: dict[RequestClass, int] = dict.fromkeys(CLASSES, 0)

    def __iter__(self) -> Iterator[Request]:
        return (request for line in self.lines.values() for request in line)


class Lines:
    """All that wait, by class and key, so that a key's next request for a launch is found without a search."""

    __slots__ = ("_by_key",)

    def __init__(self) -> None:
        self._by_key: dict[tuple[RequestClass, str], dict[Lane, Line]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, request: Request) -> None:
        """It waits now."""
        lane, key = request.lane, (request.ticket.cls, request.ticket.owner)
        line = lane.lines.get(key)
        if line is None:
            line = lane.lines[key] = Line()
            self._by_key.setdefault(key, {})[lane] = line
        request.queued = True
        request.stint += 1
        line.add(request)
        lane.waiting[key[0]] += 1

    def remove(self, request: Request) -> None:
        """It does not wait any more."""
        lane, key = request.lane, (request.ticket.cls, request.ticket.owner)
        line = lane.lines[key]
        request.queued = False
        line.left()
        lane.waiting[key[0]] -= 1
        if not line.live:
            del lane.lines[key]
            lanes = self._by_key[key]
            del lanes[lane]
            if not lanes:
                del self._by_key[key]

    def next_of(self, cls: RequestClass, owner: str, launch: Launch) -> Request | None:
        """The next request of a key that ``launch`` may serve."""
        best: Request | None = None
        for lane, line in self._by_key.get((cls, owner), {}).items():
            if launch in lane.launches:
                head = line.head()
                if best is None or head.rank < best.rank:
                    best = head
        return best


class Turns:
    """Whose turn it is at one launch, in one class. ``find(owner)`` gives a key's next request there, if any."""

    __slots__ = ("_find", "_heap", "_level", "_listed", "_served")

    def __init__(self, find: Callable[[str], Request | None]) -> None:
        self._find = find
        self._heap: list[tuple[int, int, str]] = []
        self._listed: dict[str, int] = {}
        self._served: dict[str, int] = {}
        self._level = 0

    def enter(self, request: Request) -> None:
        """A request has begun to wait (or waits again)."""
        owner = request.ticket.owner
        served = self._listed.get(owner)
        if served is None:
            served = self._listed[owner] = max(self._served.get(owner, 0), self._level)
            self._served[owner] = served
        elif not request.grant_number:
            return  # its key is listed already; only those that come back can be older than the head of their key
        heappush(self._heap, (served, request.id, owner))

    def first(self) -> Request:
        """The request whose turn it is. There must be one."""
        heap = self._heap
        while True:
            served, _, owner = heap[0]
            if self._listed.get(owner) == served:
                request = self._find(owner)
                if request is not None:
                    return request
                del self._listed[owner]
                if served <= self._level:
                    del self._served[owner]
            heappop(heap)

    def granted(self, request: Request) -> None:
        """``request`` was the first, does not wait any more and holds ``cost`` slots."""
        owner = request.ticket.owner
        served = self._served[owner]
        self._level = max(self._level, served)
        request.served = request.cost
        self._served[owner] = self._listed[owner] = served + request.cost
        following = self._find(owner)
        heappush(self._heap, (served + request.cost, request.id if following is None else following.id, owner))

    def refund(self, request: Request) -> None:
        """``request`` was granted and is taken back: its key has not had that."""
        owner, cost, request.served = request.ticket.owner, request.served, 0
        if owner in self._served:
            self._served[owner] = max(0, self._served[owner] - cost)
            if owner in self._listed:
                self._listed[owner] = self._served[owner]
                heappush(self._heap, (self._served[owner], request.id, owner))
