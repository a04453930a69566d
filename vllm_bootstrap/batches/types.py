"""Values that the parts of batches hand to each other. PURE.

Times are unix seconds, sizes bytes. ``owner`` is always the name of a key, never its token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_bootstrap.batches.jobs import Phase

ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/score",
    "/v1/rerank",
)
"""What lines may ask for: routes whose answer comes whole and stands for itself."""

LOWEST_PRIORITY, HIGHEST_PRIORITY = -100, 100


@dataclass(frozen=True, slots=True)
class FileRow:
    """A stored file. ``status``: ``processed`` (nothing is done to a file between its upload and its use)."""

    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    created_at: float
    expires_at: float | None
    status: str = "processed"


class LineError(NamedTuple):
    """Why a line (or, with ``line`` None, the whole input) was refused. ``line`` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class TokenUsage(NamedTuple):
    """Sums of what engines said."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0

    def plus(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(*(mine + its for mine, its in zip(self, other, strict=True)))


class Counts(NamedTuple):
    """Lines of a batch; what is neither completed nor failed has no record yet."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def left(self) -> int:
        return self.total - self.completed - self.failed


NO_USAGE, NO_COUNTS = TokenUsage(), Counts()


class Line(NamedTuple):
    """A line that waits to be run. ``number`` counts from 1; ``model_no`` and ``pos`` say where it stands in the order
    of work; ``body`` is the request's body as it was sent in. ``attempts`` and ``deaths`` count what was tried before:
    all, and those that ended with the engine's end."""

    number: int
    model_no: int
    pos: int
    custom_id: str
    body: bytes
    attempts: int = 0
    deaths: int = 0


class Record(NamedTuple):
    """What became of a line: ``data`` is its line of the output file (``ok``) or of the error file, without the line
    feed. ``attempts`` includes the one it came from."""

    number: int
    ok: bool
    attempts: int
    data: bytes
    usage: TokenUsage = NO_USAGE


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where to tell of a batch's end, signed with ``secret``."""

    url: str
    secret: str


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What a caller asks for, checked as far as that goes without looking at the input. ``window_s``: how long it may
    take. ``launch_id``: all lines go to that launch (or group of replicas), whatever model they name."""

    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    window_s: float
    metadata: Mapping[str, str] | None = None
    priority: int = 0
    launch_id: str | None = None
    webhook: Webhook | None = None
    output_expires_after_s: float | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch as it is stored. ``stamps``: state name to the time it was last entered. ``models``: name to number of
    lines, known once the input was accepted. ``counts`` and ``usage`` are those of the last change of state; of a batch
    that runs, its line store knows better."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    phase: Phase
    paused: bool = False
    priority: int = 0
    launch_id: str | None = None
    metadata: Mapping[str, str] | None = None
    webhook: Webhook | None = None
    output_expires_after_s: float | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    counts: Counts = NO_COUNTS
    usage: TokenUsage = NO_USAGE
    errors: Sequence[LineError] = ()
    models: Mapping[str, int] = field(default_factory=dict)
    stamps: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is. ``validated_bytes`` of ``input_bytes`` while validating. ``lines_per_s`` over the last
    minute or so, ``eta_s`` None where it cannot be told. ``waits_for``: in words, why nothing runs at the moment, None
    where something does or nothing is left. ``retried``: lines that were tried more than once, so far."""

    in_flight: int = 0
    lines_per_s: float | None = None
    eta_s: float | None = None
    waits_for: str | None = None
    retried: int = 0
    validated_bytes: int | None = None
    input_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class BatchView:
    """A batch for those who ask: what is stored, with the counts of this moment."""

    row: BatchRow
    progress: Progress


@dataclass(frozen=True, slots=True)
class NewItem:
    """A single request to be carried out durably. ``path`` is one of ``ENDPOINTS``, ``body`` what the engine gets."""

    owner: str
    path: str
    body: Mapping[str, Any]
    model: str | None
    launch_id: str | None = None
    priority: int = 0
    expires_after_s: float | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class ItemView:
    """A single item. ``state``: queued, in_progress, completed, failed, cancelled or expired. ``response`` is its
    record's ``response``, ``error`` its ``error``, as an output line has them; both None until it has ended."""

    id: str
    owner: str
    path: str
    model: str | None
    launch_id: str | None
    priority: int
    state: str
    attempts: int
    created_at: float
    expires_at: float
    ended_at: float | None = None
    response: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    waits_for: str | None = None


@dataclass(frozen=True, slots=True)
class BatchEvent:
    """One entry of a batch's history."""

    seq: int
    batch_id: str
    at: float
    event: str
    from_state: str | None
    to_state: str
    detail: Mapping[str, Any]
