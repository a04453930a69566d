"""What is said to the scheduler and what it says: targets, tickets, grants, rejections. PURE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.serving import Instance, RequestClass


class ByModel(NamedTuple):
    """Any launch that serves ``name`` and, when given, offers ``route`` (method, path)."""

    name: str
    route: tuple[str, str] | None = None


class ByLaunch(NamedTuple):
    """One launch, or any of a group, by id."""

    id: str


Target = ByModel | ByLaunch


class Ticket(NamedTuple):
    """What the scheduler must know of a request. ``sequences`` is prompts times ``n``; it occupies that many slots,
    at most all of a launch. ``prompt_tokens`` and ``output_tokens`` are estimates for the whole request, reserved
    against token limits until the engine's ``usage`` settles them. ``priority`` -100 to 100, higher first, within one
    key's requests of a class. ``body_bytes`` are held while it waits. ``replayable``: it can be sent again from the
    start, so it may be taken back before its first byte. ``principal`` None: no limits, all models."""

    owner: str
    cls: RequestClass = "realtime"
    sequences: int = 1
    prompt_tokens: int = 0
    principal: Principal | None = None
    output_tokens: int = 0
    priority: int = 0
    body_bytes: int = 0
    replayable: bool = False


class Usage(NamedTuple):
    """Tokens an engine says it has read and made for one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


Ending = Literal["finished", "cut", "unworked"]
"""How a request has left its engine. ``finished``: it was answered, or nobody wants the answer any more. ``cut``: the
engine failed while it worked on it; that costs tokens as well, but does not show how fast requests finish.
``unworked``: the engine did nothing for it, so it costs no tokens."""


@dataclass(slots=True)
class Grant:
    """``waited_s``: all its time in the queue. ``promoted``: a batch request that went ahead for its floor's sake.
    ``model`` is the served model it counts under."""

    request: int
    instance: Instance
    waited_s: float
    promoted: bool
    model: str


class Reject(NamedTuple):
    request: int
    error: ApiError


class Revoke(NamedTuple):
    """Taken back before its first byte: the holder aborts it at the engine and asks again with ``Lease.again``."""

    request: int


Effect = Grant | Reject | Revoke


class Watcher(Protocol):
    """Who counts what happens to requests. ``model`` is the served model one counts under, empty where nothing of that
    name is served (so that strangers cannot invent names). A promoted request is told twice: promoted, then admitted;
    one that comes again after a revocation is admitted again."""

    def admitted(self, ticket: Ticket, grant: Grant) -> None: ...

    def promoted(self, ticket: Ticket, grant: Grant) -> None: ...

    def rejected(self, ticket: Ticket, model: str, error: ApiError) -> None: ...

    def revoked(self, ticket: Ticket, model: str, launch_id: str) -> None: ...
