"""The public API's bodies as pydantic models, for routes and client alike. PURE.

Invariant: nothing but ``api/`` and ``client.py``/``cli/`` imports this; inner code has its own plain values.
Request models forbid unknown fields (the error names them); answers carry ``api_version``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints, field_validator

OWN_LABELS = "vllm-bootstrap."
API_VERSION: Literal["v1"] = "v1"
LaunchState = Literal["bootstrapping", "ready", "stopping", "stopped", "failed", "falling_asleep", "asleep", "waking"]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]
T = TypeVar("T")


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    api_version: Literal["v1"] = API_VERSION


class RestartSpec(Request):
    """``never`` or ``on-failure`` with a cap of attempts and an exponential back-off in seconds."""

    policy: Literal["never", "on-failure"] = "never"
    max_attempts: int | None = Field(None, ge=1, le=1000)
    backoff_s: float | None = Field(None, gt=0, le=3600)


class LaunchRequest(Request):
    """What to launch. Everything but ``model`` is optional."""

    model: Name
    gpu_ids: list[int | str] | None = Field(None, min_length=1, max_length=64)
    gpu_count: int | None = Field(None, ge=1, le=64)
    gpu_share: float | None = Field(None, gt=0, le=1)
    served_model_name: Name | None = None
    engine: Name | None = None
    tensor_parallel_size: int | None = Field(None, ge=1, le=64)
    pipeline_parallel_size: int | None = Field(None, ge=1, le=64)
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] | None = None
    max_model_len: int | Literal["auto"] | None = Field(None)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    max_num_seqs: int | None = Field(None, ge=1, le=16384)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    quantization: Name | None = None
    kv_cache_dtype: Name | None = None
    revision: Name | None = None
    tokenizer: Name | None = None
    seed: int | None = None
    enforce_eager: bool | None = None
    enable_prefix_caching: bool | None = None
    trust_remote_code: bool | None = None
    sleep: Literal[0, 1, 2] = 0
    extra_args: dict[str, Any] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)
    replicas: StrictInt | Literal["per_gpu"] | None = None
    labels: dict[str, str] = Field(default_factory=dict, max_length=32)
    restart: RestartSpec | Literal["never", "on-failure"] | None = None

    @field_validator("labels")
    @classmethod
    def _no_label_of_ours(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name.startswith(OWN_LABELS):
                raise ValueError(f"{name}: labels that begin with {OWN_LABELS} are the daemon's own")
        return value

    @field_validator("replicas")
    @classmethod
    def _some_replicas(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value


class Failure(BaseModel):
    """``class`` is a documented word; ``lines`` (telling log lines) only for keys with the scope ``logs``."""

    model_config = ConfigDict(populate_by_name=True)

    failure_class: str = Field(alias="class")
    message: str
    hint: str
    permanent: bool
    exit_code: int | None = None
    signal: int | None = None
    lines: list[str] | None = None


class Progress(BaseModel):
    """Best-effort start-up progress. ``eta_s`` comes from earlier starts; None when nothing is known."""

    phase: str | None = None
    fraction: float | None = None
    detail: str | None = None
    elapsed_s: float
    eta_s: float | None = None
    downloaded_bytes: int | None = None
    download_total_bytes: int | None = None


class GpuClaim(BaseModel):
    uuid: str
    index: int | None = None
    name: str | None = None
    share: float


class BatchBudget(BaseModel):
    """How much of a launch batch may use now, in sequences, and why (``reason``, one sentence). ``reserve`` is kept for
    realtime; ``promotions`` counts batch requests that went before waiting realtime, to keep batch moving."""

    slots: int
    reserve: int
    allowance: int
    batch_sequences: int
    realtime_sequences: int
    reason: str
    ttft_baseline_s: float | None = None
    ttft_recent_s: float | None = None
    step_s: float | None = None
    promotions: int = 0


class Load(BaseModel):
    """Requests of one launch at this moment, by class. ``capacity`` is the number of sequences it runs at once,
    ``oldest_wait_s`` how long the one that waits longest waits. Requests that any of several launches may get count
    for each of them."""

    capacity: int | None = None
    in_flight: dict[str, int] = Field(default_factory=dict)
    queued: dict[str, int] = Field(default_factory=dict)
    oldest_wait_s: float | None = None
    batch: BatchBudget | None = None


class Attempt(BaseModel):
    attempt: int
    started_at: datetime | None = None
    ready_at: datetime | None = None
    ended_at: datetime | None = None


class LaunchStatus(Answer):
    launch_id: str
    group_id: str
    node_id: str
    owner: str
    state: LaunchState
    unresponsive: bool = False
    stopping_because: str | None = None
    model: str
    engine: str
    served_model_name: str
    gpus: list[GpuClaim]
    labels: dict[str, str] = Field(default_factory=dict)
    restart: str = "never"
    attempt: int
    next_attempt_at: datetime | None = None
    pid: int | None = None
    shim_pid: int | None = None
    created_at: datetime
    state_changed_at: datetime
    transitions: dict[str, datetime] = Field(default_factory=dict)
    progress: Progress | None = None
    failure: Failure | None = None
    load: Load = Field(default_factory=Load)
    proxy_url: str
    group_size: int = 1


class LaunchGroup(Answer):
    """Replicas that were launched together. ``state``: ready as soon and as long as one of them is, else bootstrapping
    while any starts, else stopping while any stops; ended when all have: failed if any failed, else stopped.
    ``ready`` counts those that are. ``failure`` is the last one of any of them."""

    object: Literal["group"] = "group"
    group_id: str
    node_id: str
    owner: str
    state: LaunchState
    unresponsive: bool = False
    ready: int
    model: str
    engine: str
    served_model_name: str
    gpus: list[GpuClaim]
    labels: dict[str, str] = Field(default_factory=dict)
    restart: str = "never"
    created_at: datetime
    state_changed_at: datetime
    failure: Failure | None = None
    load: Load = Field(default_factory=Load)
    proxy_url: str
    replicas: list[LaunchStatus]


class LaunchEvent(BaseModel):
    seq: int
    launch_id: str
    attempt: int
    at: datetime
    event: str
    from_state: str | None = None
    to_state: str
    detail: dict[str, Any] = Field(default_factory=dict)


class StopResult(Answer):
    """``forced``: SIGKILL was needed. ``unsettled_gpus``: GPUs whose memory had not come back in time. ``launch_id`` is
    the id that was given; for a group ``replicas`` tells the same of each of its launches."""

    launch_id: str
    state: LaunchState
    forced: bool | None = None
    unsettled_gpus: list[str] = Field(default_factory=list)
    replicas: list[StopResult] = Field(default_factory=list)


class Deleted(Answer):
    launch_id: str
    deleted: Literal[True] = True


class LogPage(Answer):
    """A piece of an engine's log. Offsets are bytes from the start of the attempt and never go back.

    ``truncated_before``: the asked offset was rotated away, the oldest kept byte is given instead. ``eof``: the
    engine has ended and nothing follows ``next_offset``.
    """

    launch_id: str
    attempt: int
    offset: int
    next_offset: int
    content: str
    size: int
    eof: bool
    truncated_before: int | None = None


class GpuUser(BaseModel):
    pid: int | None = None
    user: str | None = None
    name: str | None = None
    used_bytes: int | None = None


class GpuInfo(BaseModel):
    """``state``: free, claimed, busy (used by others), unsettled or unknown (``reason`` says why)."""

    index: int
    uuid: str
    name: str
    kind: str
    state: Literal["free", "claimed", "busy", "unsettled", "unknown"]
    reason: str | None = None
    memory_total_bytes: int
    memory_used_bytes: int | None = None
    utilization: float | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    claims: list[dict[str, Any]] = Field(default_factory=list)
    others: list[GpuUser] = Field(default_factory=list)


class Listing(Answer, Generic[T]):
    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    last_id: str | None = None


class GpuListing(Listing[GpuInfo]):
    """``unknown``: why no GPU can be judged at the moment; nothing is claimable then. ``pids_trusted`` False: the
    driver's process ids mean nothing here (container), so others' use is judged by memory alone."""

    kind: str
    unknown: str | None = None
    pids_trusted: bool = True


class ModelInfo(BaseModel):
    """A model in OpenAI's form. ``root`` (what is launched), ``status``, ``launch_ids`` and ``description`` are ours.
    ``parent``: this is an adapter, served by the engine of that model; ``alias_of``: another name of that one.
    ``unloaded`` and ``asleep`` ones are loaded when they are asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vllm-bootstrap"
    root: str
    status: Literal["loaded", "loading", "unresponsive", "unloading", "asleep", "failed", "unloaded"]
    launch_ids: list[str]
    parent: str | None = None
    alias_of: str | None = None
    max_model_len: int | None = None
    description: str | None = None


