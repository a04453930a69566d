"""The requests that are under way: who they are, and a way to end one from outside. PURE.

Invariant: whoever entered leaves exactly once, and no two requests have the same id at the same time (engines mix up
requests of equal ids, so the id here is also the one an engine is told). Knows nothing of sockets, queues or clocks:
each traveller tells about itself when asked.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple, Protocol

from vllm_bootstrap.serving import RequestClass

State = Literal["reading", "queued", "running"]


class RequestInfo(NamedTuple):
    """One request right now. ``id`` is unique among all that are under way. ``owner`` is the key's name, ``model`` the
    name the client asked for (None as long as its body is not read, or when it named none), ``launch_id`` None until
    it has a place. ``age_s`` since its head arrived; ``queue_ms`` it has waited so far or did wait. ``tokens`` that an
    answer has brought so far, roughly (events of a stream; the engine's own count comes at the end), 0 for answers
    that come whole. ``cls`` None: not classed yet, or a request that needs no slot."""

    id: str
    cls: RequestClass | None
    owner: str
    model: str | None
    launch_id: str | None
    state: State
    method: str
    path: str
    age_s: float
    queue_ms: int
    sequences: int
    tokens: int
    stream: bool


class Traveller(Protocol):
    """A request under way, whoever carries it."""

    def info(self) -> RequestInfo:
        """What is known of it now. Cheap, does not raise."""

    def cancel(self) -> None:
        """End it now, honestly: whoever waits for the answer gets an error, the engine's connection is closed and the
        place is free. It leaves the registry before this returns. Idempotent."""

    def rights_changed(self) -> None:
        """Keys were changed: end if the key that asked may not go on."""


class Inflight:
    """Everything that is under way, in the order of arrival. Not thread-safe: belongs to the event loop."""

    __slots__ = ("_numbers", "_travellers")

    def __init__(self) -> None:
        self._travellers: dict[str, Traveller] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._travellers)

    def add(self, id: str, traveller: Traveller) -> str:  # noqa: A002 - what callers call it
        """Enter ``traveller``. Returns the id it goes by: the given one, or that with a suffix while another request
        has it. Give it back with ``remove``."""
        unique = id
        while unique in self._travellers:
            unique = f"{id}-{next(self._numbers):x}"
        self._travellers[unique] = traveller
        return unique

    def remove(self, id: str) -> None:  # noqa: A002
        """It is over. Idempotent."""
        self._travellers.pop(id, None)

    def get(self, id: str) -> RequestInfo | None:  # noqa: A002
        """What is known of one request, None when it is not (or no longer) under way."""
        traveller = self._travellers.get(id)
        return None if traveller is None else traveller.info()

    def list(self) -> list[RequestInfo]:
        """All that is under way, oldest first."""
        return [traveller.info() for traveller in self._travellers.values()]

    def cancel(self, id: str) -> bool:  # noqa: A002
        """End a request from outside. False: there is none of that id."""
        traveller = self._travellers.get(id)
        if traveller is None:
            return False
        traveller.cancel()
        return True

    def rights_changed(self) -> None:
        """Keys were changed: let everybody look whether they may go on."""
        for traveller in tuple(self._travellers.values()):
            traveller.rights_changed()
