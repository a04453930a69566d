"""What an engine is: the interface every kind of engine implements, and the values it exchanges. PURE.

An engine turns a wish (``LaunchSpec``) and a place (``Placement``) into a command line and an environment, knows how
to tell whether the engine is ready, which routes it has, what its log lines and its death mean. It never starts,
signals or watches a process, never touches the database and knows nothing of launches' states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from vllm_bootstrap.serving import Endpoint, EngineRoute


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """A launch as asked for, validated and normalised. ``fields`` holds the typed engine fields that were given.

    ``aliases`` are further names of the model. ``adapters``: served name to the LoRA adapter (repository or path) that
    is served under it. ``max_parallel``: so many sequences run at once though the engine has more slots. ``sleep``: the
    level at which the engine is to sleep when it is not needed, 0 for never; it is started so that it can. ``folder``:
    where all files of ``model`` lie on this machine; an engine that is given it needs no hub for them.
    """

    model: str
    engine: str
    served_model_name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    max_parallel: int | None = None
    sleep: int = 0
    folder: str | None = None

    @property
    def served_names(self) -> tuple[str, ...]:
        """All names the engine answers to, the main one first."""
        return (self.served_model_name, *self.aliases, *self.adapters)

    def slots(self, of_engine: int) -> int:
        """Sequences that may run at once on an engine that has ``of_engine`` slots."""
        return of_engine if self.max_parallel is None else min(of_engine, self.max_parallel)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device as engines see it. ``index`` is NVML's (PCI order); ``capability`` the CUDA compute capability."""

    uuid: str
    index: int
    name: str
    total_bytes: int
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a launch runs. ``kind``: ``cuda``, ``mock``, ``cpu``, or ``none`` (an external engine claims nothing).
    ``share_milli`` is the claimed part of each GPU in thousandths."""

    kind: str
    gpus: tuple[Gpu, ...] = ()
    share_milli: int = 1000
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What the daemon gives an engine to live in. Directories are private to the attempt and exist already.

    ``uds_path`` is offered always; an engine that cannot listen there uses ``host``/``port``, which are set when
    ``Engine.needs_port`` said so. ``base_env`` is the allow-listed environment. ``secrets`` are masked in logs.
    """

    launch_id: str
    attempt: int
    run_dir: str
    tmp_dir: str
    uds_path: str
    internal_key: str
    port: int | None = None
    host: str = "127.0.0.1"
    base_env: Mapping[str, str] = field(default_factory=dict)
    hf_token: str | None = None


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """What is to be executed and where it will listen. ``argv`` is None for an engine without a process of ours."""

    argv: tuple[str, ...] | None
    env: Mapping[str, str]
    endpoint: Endpoint
    secrets: tuple[str, ...] = ()
    cwd: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Best-effort reading of a start-up log: a phase name and, where the engine says so, a fraction of it."""

    phase: str
    fraction: float | None = None
    detail: str | None = None


class FailureClass(StrEnum):
    """Why a launch failed. Values are API vocabulary."""

    GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
    KV_CACHE_TOO_SMALL = "kv_cache_too_small"
    BAD_FLAG = "bad_flag"
    MODEL_NOT_FOUND = "model_not_found"
    GATED_REPOSITORY = "gated_repository"
    INCOMPATIBLE_LIBRARY = "incompatible_library"
    ADDRESS_IN_USE = "address_in_use"
    TOO_FEW_GPUS = "too_few_gpus"
    START_TIMEOUT = "start_timeout"
    ENGINE_DIED = "engine_died"
    KILLED_BY_SIGNAL = "killed_by_signal"
    UNHEALTHY = "unhealthy"
    SHIM_LOST = "shim_lost"
    HOST_REBOOTED = "host_rebooted"
    GPU_LOCKED = "gpu_locked"
    SPAWN_FAILED = "spawn_failed"
    WAKE_FAILED = "wake_failed"


@dataclass(frozen=True, slots=True)
class Failure:
    """A death explained. ``permanent`` failures are not retried; ``lines`` are the telling log lines (need the scope
    ``logs``); ``hint`` says what to change."""

    failure_class: FailureClass
    message: str
    hint: str
    permanent: bool
    exit_code: int | None = None
    signal: int | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExitFacts:
    """How an engine ended, as far as known. ``was_ready``: it had become ready in this attempt. ``asleep``:
    it slept then, or had not woken yet."""

    exit_code: int | None
    signal: int | None
    was_ready: bool
    asleep: bool = False


@dataclass(frozen=True, slots=True)
class Traits:
    """Facts about a started engine that the data plane and the watcher need. ``sleep_levels``: those at which it can
    be sent to sleep (1 keeps the weights in host memory, 2 keeps nothing)."""

    routes: tuple[EngineRoute, ...]
    slots: int
    priority_header: bool = False
    priority_field: bool = False
    refuses_http_media: bool = False
    has_metrics: bool = True
    health_path: str = "/health"
    sleep_levels: tuple[int, ...] = ()


class Engine(Protocol):
    """One kind of engine. All methods but ``check`` are pure and do not block."""

    name: str

    async def check(self, spec: LaunchSpec, placement: Placement) -> None:
        """Refuse what cannot work before anything is spawned (unknown flag for this interpreter's version, missing
        interpreter). May run the interpreter once and cache. Raises ``ApiError``. Idempotent."""

    def needs_port(self, spec: LaunchSpec) -> bool:
        """Whether a loopback port must be given because this engine cannot listen on a Unix socket."""

    def command(self, spec: LaunchSpec, placement: Placement, context: EngineContext) -> EngineCommand:
        """Command line and environment. Secrets go into ``env``, never into ``argv``."""

    def traits(self, spec: LaunchSpec) -> Traits:
        """Routes, slots and priority support of this launch."""

    def attention_heads(self, spec: LaunchSpec) -> int | None:
        """Number of attention heads when the model's configuration is at hand locally, else None (not checked)."""

    def progress(self, line: str) -> Progress | None:
        """What a log line says about start-up, or None. Never used as readiness."""

    def explain(self, facts: ExitFacts, log_tail: Sequence[str]) -> Failure:
        """Classify a death from how it ended and the last log lines, oldest first."""
