"""What one key may do at once and per minute. PURE: time is an input.

Invariants, all exact however many requests arrive together:

* never more than ``max_parallel`` of a key's requests are queued or running;
* within any 60 seconds no more than ``requests_per_minute`` of them are accepted;
* none is accepted that would bring the tokens of the last 60 seconds above ``tokens_per_minute``. A request reserves
  its estimate when it is accepted. When the engine has told what it used, what was reserved too much is given back for
  that moment; what it used beyond the estimate counts from the moment that is known, since it was not foreseen;
* the estimates of a key's queued and running batch requests are never more than ``max_enqueued_tokens``;
* a request that is refused costs nothing; one that no engine worked on costs no tokens.

Nothing here knows queues, engines or HTTP.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import BadRequest, ConcurrencyLimit, TooManyRequests
from vllm_bootstrap.scheduler.pace import DEFAULT_RETRY_S
from vllm_bootstrap.scheduler.tickets import Ticket
from vllm_bootstrap.scheduler.window import WINDOW_S, Entry, Window


class Share(NamedTuple):
    """What is left of one limit per minute. ``reset_s``: until all of it is free again."""

    limit: int
    remaining: int
    reset_s: float

    def headers(self, what: bytes) -> tuple[tuple[bytes, bytes], ...]:
        return (
            (b"x-ratelimit-limit-" + what, b"%d" % self.limit),
            (b"x-ratelimit-remaining-" + what, b"%d" % self.remaining),
            (b"x-ratelimit-reset-" + what, b"%ds" % ceil(self.reset_s)),
        )


class RateState(NamedTuple):
    """What a key has left of its requests and tokens per minute; None where it has no such limit."""

    requests: Share | None
    tokens: Share | None

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The ``x-ratelimit-*`` headers OpenAI clients know."""
        requests = self.requests.headers(b"requests") if self.requests is not None else ()
        return requests + (self.tokens.headers(b"tokens") if self.tokens is not None else ())


class Charge:
    """Tokens one accepted request has been charged."""

    __slots__ = ("beyond", "enqueued", "entry", "name", "reserved")

    def __init__(self, name: str, entry: Entry | None, reserved: int, enqueued: int) -> None:
        self.name = name
        self.entry = entry
        self.reserved = reserved
        self.beyond = 0
        self.enqueued = enqueued


