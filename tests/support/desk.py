"""Admission at a desk: ids and a clock for it, and notes of what it says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.budgets import HandBudget
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.scheduler.admission import Admission
from vllm_bootstrap.scheduler.tickets import ByModel, Ending, Grant, Reject, Revoke, Ticket
from vllm_bootstrap.serving import Advert, Endpoint, EngineRoute, Instance

CHAT = EngineRoute("POST", "/v1/chat/completions", frozenset({"realtime"}), inference=True)
MODEL = ByModel("m")


def launch(
    launch_id: str = "a",
    *,
    slots: int = 2,
    names: tuple[str, ...] = ("m",),
    base: str = "base",
    state: str = "ready",
    routable: bool = True,
    group: str | None = None,
    retry: float | None = None,
) -> Advert:
    group = group or launch_id
    instance = Instance(launch_id, group, "raw", base, names, Endpoint(uds="/x"), slots, (CHAT,))
    return Advert(launch_id, group, base, names, state, instance if routable else None, retry)


class Desk:
    """An admission with ids and a clock, that keeps who was granted what."""

    def __init__(self, *adverts: Advert, max_queued: int = 100, **options: Any) -> None:
        self.budgets: list[HandBudget] = []
        options.setdefault("budget", self.budget)
        self.admission = Admission(max_queued=max_queued, **options)
        self.now = 0.0
        self.ids = itertools.count(1)
        self.granted: dict[int, str] = {}
        self.rejected: dict[int, ApiError] = {}
        self.revoked: list[int] = []
        self.promoted: list[int] = []
        for advert in adverts:
            self.say(advert)

    def budget(self, slots: int) -> HandBudget:
        self.budgets.append(HandBudget(slots))
        return self.budgets[-1]

    def say(self, advert: Advert) -> None:
        self.admission.update(advert, self.now)
        self.take()

    def take(self) -> None:
        for effect in self.admission.take_effects():
            if isinstance(effect, Grant):
                self.granted[effect.request] = effect.instance.launch_id
                self.promoted += [effect.request] if effect.promoted else []
            elif isinstance(effect, Revoke):
                self.revoked.append(effect.request)
            else:
                assert isinstance(effect, Reject)
                self.rejected[effect.request] = effect.error

    def ask(self, target: Any = MODEL, **ticket: Any) -> int:
        request = next(self.ids)
        try:
            grant = self.admission.request(request, target, Ticket(ticket.pop("owner", "me"), **ticket), self.now)
        finally:
            self.take()
        if grant is not None:
            assert grant.request == request
            self.granted[request] = grant.instance.launch_id
        return request

    def refusal(self, target: Any = MODEL, **ticket: Any) -> ApiError:
        with pytest.raises(ApiError) as refused:
            self.ask(target, **ticket)
        return refused.value

    def done(self, request: int, ending: Ending = "finished") -> None:
        del self.granted[request]
        self.admission.done(request, self.now, ending)
        self.take()

    def cancel(self, request: int) -> None:
        self.admission.cancel(request, self.now)
        self.take()

    def expire(self, request: int) -> None:
        self.admission.expire(request, self.now)
        self.take()

    def order(self) -> list[int]:
        return list(self.granted)

    def begin(self, request: int, *, streamed: bool = True) -> None:
        self.admission.began(request, self.now, streamed=streamed)
        self.take()

    def again(self, request: int) -> None:
        """It lets its place go and asks for another."""
        del self.granted[request]
        try:
            grant = self.admission.again(request, self.now)
        finally:
            self.take()
        if grant is not None:
            self.granted[request] = grant.instance.launch_id

    def tick(self, now: float) -> None:
        self.now = now
        self.admission.tick(now)
        self.take()

    def eject(self, launch_id: str) -> Instance | None:
        instance = self.admission.eject(launch_id, self.now)
        self.take()
        return instance

    def readmit(self, launch_id: str) -> None:
        self.admission.readmit(launch_id, self.now)
        self.take()
