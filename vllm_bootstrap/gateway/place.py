"""A request's place in the scheduler: asked for, waited for, held, taken back, lost, given back.

Invariant: whatever the request goes through, it holds or awaits at most one place, and ``leave`` ends that. What the
scheduler is told about the answer (its beginning, its tokens) it is told at most once and before the place is given
back. Must not know: connections, bodies, HTTP.
"""

from __future__ import annotations

from typing import Literal, Protocol

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.scheduler.gate import Gate, Lease, Pending, Target
from vllm_bootstrap.scheduler.tickets import Ending, Ticket, Usage
from vllm_bootstrap.serving import Instance

MOST_ENGINES = 8
"""How many engines are tried for one request, each unreachable, before it is refused."""


class Holder(Protocol):
    """Who wants a place. All are called at most once for each ``ask`` or ``again``, none after ``leave``."""

    def on_place(self, instance: Instance) -> None:
        """Here is what it has waited for."""

    def on_no_place(self, error: ApiError) -> None:
        """There will be none."""

    def on_revoked(self) -> None:
        """The place is taken back before the answer has begun: leave the engine, then ``again``."""


class Place:
    """One request's place, or its wait for one."""

    __slots__ = ("_gate", "_holder", "_lease", "_pending", "_tries", "queue_ms")

    def __init__(self, gate: Gate, holder: Holder) -> None:
        self._gate = gate
        self._holder: Holder | None = holder
        self._lease: Lease | None = None
        self._pending: Pending | None = None
        self._tries = 1
        self.queue_ms = 0

    def ask(
        self, target: Target, ticket: Ticket, deadline: float | None = None, hold_s: float | None = None
    ) -> Instance | None:
        """Ask for a place. Returns where it is; None: not yet, ``on_place`` or ``on_no_place`` will come. ``deadline``
        and ``hold_s``: see ``Gate.request``. Raises the refusal."""
        return self._take(self._gate.request(target, ticket, deadline, hold_s))

    def again(self, why: Literal["revoked", "unreachable"]) -> Instance | None:
        """This place is of no use: get another one, as with ``ask``. Raises the refusal; then there is none any
        more."""
        lease, self._lease = self._lease, None
        assert lease is not None  # noqa: S101 - only who holds one may ask again
        lease.on_revoked = None
        if why == "unreachable":
            self._tries += 1
        return self._take(lease.again(why))

    @property
    def may_fail_over(self) -> bool:
        """Whether to try another engine when this one cannot be reached."""
        return self._lease is not None and self._tries < MOST_ENGINES

    def _take(self, got: Lease | Pending) -> Instance | None:
        holder = self._holder
        assert holder is not None  # noqa: S101 - nobody asks after ``leave``
        if isinstance(got, Pending):
            self._pending = got
            got.notify = self._on_outcome
            return None
        self._lease = got
        self.queue_ms = got.queue_ms
        if got.ticket.replayable:  # no other place is ever taken back
            got.on_revoked = holder.on_revoked
        return got.instance

    def _on_outcome(self, outcome: Lease | ApiError) -> None:
        self._pending = None
        holder = self._holder
        assert holder is not None  # noqa: S101 - nobody is told anything after ``leave``
        if isinstance(outcome, ApiError):
            holder.on_no_place(outcome)
            return
        instance = self._take(outcome)
        assert instance is not None  # noqa: S101 - it is a lease
        holder.on_place(instance)

    def first_byte(self, *, streamed: bool) -> None:
        """The answer has begun: the place is not taken back any more."""
        if self._lease is not None:
            self._lease.first_byte(streamed=streamed)

    def stay(self) -> None:
        """The client has been told something: this place cannot be left for another one any more."""
        if self._lease is not None:
            self._lease.on_revoked = None

    def leave(self, usage: Usage | None, ending: Ending) -> None:
        """Give it back, or do not wait any longer. ``usage``: what it used, when that is known. Idempotent."""
        pending, self._pending = self._pending, None
        lease, self._lease = self._lease, None
        self._holder = None  # who holds this: a circle would keep both until the garbage collector comes by
        if pending is not None:
            pending.cancel()
        if lease is not None:
            lease.on_revoked = None
            try:
                if usage is not None:
                    lease.settle(usage)
            finally:
                lease.release(ending)
