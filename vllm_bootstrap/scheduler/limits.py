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

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import BadRequest, ConcurrencyLimit, TooManyRequests
from vllm_bootstrap.scheduler.pace import DEFAULT_RETRY_S
from vllm_bootstrap.scheduler.tickets import Ticket
from vllm_bootstrap.scheduler.window import WINDOW_S, Entry, Moments, Window

# Names of header lines. All of a key's minute is free again after a minute at most.
_REQUESTS = (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests")
_TOKENS = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")
MANY_ACCOUNTS = 1000
_SECONDS = tuple(b"%ds" % seconds for seconds in range(int(WINDOW_S) + 1))

Lines = tuple[tuple[bytes, bytes], ...]


@dataclass(slots=True)
class Share:
    """What is left of one limit per minute. ``reset_s``: until all of it is free again."""

    limit: int
    remaining: int
    reset_s: float


class RateState(NamedTuple):
    """What a key has left of its requests and tokens per minute; None where it has no such limit."""

    requests: Share | None
    tokens: Share | None

    def headers(self) -> Lines:
        """The ``x-ratelimit-*`` headers OpenAI clients know."""
        requests, tokens = self
        if tokens is None:
            return () if requests is None else _lines(_REQUESTS, requests)
        return _lines(_TOKENS, tokens) if requests is None else _lines(_REQUESTS, requests) + _lines(_TOKENS, tokens)


_REQUEST_LINES, _TOKEN_LINES = (b"%b: %%d\r\n%b: %%d\r\n%b: %%ds\r\n" % names for names in (_REQUESTS, _TOKENS))


def _lines(names: tuple[bytes, bytes, bytes], share: Share) -> Lines:
    limit, left, reset = names
    return (limit, b"%d" % share.limit), (left, b"%d" % share.remaining), (reset, _SECONDS[ceil(share.reset_s)])


class Charge:
    """Tokens one accepted request has been charged."""

    __slots__ = ("account", "beyond", "enqueued", "entry", "reserved")

    def __init__(self, account: Account, entry: Entry | None, reserved: int, enqueued: int) -> None:
        self.account = account
        self.entry = entry
        self.reserved = reserved
        self.beyond = 0
        self.enqueued = enqueued


class Account:
    """What one key has under way, and what it was given within the last minute."""

    __slots__ = ("enqueued", "parallel", "requests", "tokens")

    def __init__(self) -> None:
        self.parallel = self.enqueued = 0
        self.requests = Moments()
        self.tokens = Window()

    def is_blank(self, now: float) -> bool:
        """Whether a new one would say the same."""
        return not (self.parallel or self.requests.total(now) or self.tokens.total(now))


class KeyLimits:
    """The accounts of all keys. Keys without limits cost little more than a dictionary look-up."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._most = MANY_ACCOUNTS

    def check(self, principal: Principal, ticket: Ticket, now: float) -> None:
        """Raise if one more request of ``principal`` would break its limits. Changes nothing."""
        account = self._accounts.get(principal.name) or self._open(principal.name, now)
        most = principal.max_parallel
        if most is not None and account.parallel >= most:
            raise ConcurrencyLimit(
                f"Limit of this key: {_requests(most)} at once, and as many are queued or running. Wait for one to end",
                retry_after=1,
            )
        most = principal.requests_per_minute
        if most is not None and account.requests.total(now) >= most:
            raise _too_many_requests(account, most, now)
        if principal.tokens_per_minute is not None:
            _check_tokens(account, principal.tokens_per_minute, ticket.prompt_tokens + ticket.output_tokens, now)
        if principal.max_enqueued_tokens is not None and ticket.cls == "batch":
            _check_enqueued(account, principal.max_enqueued_tokens, ticket.prompt_tokens + ticket.output_tokens)

    def enter(self, principal: Principal, ticket: Ticket, now: float) -> Charge | None:
        """Count one accepted request, which was checked. What it was charged in tokens goes to ``settle`` and
        ``leave``."""
        account = self._accounts[principal.name]
        account.parallel += 1
        if principal.requests_per_minute is not None:
            account.requests.add(now)
        enqueues = principal.max_enqueued_tokens is not None and ticket.cls == "batch"
        if principal.tokens_per_minute is None and not enqueues:
            return None
        tokens = ticket.prompt_tokens + ticket.output_tokens
        entry = None if principal.tokens_per_minute is None else account.tokens.add(tokens, now)
        if not enqueues:
            return Charge(account, entry, tokens, 0)
        account.enqueued += tokens
        return Charge(account, entry, tokens, tokens)

    def settle(self, charge: Charge, tokens: int, now: float) -> None:
        """The engine has used ``tokens`` for it. What counts beyond the reserve is not given back again."""
        if charge.entry is None:
            return
        window = charge.account.tokens
        window.correct(charge.entry, min(tokens, charge.reserved), now)
        beyond = tokens - charge.reserved - charge.beyond
        if beyond > 0:
            charge.beyond += beyond
            window.add(beyond, now)

    def leave(self, name: str, charge: Charge | None, now: float, *, worked: bool) -> None:
        """One request of the key ``name`` has ended. ``worked`` False: no engine did anything for it."""
        account = self._accounts[name]
        account.parallel -= 1
        if charge is None:
            return
        account.enqueued -= charge.enqueued
        if charge.entry is not None and not worked:
            account.tokens.correct(charge.entry, 0, now)

    def rate(self, principal: Principal, now: float) -> RateState | None:
        """What is left of the key's minute, None for a key without such limits."""
        most, most_tokens = principal.requests_per_minute, principal.tokens_per_minute
        if most is None and most_tokens is None:
            return None
        account = self._accounts.get(principal.name) or self._open(principal.name, now)
        requests = None if most is None else _share(account.requests, most, now)
        return RateState(requests, None if most_tokens is None else _share(account.tokens, most_tokens, now))

    def lines(self, principal: Principal, now: float) -> bytes:
        """The headers of ``rate`` as lines of a head: they go with each answer."""
        most, most_tokens = principal.requests_per_minute, principal.tokens_per_minute
        if most is None and most_tokens is None:
            return b""
        account = self._accounts.get(principal.name) or self._open(principal.name, now)
        lines = b""
        if most is not None:
            requests = account.requests
            left = most - requests.total(now)
            lines = _REQUEST_LINES % (most, max(0, left), ceil(requests.empty_in(now)))
        if most_tokens is not None:
            tokens = account.tokens
            left = most_tokens - tokens.total(now)
            lines += _TOKEN_LINES % (most_tokens, max(0, left), ceil(tokens.empty_in(now)))
        return lines

    def parallel(self, name: str) -> int:
        """Requests of the key ``name`` that are queued or running."""
        account = self._accounts.get(name)
        return 0 if account is None else account.parallel

    def enqueued(self, name: str) -> int:
        """Estimated tokens of its queued and running batch requests, as far as they are limited."""
        account = self._accounts.get(name)
        return 0 if account is None else account.enqueued

    def _open(self, name: str, now: float) -> Account:
        """The account of a key that is new here. Where keys come and go, those that say nothing any more go too, each
        time there are twice as many as were needed."""
        accounts = self._accounts
        if len(accounts) >= self._most:
            self._accounts = accounts = {key: one for key, one in accounts.items() if not one.is_blank(now)}
            self._most = max(MANY_ACCOUNTS, 2 * len(accounts))
        account = accounts[name] = Account()
        return account


def _share(window: Moments | Window, limit: int, now: float) -> Share:
    left = limit - window.total(now)
    return Share(limit, max(0, left), window.empty_in(now))


def _too_many_requests(account: Account, limit: int, now: float) -> TooManyRequests:
    wait = account.requests.less_in(account.requests.total(now) + 1 - limit, now) if limit else WINDOW_S
    return TooManyRequests(
        f"Limit of this key: {_requests(limit)} a minute, and as many came in the last one. Send more slowly",
        retry_after=wait,
    )


def _check_tokens(account: Account, limit: int, tokens: int, now: float) -> None:
    if tokens > limit:
        raise BadRequest(
            f"This request may take about {tokens} tokens (prompt and answer), and this key has {limit} a minute: "
            "it can never run. Shorten it or lower its max_tokens"
        )
    used = account.tokens.total(now)
    if used + tokens > limit:
        raise TooManyRequests(
            f"Limit of this key: {limit} tokens a minute. {used} are used or reserved, and this request may take "
            f"about {tokens} more. Send it later, or lower its max_tokens",
            retry_after=account.tokens.less_in(used + tokens - limit, now),
        )


def _check_enqueued(account: Account, limit: int, tokens: int) -> None:
    if tokens > limit:
        raise BadRequest(
            f"This batch request may take about {tokens} tokens (prompt and answer), and this key may have {limit} "
            "of batch under way: it can never run. Shorten it or lower its max_tokens"
        )
    under_way = account.enqueued
    if under_way + tokens > limit:
        raise TooManyRequests(
            f"Limit of this key: {limit} tokens of queued and running batch requests. {under_way} are under way, "
            f"and this request may take about {tokens} more. Send it when some have ended",
            retry_after=DEFAULT_RETRY_S,
        )


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"
