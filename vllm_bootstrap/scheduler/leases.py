"""What a request holds: a ``Lease`` while it has a place, a ``Pending`` while it waits for one.

Invariant: each ends exactly once, and what is done with one that is over has no effect. Must not know: who decides,
HTTP, connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal, Protocol

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.scheduler.tickets import Ending, Grant, Ticket, Usage
from vllm_bootstrap.serving import Instance


class Desk(Protocol):
    """Whom leases and waiters speak to: the gate."""

    def began(self, request_id: int, *, streamed: bool) -> None: ...

    def settled(self, request_id: int, usage: Usage) -> None: ...

    def finish(self, request_id: int, ending: Ending) -> None: ...

    def again(self, request_id: int, lease: Lease) -> Lease | Pending: ...

    def abandon(self, request_id: int) -> None: ...

    def unreachable(self, launch_id: str) -> None: ...


class Lease:
    """A place on an engine. Whoever holds it must ``release`` it (or ask ``again``); releasing twice is harmless.

    ``on_revoked`` is set by holders of replayable requests before they return to the loop. It is called once at most,
    from a fresh iteration, never after ``first_byte``: the holder then aborts at the engine and calls
    ``again("revoked")`` (or ``release``, when its client is gone). A holder without it keeps its place."""

    __slots__ = (
        "_began", "_gate", "_id", "deadline", "hold_s", "instance", "on_revoked", "patience_s", "queue_ms", "ticket",
    )  # fmt: skip

    def __init__(
        self,
        gate: Desk,
        grant: Grant,
        ticket: Ticket,
        deadline: float | None,
        patience_s: float,
        hold_s: float | None,
    ) -> None:
        self.instance: Instance = grant.instance
        self.queue_ms = int(grant.waited_s * 1000)
        self.on_revoked: Callable[[], None] | None = None
        self.ticket = ticket
        self.deadline, self.patience_s = deadline, patience_s  # until when, or how long, it may still wait
        self.hold_s = hold_s  # likewise while nothing serves its model, see ``Gate.request``
        self._gate: Desk | None = gate
        self._id = grant.request
        self._began = False

    def first_byte(self, *, streamed: bool = True) -> None:
        """The answer has begun: it is not taken back any more. ``streamed`` False: the answer came whole at the end, so
        that this moment says nothing about the time to a first token. Cheap and idempotent."""
        if self._began or self._gate is None:
            return
        self._began = True
        if streamed or self.ticket.cls == "batch":  # realtime is never taken back
            self._gate.began(self._id, streamed=streamed)

    def settle(self, usage: Usage) -> None:
        """What the engine says it used, before ``release``. The last call counts."""
        principal = self.ticket.principal
        if principal is not None and principal.tokens_per_minute is not None and self._gate is not None:
            self._gate.settled(self._id, usage)

    def release(self, ending: Ending = "finished") -> None:
        """Give the place back. Idempotent; never blocks."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.finish(self._id, ending)

    def again(self, why: Literal["revoked", "unreachable"]) -> Lease | Pending:
        """Ask again with the same ticket, at its old place in the queue; this lease is over. ``unreachable``: the
        engine could not be connected to, nothing was sent (implies ``Gate.unreachable``). Raises ``ApiError`` when
        nobody can serve it; it has ended then. The time it had a place does not count as waiting."""
        gate, self._gate = self._gate, None
        if gate is None:
            raise RuntimeError("this lease is over")
        if why == "unreachable":
            gate.unreachable(self.instance.launch_id)
        return gate.again(self._id, self)

    @property
    def may_be_revoked(self) -> bool:
        """Whether its holder would follow."""
        return not self._began and self.on_revoked is not None

    def revoke(self) -> None:
        """Called by the gate, once: tell the holder."""
        if self.on_revoked is not None:
            self.on_revoked()


class Pending:
    """A request that waits for its turn. ``notify`` is called once with a ``Lease`` or the ``ApiError`` that ended
    it, unless ``cancel`` came first; a lease that was under way when ``cancel`` came is released. ``held``: its timer
    ends the time that it may wait for a model to be loaded, not yet the one it may wait at all."""

    __slots__ = ("_gate", "_id", "_over", "deadline", "due", "held", "hold_s", "model", "notify", "ticket", "timer")

    def __init__(
        self,
        gate: Desk,
        request_id: int,
        ticket: Ticket,
        deadline: float | None,
        due: float,
        model: str,
        hold_s: float | None,
    ) -> None:
        self._gate = gate
        self._id = request_id
        self._over = False
        self.ticket, self.model = ticket, model
        self.deadline, self.due, self.hold_s = deadline, due, hold_s
        self.notify: Callable[[Lease | ApiError], None] = lambda _outcome: None
        self.timer: asyncio.TimerHandle | None = None
        self.held = False

    def cancel(self) -> None:
        """Leave the queue, or hand back what was just granted. Idempotent."""
        if not self._over:
            self._over = True
            self._gate.abandon(self._id)

    def resolve(self, outcome: Lease | ApiError) -> None:
        """Called by the gate, once."""
        if self._over:
            if isinstance(outcome, Lease):
                outcome.release("unworked")
            return
        self._over = True
        self.notify(outcome)
