"""Serialises start-ups on one physical GPU, in order of arrival.

Two engines that start at once on one GPU each charge the other's memory to themselves, so a start holds its GPUs from
before spawn until ready or dead. Invariant: at most one ticket inside for each GPU; no ticket overtakes an earlier one
that wants the same GPU. Single event loop, no IO.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Ticket:
    """One start's place in line; ``entered`` resolves when it is its turn. Made inside a running loop."""

    launch_id: str
    gpus: frozenset[str]
    entered: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class StartGate:
    def __init__(self) -> None:
        self._line: list[Ticket] = []

    def enter(self, launch_id: str, gpu_uuids: Iterable[str]) -> Ticket:
        """Get in line. The ticket must be given back with ``leave``."""
        ticket = Ticket(launch_id, frozenset(gpu_uuids))
        self._line.append(ticket)
        self._admit()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give the GPUs to the next in line, or stop waiting. Idempotent."""
        if ticket in self._line:
            self._line.remove(ticket)
            ticket.entered.cancel()
            self._admit()

    def ahead_of(self, launch_id: str) -> list[str]:
        """Launches that a waiting launch waits for, for people to see."""
        for index, ticket in enumerate(self._line):
            if ticket.launch_id == launch_id:
                return [other.launch_id for other in self._line[:index] if other.gpus & ticket.gpus]
        return []

    def _admit(self) -> None:
        taken: set[str] = set()
        for ticket in self._line:
            if not (ticket.gpus & taken) and not ticket.entered.done():
                ticket.entered.set_result(None)
            taken |= ticket.gpus
