"""What waits and runs for one served model, and how much may wait. PURE.

Invariant: no more requests wait than ``QueueBounds`` allows, nor do their bodies hold more bytes. What goes beyond it:
requests that come back after they had a place, and a key's only waiting batch request, as long as those of all keys
together hold no more than the bound: without one that waits, batch would not get its floor while realtime fills the
queue, and if there were one such place for all, the same key could always be the one that has it. Nothing here knows
launches, limits of keys or clocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_bootstrap.scheduler.pace import Pace
from vllm_bootstrap.scheduler.queues import CLASSES, Request
from vllm_bootstrap.serving import LoadReport, RequestClass


@dataclass(frozen=True, slots=True)
class QueueBounds:
    """How many requests may wait for one served model, and how many bytes their bodies may have together."""

    requests: int
    body_bytes: int


class Shelf:
    """The books of one served model."""

    __slots__ = (
        "_batch", "_batch_bytes", "_lone", "_lone_bytes", "_of_key",
        "body_bytes", "in_flight", "name", "pace", "waiting",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: dict[RequestClass, int] = dict.fromkeys(CLASSES, 0)
        self.in_flight: dict[RequestClass, int] = dict.fromkeys(CLASSES, 0)
        self.body_bytes = 0
        self.pace = Pace()
        self._batch: dict[int, Request] = {}  # may be displaced, in order of arrival
        self._batch_bytes = 0
        self._of_key: dict[str, tuple[int, int]] = {}  # batch that waits: requests and bytes
        self._lone = self._lone_bytes = 0  # of keys of which one waits

    @property
    def idle(self) -> bool:
        return not (any(self.waiting.values()) or any(self.in_flight.values()))

    @property
    def depth(self) -> int:
        return self.waiting["realtime"] + self.waiting["batch"]

    def add(self, request: Request) -> None:
        """It waits now."""
        cls = request.ticket.cls
        self.waiting[cls] += 1
        self.body_bytes += request.ticket.body_bytes
        if cls == "batch":
            self._count(request, 1)
            if not request.grant_number:
                self._batch[request.id] = request
                self._batch_bytes += request.ticket.body_bytes

    def remove(self, request: Request) -> None:
        """It does not wait any more."""
        self.waiting[request.ticket.cls] -= 1
        self.body_bytes -= request.ticket.body_bytes
        if request.ticket.cls == "batch":
            self._count(request, -1)
        if self._batch.pop(request.id, None) is not None:
            self._batch_bytes -= request.ticket.body_bytes

    def _count(self, request: Request, change: int) -> None:
        owner = request.ticket.owner
        requests, held = self._of_key.pop(owner, (0, 0))
        if requests == 1:
            self._lone, self._lone_bytes = self._lone - 1, self._lone_bytes - held
        requests, held = requests + change, held + change * request.ticket.body_bytes
        if requests == 1:
            self._lone, self._lone_bytes = self._lone + 1, self._lone_bytes + held
        if requests:
            self._of_key[owner] = requests, held

    def youngest_batch(self) -> Request:
        """Of the batch requests that have never had a place the one that came last, rather of a key that has others.
        There must be one."""
        youngest = reversed(self._batch.values())
        more = (one for one in youngest if self._of_key[one.ticket.owner][0] > 1)
        return next(more, None) or self._batch[next(reversed(self._batch))]

    def counted(self, bounds: QueueBounds) -> tuple[int, int]:
        """Requests that wait and what their bodies hold, as far as they count for the bounds."""
        if self._lone_bytes > bounds.body_bytes:
            return self.depth, self.body_bytes
        return self.depth - self._lone, self.body_bytes - self._lone_bytes

    def over(self, bounds: QueueBounds) -> bool:
        """Whether too much waits."""
        requests, held = self.counted(bounds)
        return requests > bounds.requests or held > bounds.body_bytes

    def over_without_batch(self, bounds: QueueBounds) -> bool:
        """Whether too much would wait even without the batch requests that have never had a place."""
        most = self.body_bytes - self._batch_bytes
        return self.depth - len(self._batch) > bounds.requests or most > bounds.body_bytes

    def clears_in(self, cls: RequestClass, now: float) -> float:
        """Seconds until today's queue is through, as far as a request of ``cls`` has to wait for it."""
        return self.pace.clears_in(self.depth if cls == "batch" else self.waiting["realtime"], now)

    def report(self) -> LoadReport:
        return LoadReport(dict(self.in_flight.items()), dict(self.waiting.items()))
