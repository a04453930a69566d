"""Bodies of the public API that tell of inference requests, under way and finished. PURE.

Same invariant as ``wire``, of which this is a part: nothing but ``api/``, client and command line imports it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_bootstrap.wire import Answer, Listing

RequestClass = Literal["realtime", "batch"]


class RequestEntry(BaseModel):
    """A request under way. ``owner`` is the name of its key; ``launch_id`` null until it has a place; ``tokens`` what
    its answer has brought so far, roughly, 0 where the answer comes whole."""

    model_config = ConfigDict(populate_by_name=True, protected_namespaces=())

    id: str
    request_class: RequestClass | None = Field(None, alias="class")
    owner: str
    model: str | None = None
    launch_id: str | None = None
    state: Literal["reading", "queued", "running"]
    method: str
    path: str
    age_s: float
    queue_ms: int
    sequences: int
    tokens: int
    stream: bool


class CancelResult(Answer):
    """``state`` is what the request was at when it was ended."""

    id: str
    state: Literal["reading", "queued", "running"]
    cancelled: Literal[True] = True


class ActivityEntry(BaseModel):
    """A finished request. ``status`` is what its client saw (499: it went away first), ``code`` our error's, if it was
    ours. ``ttft_ms``: from arrival to the first byte of a stream, waiting included. Tokens are the engine's count."""

    model_config = ConfigDict(populate_by_name=True, protected_namespaces=())

    id: str
    request_id: str
    started_at: datetime
    request_class: RequestClass | None = Field(None, alias="class")
    owner: str
    model: str | None = None
    launch_id: str | None = None
    method: str
    path: str
    status: int
    code: str | None = None
    stream: bool
    queue_ms: int
    ttft_ms: float | None = None
    duration_ms: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    bytes_in: int
    bytes_out: int


class UsageEntry(BaseModel):
    """Sums of one key, class and model over the requests that the history holds."""

    model_config = ConfigDict(populate_by_name=True, protected_namespaces=())

    owner: str
    request_class: RequestClass | None = Field(None, alias="class")
    model: str | None = None
    requests: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    first_at: datetime
    last_at: datetime


class UsageListing(Listing[UsageEntry]):
    """``complete_since``: requests that ended before this are not in the history any more; null: it is empty."""

    complete_since: datetime | None = None
