"""Values that describe an engine's process tree from outside. PURE.

Invariant: a pid is never trusted alone, only with its start time (clock ticks, field 22 of ``/proc/PID/stat``) and
the boot id under which both were read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class ShimHandle:
    """Everything needed to find a shim again after the daemon was restarted. Stored before the engine starts."""

    launch_id: str
    attempt: int
    identity: ProcessIdentity
    run_dir: str
    protocol: int


@dataclass(frozen=True, slots=True)
class StartOrder:
    """What a shim is told with "go". Travels over its control socket, never over argv or disk.

    Sizes in bytes. ``gpu_locks`` are lock-file names (GPU UUIDs) taken in ``lock_dir`` before the engine starts;
    ``lock_owner`` identifies the daemon's state directory, so that launches of one daemon may share a GPU when
    ``shared`` says so. ``secrets`` are masked in the log at equal length. ``uid``/``gid`` None: stay as we are.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    cwd: str
    log_dir: str
    log_segment_bytes: int
    log_max_bytes: int
    tmp_dir: str
    secrets: tuple[str, ...] = field(default=(), repr=False)
    lock_dir: str = ""
    gpu_locks: tuple[str, ...] = ()
    lock_owner: str = ""
    shared: bool = False
    uid: int | None = None
    gid: int | None = None


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How an attempt ended. Written and fsynced by the shim once the whole tree is seen dead.

    ``exit_code``/``signal`` are the main process's; both None when it never started (``error`` says why).
    ``forced``: SIGKILL was needed for any member of the tree. ``ended_at``: unix seconds.
    """

    exit_code: int | None
    signal: int | None
    forced: bool
    stop_requested: bool
    ended_at: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LaunchOrder:
    """A launch request after the API has parsed it: plain values, nothing decided yet.

    ``fields`` are the typed engine fields that were given. ``gpu_ids`` are indices or UUIDs. ``replicas`` other than 1
    asks for a group. ``aliases``, ``adapters``, ``max_parallel``, ``sleep`` and ``folder``: see
    ``engines.base.LaunchSpec``.
    """

    model: str
    engine: str | None = None
    served_model_name: str | None = None
    gpu_ids: tuple[int | str, ...] | None = None
    gpu_count: int | None = None
    gpu_share: float | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    fields: Mapping[str, object] = field(default_factory=dict)
    extra_args: Mapping[str, object] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    restart_policy: str = "never"
    restart_max_attempts: int | None = None
    restart_backoff_s: float | None = None
    replicas: int | Literal["per_gpu"] = 1
    aliases: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    max_parallel: int | None = None
    sleep: int = 0
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class ClaimView:
    uuid: str
    index: int | None
    name: str | None
    share: float


@dataclass(frozen=True, slots=True)
class ProgressView:
    phase: str | None
    fraction: float | None
    detail: str | None
    elapsed_s: float
    eta_s: float | None
    downloaded_bytes: int | None
    download_total_bytes: int | None


@dataclass(frozen=True, slots=True)
class FailureView:
    failure_class: str
    message: str
    hint: str
    permanent: bool
    exit_code: int | None
    signal: int | None
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LaunchView:
    """A snapshot of one launch for readers. Advice only: decisions are made by the owner task. Times: unix seconds.
    ``group_size``: how many launches its group has, itself included."""

    launch_id: str
    group_id: str
    node_id: str
    owner_id: str
    state: str
    why: str | None
    unresponsive: bool
    model: str
    engine: str
    served_model_name: str
    claims: tuple[ClaimView, ...]
    labels: Mapping[str, str]
    restart_policy: str
    attempt: int
    next_attempt_at: float | None
    pid: int | None
    shim_pid: int | None
    created_at: float
    changed_at: float
    transitions: Mapping[str, float]
    progress: ProgressView | None
    failure: FailureView | None
    capacity: int | None
    group_size: int = 1


@dataclass(frozen=True, slots=True)
class GroupView:
    """A snapshot of replicas that were launched together. ``members`` are oldest first, never none; what the whole is
    said to be follows from them (see ``groups``)."""

    group_id: str
    state: str
    unresponsive: bool
    ready: int
    changed_at: float
    failure: FailureView | None
    members: tuple[LaunchView, ...]


@dataclass(frozen=True, slots=True)
class EventView:
    """One row of the append-only history."""

    seq: int
    launch_id: str
    attempt: int
    at: float
    event: str
    from_state: str | None
    to_state: str
    detail: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class StopOutcome:
    """``launch_id`` is the id that was to be stopped; for a group ``members`` says how each of its launches fared."""

    launch_id: str
    state: str
    forced: bool | None
    unsettled_gpus: tuple[str, ...]
    members: tuple[StopOutcome, ...] = ()
