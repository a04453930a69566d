"""What is known of one request on its way: for whoever asks meanwhile, and for the record at its end.

Invariant: it only remembers; nothing here decides, waits or calls anybody. Never holds keys, queries or content.
"""

from __future__ import annotations

import time

from vllm_bootstrap.gateway.head import Head
from vllm_bootstrap.gateway.inflight import RequestInfo, State
from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.gateway.usage import Tap
from vllm_bootstrap.scheduler.tickets import Ticket, Usage
from vllm_bootstrap.serving import Instance

# Refusals that come before it is known whether anything serves what was asked for.
NOT_SERVED = frozenset({"model_not_found", "not_found", "draining"})


class Journey:
    """Set as things happen. Times are ``time.monotonic``: the loop's stands still within an iteration. ``waited``: it
    was in a queue, in vain."""

    __slots__ = (
        "_head", "_started_at", "bytes_in", "first_byte_at", "granted_at", "id", "instance", "model", "owner",
        "queue_ms", "queued_at", "request_id", "stream", "tap", "ticket", "waited",
    )  # fmt: skip

    def __init__(self, request_id: str, head: Head) -> None:
        self.request_id = request_id
        self._head = head
        self._started_at = time.monotonic()
        self.id = ""  # what it goes by while it is under way
        self.owner: str | None = None
        self.model: str | None = None
        self.ticket: Ticket | None = None
        self.instance: Instance | None = None
        self.tap: Tap | None = None
        self.first_byte_at: float | None = None
        self.stream = self.waited = False
        self.queue_ms = self.bytes_in = 0
        self.queued_at = self.granted_at = 0.0

    def spent(self) -> Usage | None:
        """What to account for: the engine's word, else, of a stream that was cut, what it has brought."""
        tap, ticket = self.tap, self.ticket
        if tap is None or tap.usage is not None or ticket is None or not self.stream or not tap.tokens:
            return None if tap is None else tap.usage
        return Usage(ticket.prompt_tokens, tap.tokens)

    def info(self, state: State) -> RequestInfo:
        ticket, tap, instance = self.ticket, self.tap, self.instance
        now = time.monotonic()
        return RequestInfo(
            self.id,
            ticket.cls if ticket is not None else None,
            self.owner or "",
            self.model,
            instance.launch_id if instance is not None and state == "running" else None,
            state,
            self._head.method,
            self._head.path,
            now - self._started_at,
            self._waited_ms(now),
            ticket.sequences if ticket is not None else 1,
            tap.tokens if tap is not None else 0,
            self.stream,
        )

    def record(self, status: int, code: str | None, spent: Usage | None, bytes_out: int) -> RequestRecord:
        """The end. ``spent`` is what ``spent()`` says."""
        now = time.monotonic()
        duration = now - self._started_at
        head, instance, ticket, began, tap = self._head, self.instance, self.ticket, self.first_byte_at, self.tap
        usage = None if tap is None else tap.usage
        made = None if spent is None else spent.completion_tokens
        granted_at = self.granted_at
        # As RequestRecord(…), without a call in between.
        return tuple.__new__(RequestRecord, (
            self.request_id,
            head.method,
            head.path,
            status,
            code,
            self.owner,
            self._served_name(code),
            instance.launch_id if instance is not None else None,
            ticket.cls if ticket is not None else None,
            self._waited_ms(now) if self.queued_at > granted_at else self.queue_ms,
            time.time() - duration,
            duration,
            None if began is None else began - granted_at,
            self.bytes_in,
            bytes_out,
            usage.prompt_tokens if usage is not None else None,
            made,
            None if made is None or began is None else self._between_tokens(made, now),
            self.stream,
        ))  # fmt: skip

    def _waited_ms(self, now: float) -> int:
        """All its time in the queue so far, that before it was taken back included."""
        waiting = now - self.queued_at if self.queued_at > self.granted_at else 0.0
        return self.queue_ms + int(waiting * 1000)

    def _served_name(self, code: str | None) -> str | None:
        """What took it is served as, or would have: a name that a client makes up is not kept."""
        instance = self.instance
        if instance is not None and instance.served_names:
            return instance.served_names[0]
        by_name = self._head.path.startswith("/v1/")
        known = self.waited or code not in NOT_SERVED  # nobody waits for a made-up name
        return self.model if by_name and self.ticket is not None and known else None

    def _between_tokens(self, made: int, now: float) -> float | None:
        """Mean time between two tokens of one sequence of a stream."""
        if not self.stream or self.first_byte_at is None or self.ticket is None:
            return None
        steps = made / self.ticket.sequences - 1
        return (now - self.first_byte_at) / steps if steps > 0 else None
