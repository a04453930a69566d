"""What a client that awaits a stream is told while its model is being loaded: comments, which readers of events skip.

Invariant: nothing is said before the request has waited ``FIRST_AFTER_S`` for a model that is being loaded. From then
on the answer is an event stream, so whatever follows ends it as streams end: with the engine's events, or with an error
event. Must not know: keys, queues, who loads models.
"""

from __future__ import annotations

import email.utils
import json
from collections.abc import Callable
from typing import Any, Protocol

from vllm_bootstrap.errors import UpstreamError

STREAMS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Routes whose answers are events when their body says ``stream``."""

FIRST_AFTER_S = 1.0
PAUSE_S = 0.95  # a second, but for the inaccuracy of who calls once a second
LONGEST_SILENCE_S = 10.0
"""Proxies on the way to the client take a longer one for the end."""

MOST_WORDS = 64 * 1024
"""Bytes of an engine's refusal that are passed on."""


class Announcer(Protocol):
    """Who writes to the client (``Relay``)."""

    announced: bool

    def announce(self, request_id: str, own: bytes) -> None:
        """Begin the event stream."""

    def comment(self, text: str) -> None:
        """Say something in it."""


class Loading:
    """One waiting request. ``line()`` says how far the load is, None: nothing is being loaded. ``own()``: header lines
    for the stream's head. ``now``, as in ``look``, is loop time."""

    __slots__ = ("_due", "_line", "_own", "_relay", "_request_id", "_said", "_said_at")

    def __init__(
        self, relay: Announcer, request_id: str, line: Callable[[], str | None], own: Callable[[], bytes], now: float
    ) -> None:
        self._relay, self._request_id = relay, request_id
        self._line, self._own = line, own
        self._due = now + FIRST_AFTER_S
        self._said = ""
        self._said_at = now

    def look(self, now: float) -> None:
        """Say what there is to say; to be called about once a second while the request waits."""
        if now < self._due:
            return
        line = self._line()
        if line is None:
            if not self._relay.announced:
                return
            line = "waiting for its turn"
        line = " ".join(line.split())
        if line == self._said and now - self._said_at < LONGEST_SILENCE_S:
            return
        if not self._relay.announced:
            date = email.utils.formatdate(usegmt=True).encode()
            self._relay.announce(self._request_id, b"%bdate: %b\r\n" % (self._own(), date))
        self._relay.comment(line)
        self._said, self._said_at, self._due = line, now, now + PAUSE_S


class Refusal(UpstreamError):
    """What an engine answered where only events can be sent any more: passed on in its own words, where those are an
    error's."""

    def __init__(self, status: int, words: bytes) -> None:
        super().__init__(f"The engine answered {status} and no stream")
        self._error = _error_in(words)

    def body(self) -> dict[str, Any]:
        return self._error or super().body()


def _error_in(words: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(words)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and isinstance(said.get("error"), dict) else None
