"""A key's limits against lists of all that ever was accepted: exact in every sixty seconds, and honest about when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import BadRequest, ConcurrencyLimit, TooManyRequests
from vllm_bootstrap.scheduler.limits import Charge, KeyLimits
from vllm_bootstrap.scheduler.pace import DEFAULT_RETRY_S
from vllm_bootstrap.scheduler.tickets import Ticket
from vllm_bootstrap.scheduler.window import WINDOW_S, Window
from vllm_bootstrap.serving import RequestClass

SCOPES = frozenset({"realtime", "batch"})
limit = st.none() | st.integers(0, 4)
budget = st.none() | st.integers(0, 40)
# Halves are exact, and a pause may end on the very moment at which something leaves the window.
pauses = st.integers(0, 130).map(lambda halves: halves / 2)


class Amount(NamedTuple):
    at: float
    tokens: int


@dataclass(eq=False)
class Running:
    ticket: Ticket
    charge: Charge | None
    at: float
    beyond: int = 0

    @property
    def tokens(self) -> int:
        return self.ticket.prompt_tokens + self.ticket.output_tokens


class LimitsMachine(RuleBasedStateMachine):
    @initialize(parallel=limit, requests=limit, tokens=budget, enqueued=budget)
    def one_key(self, parallel: int | None, requests: int | None, tokens: int | None, enqueued: int | None) -> None:
        self.key = Principal(
            "key", SCOPES, max_parallel=parallel, requests_per_minute=requests, tokens_per_minute=tokens,
            max_enqueued_tokens=enqueued,
        )  # fmt: skip
        self.limits = KeyLimits()
        self.now = 100.0
        self.accepted: list[float] = []
        self.reserved: dict[Running, Amount] = {}
        self.settled: list[Amount] = []
        self.running: list[Running] = []

    # The simple model

    def requests_at(self, now: float) -> int:
        return sum(now - WINDOW_S < at <= now for at in self.accepted)

    def tokens_at(self, now: float) -> int:
        everything = [*self.reserved.values(), *self.settled]
        return sum(amount.tokens for amount in everything if amount.at > now - WINDOW_S)

    def enqueued(self) -> int:
        return sum(one.tokens for one in self.running if one.ticket.cls == "batch")

    def too_many_requests(self, now: float) -> bool:
        most = self.key.requests_per_minute
        return most is not None and self.requests_at(now) + 1 > most

    def too_many_tokens(self, tokens: int, now: float) -> bool:
        most = self.key.tokens_per_minute
        return most is not None and self.tokens_at(now) + tokens > most

    def too_much_enqueued(self, ticket: Ticket, tokens: int) -> bool:
        most = self.key.max_enqueued_tokens
        return most is not None and ticket.cls == "batch" and self.enqueued() + tokens > most

    # What may happen

    @rule(passed=pauses)
    def time_passes(self, passed: float) -> None:
        self.now += passed

    @rule(cls=st.sampled_from(("realtime", "batch")), prompt=st.integers(0, 15), output=st.integers(0, 15))
    def one_comes(self, cls: RequestClass, prompt: int, output: int) -> None:
        ticket, tokens = Ticket("key", cls, 1, prompt, self.key, output), prompt + output
        most_parallel = self.key.max_parallel
        try:
            self.limits.check(self.key, ticket, self.now)
        except ConcurrencyLimit:
            assert most_parallel is not None
            assert len(self.running) >= most_parallel
        except BadRequest:
            most = [self.key.tokens_per_minute, self.key.max_enqueued_tokens if cls == "batch" else None]
            assert any(one is not None and tokens > one for one in most)
        except TooManyRequests as refused:
            self.is_honest(refused, ticket, tokens)
        else:
            assert most_parallel is None or len(self.running) < most_parallel
            assert not self.too_many_requests(self.now)
            assert not self.too_many_tokens(tokens, self.now)
            assert not self.too_much_enqueued(ticket, tokens)
            self.enter(ticket, tokens)

    def is_honest(self, refused: TooManyRequests, ticket: Ticket, tokens: int) -> None:
        """It says when there will be room if nothing else happens, to the second, and no later than that."""
        wait = refused.retry_after
        assert wait is not None
        before = self.now + max(0, wait - 1.5)
        if self.too_many_requests(self.now):
            assert self.too_many_requests(before)
            assert not self.too_many_requests(self.now + wait) or self.key.requests_per_minute == 0
        elif self.too_many_tokens(tokens, self.now):
            assert self.too_many_tokens(tokens, before)
            assert not self.too_many_tokens(tokens, self.now + wait)
        else:
            assert self.too_much_enqueued(ticket, tokens)
            assert wait == DEFAULT_RETRY_S

    def enter(self, ticket: Ticket, tokens: int) -> None:
        charge = self.limits.enter(self.key, ticket, self.now)
        one = Running(ticket, charge, self.now)
        self.running.append(one)
        self.accepted.append(self.now)
        self.reserved[one] = Amount(self.now, tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), used=st.integers(0, 40))
    def the_engine_tells(self, data: st.DataObject, used: int) -> None:
        one = data.draw(st.sampled_from(self.running))
        if one.charge is None:
            return
        self.limits.settle(one.charge, used, self.now)
        if self.key.tokens_per_minute is not None:
            self.reserved[one] = Amount(one.at, min(used, one.tokens))
            beyond = max(0, used - one.tokens - one.beyond)
            one.beyond += beyond
            self.settled.append(Amount(self.now, beyond))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), worked=st.booleans())
    def one_ends(self, data: st.DataObject, worked: bool) -> None:
        one = data.draw(st.sampled_from(self.running))
        self.running.remove(one)
        self.limits.leave("key", one.charge, self.now, worked=worked)
        if not worked:
            self.reserved[one] = Amount(one.at, 0)

    # What always holds

    @invariant()
    def what_is_left_is_told_exactly(self) -> None:
        state = self.limits.rate(self.key, self.now)
        for what, most, used in (
            ("requests", self.key.requests_per_minute, self.requests_at(self.now)),
            ("tokens", self.key.tokens_per_minute, self.tokens_at(self.now)),
        ):
            share = None if state is None else getattr(state, what)
            told = None if share is None else (share.limit, share.remaining)
            assert told == (None if most is None else (most, max(0, most - used)))

    @invariant()
    def what_is_under_way_is_counted(self) -> None:
        assert self.limits.parallel("key") == len(self.running)
        expected = self.enqueued() if self.key.max_enqueued_tokens is not None else 0
        assert self.limits.enqueued("key") == expected

    @invariant()
    def no_sixty_seconds_hold_more_requests_than_the_limit(self) -> None:
        most = self.key.requests_per_minute
        if most is not None:
            assert all(self.requests_at(at) <= most for at in self.accepted)

    def teardown(self) -> None:
        """When all is over nothing is left of it, but for what the minute still remembers."""
        for one in getattr(self, "running", ()):
            self.limits.leave("key", one.charge, self.now, worked=True)
        if hasattr(self, "limits"):
            assert (self.limits.parallel("key"), self.limits.enqueued("key")) == (0, 0)
            state = self.limits.rate(self.key, self.now + WINDOW_S)
            for share in state or ():
                assert share is None or (share.remaining, share.reset_s) == (share.limit, 0.0)


LimitsMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLimits = LimitsMachine.TestCase


@given(st.lists(st.tuples(pauses, st.integers(0, 9)), min_size=1, max_size=20), pauses, st.integers(1, 60))
def test_a_window_tells_when_there_will_be_so_much_less(
    steps: list[tuple[float, int]], passed: float, amount: int
) -> None:
    window, now = Window(), 0.0
    added: list[Amount] = []
    for pause, size in steps:
        now += pause
        window.add(size, now)
        added.append(Amount(now, size))
    now += passed

    def held(at: float) -> int:
        return sum(one.tokens for one in added if one.at > at - WINDOW_S)

    wait, empty = window.less_in(amount, now), window.empty_in(now)
    assert window.total(now) == held(now)
    assert held(now + empty) == 0
    assert wait == WINDOW_S if amount > held(now) else held(now + wait) <= held(now) - amount
    if amount <= held(now):
        assert held(now + wait - 0.25) > held(now) - amount
