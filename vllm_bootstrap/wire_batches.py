"""Bodies of the public API for files, batches and single items, as OpenAI's SDK reads them, and what we add. PURE.

Same invariant as ``wire``, of which this is a part: nothing but ``api/``, client and command line imports it. Times are
whole unix seconds here, as everywhere on ``/v1``. What OpenAI's API does not have lies in ``progress`` and in fields
of ours with defaults, which its SDK passes through.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from vllm_bootstrap.batches.types import HIGHEST_PRIORITY, LOWEST_PRIORITY
from vllm_bootstrap.batches.windows import MAX_WINDOW_S

T = TypeVar("T")

BatchState = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ItemState = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
Priority = Annotated[int, Field(strict=True, ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class Strict(BaseModel):
    """A body that clients send: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class FileObject(BaseModel):
    """A stored file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Page(BaseModel, Generic[T]):
    """A list as OpenAI's ``/v1`` has it."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class WebhookWish(Strict):
    """Tell this address when the batch has ended. ``secret`` signs what is sent; without one, the daemon's does."""

    url: str = Field(max_length=2048)
    secret: str | None = Field(None, min_length=16, max_length=256)


class ExpiresAfter(Strict):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class BatchRequest(Strict):
    """``POST /v1/batches``. ``priority`` and ``webhook`` are ours; a ``launch_id`` may be named in ``metadata``."""

    input_file_id: str = Field(min_length=1, max_length=128)
    endpoint: str = Field(max_length=128)
    completion_window: str = Field(max_length=16)
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None
    priority: Priority = 0
    webhook: WebhookWish | None = None


class PriorityChange(Strict):
    priority: Priority


class BatchErrorEntry(BaseModel):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchErrorEntry]


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class InputTokensDetails(BaseModel):
    cached_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class BatchUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchProgress(BaseModel):
    """Ours: how far a batch is, and why it stands still where it does."""

    percent: float
    in_flight: int
    lines_per_s: float | None = None
    eta_s: float | None = None
    waits_for: str | None = None
    retried: int = 0
    validated_bytes: int | None = None
    input_bytes: int | None = None


class BatchObject(BaseModel):
    """A batch. ``owner``, ``priority``, ``paused``, ``models`` and ``progress`` are ours."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: BatchState
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    usage: BatchUsage | None = None
    metadata: dict[str, str] | None = None
    owner: str
    priority: int
    paused: bool
    models: dict[str, int] = Field(default_factory=dict)
    progress: BatchProgress


class BatchEventEntry(BaseModel):
    """One entry of a batch's history; ``from_status`` null for the first."""

    seq: int
    at: float
    event: str
    from_status: str | None = None
    to_status: str
    detail: dict[str, Any] = Field(default_factory=dict)


class BatchDeleted(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    deleted: Literal[True] = True


class ItemRequest(BaseModel):
    """``POST /v1/batch/completions``. Either ``model`` or ``launch_id``, either ``prompt`` (for ``/v1/completions``) or
    ``messages`` (for ``/v1/chat/completions``). ``launch_id``, ``priority`` and ``expires_after_s`` are ours; all other
    fields are the engine's and go to it as they are, ``max_tokens`` among them."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: ModelName | None = None
    launch_id: str | None = Field(None, min_length=1, max_length=64)
    prompt: str | list[Any] | None = None
    messages: list[Any] | None = Field(None, min_length=1)
    stream: bool | None = None
    priority: Priority = 0
    expires_after_s: float | None = Field(None, ge=1, le=MAX_WINDOW_S)


class ItemObject(BaseModel):
    """A single request that is carried out durably. ``response`` and ``error`` are what an output line has."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["batch.item"] = "batch.item"
    endpoint: str
    model: str | None = None
    launch_id: str | None = None
    status: ItemState
    priority: int
    attempts: int
    created_at: int
    expires_at: int
    ended_at: int | None = None
    waits_for: str | None = None
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
