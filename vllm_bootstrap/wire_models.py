"""Bodies of the public API for the catalogue: models, fit, weights, page cache, adapters. PURE.

Same invariant as ``wire``, of which this is a part: nothing but ``api/``, client and command line imports it. Sizes are
bytes, durations seconds.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_bootstrap.wire import Answer, Listing, Name, Progress

ModelState = Literal[
    "unloaded", "loading", "loaded", "unresponsive", "falling_asleep", "asleep", "waking", "unloading", "failed"
]
DownloadState = Literal["queued", "running", "completed", "failed", "cancelled"]
PrefetchState = Literal["running", "completed", "failed", "cancelled"]


class NewModel(BaseModel):
    """``POST /models``: one entry, spelled as in the catalogue's file, with its name. All fields of an entry may be
    given (docs/models.md)."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    name: Name
    source: Name = Field(description="A Hugging Face repository, or an absolute path on the daemon's machine")


class CheckWish(BaseModel):
    """``POST /models/{name}/check``: as the entry says, unless something else is said here."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    gpu_count: int | None = Field(None, ge=1, le=64)
    max_model_len: int | None = Field(None, ge=1, le=2**31)


class Answers(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True, protected_namespaces=())


class GpuWish(Answers):
    """``count`` null: as few as the model fits on."""

    count: int | None = None
    ids: list[int | str] | None = None
    min_memory: int | None = None
    share: float | None = None


class AdapterSpec(Answers):
    source: str
    aliases: list[str] = Field(default_factory=list)


class ModelEntry(Answers):
    """A model's entry as it is in force, spelled as in the catalogue's file. ``env`` has names only: values may be
    secrets."""

    source: str
    revision: str | None = None
    aliases: list[str] = Field(default_factory=list)
    engine: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    extra_args: dict[str, Any] = Field(default_factory=dict)
    env: list[str] = Field(default_factory=list)
    gpus: GpuWish = Field(default_factory=GpuWish)
    replicas: int | Literal["per_gpu"] = 1
    restart: str = "on-failure"
    ttl: float | None = None
    pin: bool = False
    preload: bool = False
    priority: int = 0
    max_parallel: int | None = None
    sleep: int = 0
    show_loading: bool = False
    defaults: dict[str, Any] = Field(default_factory=dict)
    strip: list[str] = Field(default_factory=list)
    adapters: dict[str, AdapterSpec] = Field(default_factory=dict)
    description: str | None = None


class ModelLaunch(Answers):
    launch_id: str
    state: str
    in_flight: int


class ModelFailure(Answers):
    """Why the last load failed. ``retry_at`` null: not before the entry changes or somebody asks for a load."""

    failure_class: str = Field(alias="class")
    message: str
    hint: str
    at: datetime
    retry_at: datetime | None = None
    launch_id: str | None = None


class DownloadInfo(Answer):
    """A download of a model's weights. ``commit`` is what ``revision`` stood for when it began."""

    id: str
    model: str
    repo: str
    revision: str
    commit: str | None = None
    owner: str
    state: DownloadState
    bytes_done: int = 0
    bytes_total: int | None = None
    files_done: int = 0
    files_total: int | None = None
    bytes_per_s: float | None = None
    eta_s: float | None = None
    error: str | None = None
    hint: str | None = None
    created_at: datetime
    ended_at: datetime | None = None


class PrefetchInfo(Answer):
    """Reading a model's files ahead, so that they lie in memory when it is loaded. ``seconds`` it has taken so far."""

    model: str
    state: PrefetchState
    bytes_done: int
    bytes_total: int
    seconds: float
    method: str
    error: str | None = None


class ModelStatus(Answer):
    """A model of the catalogue. ``origin``: where its entry comes from (``file``, ``runtime``: ``POST /models``,
    ``setting``: ``MODEL_ID``, ``request``). ``why``: what it waits for, or why it is in its state. ``waiting``:
    requests for it by class; ``batch_lines``: lines of batches that are to be run on it. ``outdated``: its entry was
    changed since it was loaded. ``load_est_s``, ``wake_est_s``: how long that took here before."""

    name: str
    state: ModelState
    origin: Literal["file", "runtime", "setting", "request"]
    why: str | None = None
    entry: ModelEntry
    launches: list[ModelLaunch] = Field(default_factory=list)
    group_id: str | None = None
    progress: Progress | None = None
    failure: ModelFailure | None = None
    load_est_s: float | None = None
    wake_est_s: float | None = None
    waiting: dict[str, int] = Field(default_factory=dict)
    in_flight: int = 0
    batch_lines: int = 0
    idle_s: float | None = None
    loaded_at: datetime | None = None
    outdated: bool = False
    download: DownloadInfo | None = None
    prefetch: PrefetchInfo | None = None


class ModelStatuses(Listing[ModelStatus]):
    """``note``: why the last edit of the catalogue's file is not in force."""

    note: str | None = None


class ModelRemoved(Answer):
    name: str
    deleted: Literal[True] = True


class FitInfo(Answer):
    """Whether a model fits. ``fits`` null: it cannot be told, ``why`` says what is missing. Bytes are for each GPU.
    ``suggestions``: what would fit, as sentences (``message``) with the ``field`` and ``value`` to set."""

    fits: bool | None
    why: str
    weights_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    kv_bytes: int | None = None
    overhead_bytes: int | None = None
    margin_bytes: int | None = None
    budget_bytes: int | None = None
    free_bytes: int | None = None
    gpu_count: int | None = None
    max_model_len: int | None = None
    max_tokens_in_cache: int | None = None
    suggestions: list[dict[str, Any]] = Field(default_factory=list)


class StoredFile(Answers):
    path: str
    bytes: int
    cached_bytes: int | None = None


class ModelFiles(Answer):
    """What of a model lies on the daemon's disk. ``complete`` null: that cannot be told without asking the hub.
    ``cached_bytes``: how much of it is in memory."""

    model: str
    source: str
    path: str | None = None
    commit: str | None = None
    bytes: int
    complete: bool | None = None
    incomplete_bytes: int = 0
    cached_bytes: int | None = None
    files: list[StoredFile] = Field(default_factory=list)


class FilesRemoved(Answer):
    model: str
    bytes: int
    deleted: Literal[True] = True


class AdapterInfo(Answer):
    """A LoRA adapter that was uploaded; requests name it as their model. ``base``: the model whose engine serves it."""

    name: str
    base: str
    owner: str
    bytes: int
    rank: int | None = None
    created_at: datetime


class AdapterRemoved(Answer):
    name: str
    base: str
    deleted: Literal[True] = True
