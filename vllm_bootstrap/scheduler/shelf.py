"""What waits and runs for one served model, and how much may wait. PURE.

Invariant: no more requests wait than ``QueueBounds`` allows, nor do their bodies hold more bytes; only requests that
come back after they had a place go beyond it, and a batch request of which there is no other: without one that waits,
batch would not get its floor while realtime fills the queue. Nothing here knows launches, keys or clocks.
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

    __slots__ = ("_batch", "_batch_bytes", "body_bytes", "in_flight", "name", "pace", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: dict[RequestClass, int] = dict.fromkeys(CLASSES, 0)
        self.in_flight: dict[RequestClass, int] = dict.fromkeys(CLASSES, 0)
        self.body_bytes = 0
        self.pace = Pace()
        self._batch: dict[int, Request] = {}  # may be displaced, in order of arrival
        self._batch_bytes = 0

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
        if cls == "batch" and not request.grant_number:
            self._batch[request.id] = request
            self._batch_bytes += request.ticket.body_bytes

    def remove(self, request: Request) -> None:
        """It does not wait any more."""
        self.waiting[request.ticket.cls] -= 1
        self.body_bytes -= request.ticket.body_bytes
        if self._batch.pop(request.id, None) is not None:
            self._batch_bytes -= request.ticket.body_bytes

    def youngest_batch(self) -> Request:
        """The batch request that came last and has never had a place. There must be one."""
        return self._batch[next(reversed(self._batch))]

    def over(self, bounds: QueueBounds) -> bool:
        """Whether too much waits. A single batch request does not count, unless its body alone is too much."""
        depth, held = self.depth, self.body_bytes
        if self.waiting["batch"] == 1 and self._batch_bytes <= bounds.body_bytes:
            depth, held = depth - 1, held - self._batch_bytes
        return depth > bounds.requests or held > bounds.body_bytes

    def over_without_batch(self, bounds: QueueBounds) -> bool:
        """Whether too much would wait even without the batch requests that have never had a place."""
        most = self.body_bytes - self._batch_bytes
        return self.depth - len(self._batch) > bounds.requests or most > bounds.body_bytes

    def clears_in(self, cls: RequestClass, now: float) -> float:
        """Seconds until today's queue is through, as far as a request of ``cls`` has to wait for it."""
        return self.pace.clears_in(self.depth if cls == "batch" else self.waiting["realtime"], now)

    def report(self) -> LoadReport:
        return LoadReport(dict(self.in_flight.items()), dict(self.waiting.items()))
