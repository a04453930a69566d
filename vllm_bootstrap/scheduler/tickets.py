"""What is said to the scheduler and what it says: targets, tickets, grants, rejections. PURE."""

from __future__ import annotations

from typing import NamedTuple

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
    at most all of a launch. ``principal`` None: no limits, all models."""

    owner: str
    cls: RequestClass = "realtime"
    sequences: int = 1
    prompt_tokens: int = 0
    principal: Principal | None = None


class Grant(NamedTuple):
    request: int
    instance: Instance
    waited_s: float


class Reject(NamedTuple):
    request: int
    error: ApiError


Effect = Grant | Reject