class ModelListing(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every refusal and failure has this body. ``src`` tells our errors from an engine's."""

    error: ErrorInfo
    src: Literal["vllm-bootstrap"] = "vllm-bootstrap"


class Health(BaseModel):
    status: Literal["ok", "starting", "draining"]


class Version(BaseModel):
    version: str
    build_sha: str
    build_time: str
    data_plane: Literal["compiled", "interpreted"] = "interpreted"
    api_version: Literal["v1"] = API_VERSION


class HostStats(BaseModel):
    cpu_count: int
    load_1m: float
    memory_total_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int


class Hours(BaseModel):
    """``idle_h`` is all time that was seen and was not work, whether a launch held the device or not."""

    claimed_h: float
    working_h: float
    idle_h: float


class DeviceHours(BaseModel):
    """``total`` counts from ``since``, over all starts of the daemon. ``index`` is None for the whole box, which works
    while any of its devices does."""

    device: str
    index: int | None = None
    since: datetime
    total: Hours
    this_start: Hours


class IdleAction(BaseModel):
    """What became of the idle command or webhook since the box is idle, and how its last attempt ended."""

    name: str
    state: Literal["waiting", "running", "completed", "failed", "given_up"]
    attempts: int
    last_at: datetime | None = None
    last_error: str | None = None


class Idle(BaseModel):
    """``idle_s``: how long the box has been idle now. ``fires_in_s``: when the hook is due if it stays so."""

    idle_s: float
    busy_because: str | None = None
    box: DeviceHours
    gpus: list[DeviceHours]
    after_s: float
    fires_in_s: float | None = None
    actions: list[IdleAction]


class Stats(Answer):
    host: HostStats
    launches: dict[str, int]
    gpus: dict[str, int]
    queues: dict[str, Load]
    uptime_s: float
    idle: Idle | None = None
