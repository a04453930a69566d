"""A request of batches on its way, and what a lane needs to send one. Little behaviour of its own."""

from __future__ import annotations

import time
from typing import Protocol

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches.work import Job, Outcome, Source


class Airfield(Protocol):
    """Who is told of flights: a lane."""

    def placed(self) -> None: ...
    def unplaced(self) -> None: ...
    def flight_ended(self, flight: Flight, outcome: Outcome) -> None: ...


class Carriage(Protocol):
    """A request under way. Nobody is called any more after ``cancel``."""

    def cancel(self) -> None: ...


class Desk(Protocol):
    """What a lane needs from outside."""

    def send(self, flight: Flight, principal: Principal) -> Carriage:
        """Ask for a place, send, and tell the flight: ``placed``, ``unplaced``, once ``ended`` (never from in here)."""

    def principal(self, owner: str) -> Principal | None:
        """The key of that name, if it is valid and may do batch work now."""


class Flight:
    """One request to an engine: a job, or several joined into one. ``launch``: where it has a place, since
    ``placed_at`` (monotonic)."""

    __slots__ = ("_lane", "carriage", "cost", "jobs", "launch", "number", "placed_at")

    def __init__(self, lane: Airfield, jobs: list[Job], number: int, cost: int) -> None:
        self._lane = lane
        self.jobs, self.number, self.cost = jobs, number, cost
        self.launch: str | None = None
        self.placed_at = 0.0
        self.carriage: Carriage | None = None

    @property
    def source(self) -> Source:
        return self.jobs[0].source

    def placed(self, launch_id: str) -> None:
        """It has a place, or another one."""
        before, self.launch, self.placed_at = self.launch, launch_id, time.monotonic()
        if before is None:
            self._lane.placed()

    def unplaced(self) -> None:
        """It waits, again or still."""
        before, self.launch = self.launch, None
        if before is not None:
            self._lane.unplaced()

    def ended(self, outcome: Outcome) -> None:
        self._lane.flight_ended(self, outcome)
