"""Values that the parts of the catalogue hand to each other. PURE.

A *model* is a name that requests use; a *launch* is one engine that runs. Times are unix seconds, durations seconds,
sizes bytes, shares parts of one GPU from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vllm_bootstrap.refused import REFUSED

OnDemand = Literal["catalogue", "any", "off"]
Origin = Literal["file", "runtime", "setting", "request"]
"""Where an entry comes from: the catalogue's file, ``POST /models``, ``MODEL_ID``, or a request's model name."""

ModelState = Literal[
    "unloaded", "loading", "loaded", "unresponsive", "falling_asleep", "asleep", "waking", "unloading", "failed"
]
"""``failed``: the last load failed and the next one waits for its back-off, or for a change of the entry."""


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """``count`` None: as few as the model fits on where that can be told, else one. ``ids`` are indices or UUIDs.
    ``min_memory`` is what each GPU must have in all."""

    count: int | None = None
    ids: tuple[int | str, ...] | None = None
    min_memory: int | None = None
    share: float | None = None


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """A LoRA adapter, served as a model of its own by the engine of its base. ``source`` is a repository or a path."""

    name: str
    source: str
    aliases: tuple[str, ...] = ()


NEVER_REWRITTEN = frozenset({"model", "stream", "priority"}) | frozenset(REFUSED)
"""Members that a ``Rewrite`` may neither set nor take out: routing, framing and scheduling have decided by them, or no
client may set them. ``refused.refuse_fields`` must let its ``defaults`` pass, too."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What is done to the top level of a JSON body before the engine gets it: ``strip`` taken out, then ``defaults``
    where there is nothing (null is something). A name in both is always set to the default."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    strip: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of the catalogue, checked. ``source`` is a Hugging Face repository or an absolute path. ``args`` are
    typed engine fields as in a launch. ``ttl_s`` 0: never unloaded for being idle; None: the daemon's default.
    ``sleep``: the level that is used instead of unloading where the engine can, 0 for none. ``max_parallel``: so many
    sequences run at once on each engine, None for all its slots."""

    name: str
    source: str
    origin: Origin = "file"
    revision: str | None = None
    aliases: tuple[str, ...] = ()
    engine: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    gpus: GpuNeed = GpuNeed()
    replicas: int | Literal["per_gpu"] = 1
    restart: str = "on-failure"
    ttl_s: float | None = None
    pin: bool = False
    preload: bool = False
    priority: int = 0
    max_parallel: int | None = None
    sleep: Literal[0, 1, 2] = 0
    show_loading: bool = False
    rewrite: Rewrite = Rewrite()
    adapters: tuple[AdapterEntry, ...] = ()
    description: str | None = None

    @property
    def served_names(self) -> tuple[str, ...]:
        """All names its engine answers to: its own first, then aliases, adapters and their aliases."""
        names = [self.name, *self.aliases]
        for adapter in self.adapters:
            names += [adapter.name, *adapter.aliases]
        return tuple(names)


class Fetched(NamedTuple):
    """What was downloaded of a repository: its commit, and the folder with all that an engine needs of it, None where
    something may be missing."""

    commit: str
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """``together`` False: at most one of its members is loaded at a time. ``exclusive``: while one of them is loaded,
    nothing outside of the group is (and the other way round). Pinned models are exempt from neither."""

    name: str
    members: frozenset[str]
    together: bool = True
    exclusive: bool = False


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What may be loaded, as one consistent value. ``entries`` by name."""

    entries: Mapping[str, ModelEntry] = field(default_factory=dict)
    groups: Sequence[Group] = ()


class ModelLaunch(NamedTuple):
    """One engine of a model, for readers."""

    launch_id: str
    state: str
    in_flight: int


@dataclass(frozen=True, slots=True)
class ModelProgress:
    """How far a load is. ``eta_s`` None: nothing is known of earlier ones."""

    phase: str | None
    fraction: float | None
    elapsed_s: float
    eta_s: float | None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class ModelTrouble:
    """Why the last load failed, in the vocabulary of launches. ``retry_at`` None: not before the entry changes or
    somebody asks for a load explicitly (the failure is permanent)."""

    failure_class: str
    message: str
    hint: str
    at: float
    retry_at: float | None
    launch_id: str | None = None


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model as readers see it. ``why`` is one sentence about what it waits for or why it is in its state.
    ``load_est_s`` and ``wake_est_s`` come from its own history on this machine's GPUs. ``waiting``: requests by class,
    ``batch_lines``: lines of batches that are to be run on it. ``outdated``: its entry was changed after it was loaded
    (the change holds from the next load, which comes as soon as it is idle)."""

    entry: ModelEntry
    state: ModelState
    why: str | None = None
    launches: Sequence[ModelLaunch] = ()
    group_id: str | None = None
    progress: ModelProgress | None = None
    trouble: ModelTrouble | None = None
    load_est_s: float | None = None
    wake_est_s: float | None = None
    waiting: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 0
    batch_lines: int = 0
    idle_s: float | None = None
    loaded_at: float | None = None
    outdated: bool = False


# Fit


@dataclass(frozen=True, slots=True)
class FitReport:
    """Whether a model fits. ``fits`` None: cannot be told, or too close; ``why`` says so. Bytes are per GPU.
    ``kv_bytes`` is what one request of ``max_model_len`` tokens takes in the cache, ``margin_bytes`` by how much the
    whole may be too high. ``suggestions`` are sentences; the typed ones name a field and a value that would fit."""

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
    suggestions: Sequence[Mapping[str, Any]] = ()


# Weights

DownloadState = Literal["queued", "running", "completed", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class DownloadView:
    """One download of a repository. ``commit`` is the pinned revision once it is known. ``rate`` in bytes a second."""

    id: str
    model: str
    repo: str
    revision: str
    owner: str
    state: DownloadState
    commit: str | None = None
    bytes_total: int | None = None
    bytes_done: int = 0
    files_total: int | None = None
    files_done: int = 0
    rate: float | None = None
    eta_s: float | None = None
    error: str | None = None
    hint: str | None = None
    created_at: float = 0.0
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class DiskFile:
    path: str
    bytes: int
    cached_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class OnDisk:
    """What of a model lies on this machine. ``complete`` None: cannot be told without the hub. ``cached_bytes``: how
    much of it is in the page cache."""

    source: str
    path: str | None
    commit: str | None
    bytes: int
    complete: bool | None
    files: Sequence[DiskFile] = ()
    incomplete_bytes: int = 0
    cached_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PrefetchView:
    """Warming the page cache with a model's files."""

    model: str
    state: Literal["running", "completed", "failed", "cancelled"]
    bytes_total: int
    bytes_done: int
    seconds: float
    method: Literal["readahead", "vmtouch"] = "readahead"
    error: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterView:
    """A LoRA adapter that was uploaded. ``base`` is the model whose engine serves it, ``rank`` the one it says."""

    name: str
    base: str
    owner: str
    bytes: int
    rank: int | None
    path: str
    created_at: float