class KeyLimits:
    """Counts of all keys. Keys without limits cost one dictionary look-up."""

    def __init__(self) -> None:
        self._parallel: dict[str, int] = {}
        self._requests: dict[str, Window] = {}
        self._tokens: dict[str, Window] = {}
        self._enqueued: dict[str, int] = {}

    def check(self, principal: Principal, ticket: Ticket, now: float) -> None:
        """Raise if one more request of ``principal`` would break its limits. Changes nothing."""
        most = principal.max_parallel
        if most is not None and self._parallel.get(principal.name, 0) >= most:
            raise ConcurrencyLimit(
                f"Limit of this key: {_requests(most)} at once, and as many are queued or running. Wait for one to end",
                retry_after=1,
            )
        if principal.requests_per_minute is not None:
            self._check_requests(principal.name, principal.requests_per_minute, now)
        if principal.tokens_per_minute is not None:
            self._check_tokens(principal.name, principal.tokens_per_minute, _tokens(ticket), now)
        if principal.max_enqueued_tokens is not None and ticket.cls == "batch":
            self._check_enqueued(principal.name, principal.max_enqueued_tokens, _tokens(ticket))

    def enter(self, principal: Principal, ticket: Ticket, now: float) -> Charge | None:
        """Count one accepted request. What it was charged in tokens goes to ``settle`` and ``leave``."""
        name = principal.name
        self._parallel[name] = self._parallel.get(name, 0) + 1
        if principal.requests_per_minute is not None:
            _window(self._requests, name).add(1, now)
        enqueues = principal.max_enqueued_tokens is not None and ticket.cls == "batch"
        if principal.tokens_per_minute is None and not enqueues:
            return None
        tokens = _tokens(ticket)
        entry = None
        if principal.tokens_per_minute is not None:
            entry = _window(self._tokens, name).add(tokens, now)
        if enqueues:
            self._enqueued[name] = self._enqueued.get(name, 0) + tokens
        return Charge(name, entry, tokens, tokens if enqueues else 0)

    def settle(self, charge: Charge, tokens: int, now: float) -> None:
        """The engine has used ``tokens`` for it. What counts beyond the reserve is not given back again."""
        if charge.entry is None:
            return
        window = self._tokens[charge.name]
        window.correct(charge.entry, min(tokens, charge.reserved), now)
        beyond = tokens - charge.reserved - charge.beyond
        if beyond > 0:
            charge.beyond += beyond
            window.add(beyond, now)

    def leave(self, name: str, charge: Charge | None, now: float, *, worked: bool) -> None:
        """One request of the key ``name`` has ended. ``worked`` False: no engine did anything for it."""
        left = self._parallel[name] - 1
        if left:
            self._parallel[name] = left
        else:
            del self._parallel[name]
        if charge is None:
            return
        if charge.entry is not None and not worked:
            self._tokens[name].correct(charge.entry, 0, now)
        if charge.enqueued:
            self._enqueued[name] -= charge.enqueued
            if not self._enqueued[name]:
                del self._enqueued[name]

    def rate(self, principal: Principal, now: float) -> RateState | None:
        """What is left of the key's minute, None for a key without such limits."""
        requests, tokens = principal.requests_per_minute, principal.tokens_per_minute
        if requests is None and tokens is None:
            return None
        return RateState(
            None if requests is None else _share(_window(self._requests, principal.name), requests, now),
            None if tokens is None else _share(_window(self._tokens, principal.name), tokens, now),
        )

    def parallel(self, name: str) -> int:
        """Requests of the key ``name`` that are queued or running."""
        return self._parallel.get(name, 0)

    def enqueued(self, name: str) -> int:
        """Estimated tokens of its queued and running batch requests, as far as they are limited."""
        return self._enqueued.get(name, 0)

    def _check_requests(self, name: str, limit: int, now: float) -> None:
        window = _window(self._requests, name)
        accepted = window.total(now)
        if accepted >= limit:
            wait = window.less_in(accepted + 1 - limit, now) if limit else WINDOW_S
            raise TooManyRequests(
                f"Limit of this key: {_requests(limit)} a minute, and as many came in the last one. Send more slowly",
                retry_after=wait,
            )

    def _check_tokens(self, name: str, limit: int, tokens: int, now: float) -> None:
        if tokens > limit:
            raise BadRequest(
                f"This request may take about {tokens} tokens (prompt and answer), and this key has {limit} a minute: "
                "it can never run. Shorten it or lower its max_tokens"
            )
        window = _window(self._tokens, name)
        used = window.total(now)
        if used + tokens > limit:
            raise TooManyRequests(
                f"Limit of this key: {limit} tokens a minute. {used} are used or reserved, and this request may take "
                f"about {tokens} more. Send it later, or lower its max_tokens",
                retry_after=window.less_in(used + tokens - limit, now),
            )

    def _check_enqueued(self, name: str, limit: int, tokens: int) -> None:
        if tokens > limit:
            raise BadRequest(
                f"This batch request may take about {tokens} tokens (prompt and answer), and this key may have {limit} "
                "of batch under way: it can never run. Shorten it or lower its max_tokens"
            )
        under_way = self._enqueued.get(name, 0)
        if under_way + tokens > limit:
            raise TooManyRequests(
                f"Limit of this key: {limit} tokens of queued and running batch requests. {under_way} are under way, "
                f"and this request may take about {tokens} more. Send it when some have ended",
                retry_after=DEFAULT_RETRY_S,
            )


def _tokens(ticket: Ticket) -> int:
    return ticket.prompt_tokens + ticket.output_tokens


def _window(windows: dict[str, Window], name: str) -> Window:
    window = windows.get(name)
    if window is None:
        window = windows[name] = Window()
    return window


def _share(window: Window, limit: int, now: float) -> Share:
    return Share(limit, max(0, limit - window.total(now)), window.empty_in(now))


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"
