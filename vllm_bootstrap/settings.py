"""Settings: frozen values, read once at the composition root from environment and an env file.

Invariant: inner code never reads the environment, it gets plain arguments. Every setting has a documented default
(docs/configuration.md, checked by a test). A setting that would have no effect is refused, never ignored.

Each field may be given as ``VLLM_BOOTSTRAP_<NAME>``; some also under an established name, which the prefix wins over.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from vllm_bootstrap.places import default_state_dir, running_as_root

PREFIX = "VLLM_BOOTSTRAP_"
MIB, GIB = 1024**2, 1024**3
# Without MODEL_ID these say nothing.
OF_ONE_MODEL = ("model_revision", "dtype", "tensor_parallel", "max_model_len", "gpu_memory_utilization")


def _names(name: str, *established: str) -> AliasChoices:
    return AliasChoices(PREFIX + name.upper(), *established)


def default_runtime_dir() -> Path:
    if running_as_root():
        return Path("/run/vllm-bootstrap")
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    return Path(xdg) / "vllm-bootstrap" if xdg else Path(f"/tmp/vllm-bootstrap-{os.getuid()}")  # noqa: S108


def default_lock_dir() -> Path:
    return Path("/run/lock/vllm-bootstrap") if running_as_root() else Path("/tmp/vllm-bootstrap-locks")  # noqa: S108


CommaList = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """All settings of the daemon. Sizes in bytes, times in seconds, unless a name says otherwise."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_prefix=PREFIX, populate_by_name=True, env_ignore_empty=True
    )

    # Listening
    host: str = Field("127.0.0.1", validation_alias=_names("host", "HOST"))
    port: int = Field(8000, ge=0, le=65535, validation_alias=_names("port", "PORT"))
    allowed_hosts: CommaList = ()
    ssl_certfile: Path | None = Field(None, validation_alias=_names("ssl_certfile", "SSL_CERTFILE"))
    ssl_keyfile: Path | None = Field(None, validation_alias=_names("ssl_keyfile", "SSL_KEYFILE"))
    forwarded_allow_ips: CommaList = ()

    # Keys
    access_key: SecretStr | None = Field(None, validation_alias=_names("access_key", "VLLM_ACCESS_KEY"))
    orchestrator_token: SecretStr | None = Field(
        None, validation_alias=_names("orchestrator_token", "ORCHESTRATOR_TOKEN")
    )
    auth_keys_file: Path | None = Field(None, validation_alias=_names("auth_keys_file", "AUTH_KEYS_FILE"))
    insecure: bool = False
    protect_all: bool = False
    dashboard_session_s: int = Field(3600, ge=60)

    # Where things live
    state_dir: Path = Field(default_factory=default_state_dir)
    runtime_dir: Path = Field(default_factory=default_runtime_dir)
    lock_dir: Path = Field(default_factory=default_lock_dir)
    log_dir: Path | None = None
    log_file: Path | None = None
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", validation_alias=_names("log_level", "LOG_LEVEL")
    )

    # Engines
    engine: str = Field("vllm", validation_alias=_names("engine", "RUNTIME_TYPE"))
    engine_python: Path | None = None
    engine_command: str | None = None
    engine_user: str | None = None
    engines_file: Path | None = None
    engine_port_start: int = Field(
        8100, ge=1, le=65535, validation_alias=_names("engine_port_start", "VLLM_LAUNCH_PORT_START")
    )
    engine_port_end: int = Field(
        8199, ge=1, le=65535, validation_alias=_names("engine_port_end", "VLLM_LAUNCH_PORT_END")
    )
    engine_env_passthrough: CommaList = ()
    allow_dangerous_args: CommaList = ()
    allowed_media_domains: CommaList = ()
    hf_token: SecretStr | None = Field(None, validation_alias=_names("hf_token", "HF_TOKEN"))
    hf_home: Path | None = Field(None, validation_alias=_names("hf_home", "HF_HOME"))

    # Launches
    start_timeout_s: float = Field(1200, gt=0)
    start_stall_timeout_s: float = Field(600, gt=0)
    stop_grace_s: float = Field(7, ge=0)
    on_shutdown: Literal["stop", "leave"] = "stop"
    probe_interval_s: float = Field(2, gt=0)
    probe_timeout_s: float = Field(5, gt=0)
    unresponsive_after_s: float = Field(20, gt=0)
    unhealthy_after_s: float = Field(300, gt=0)
    restart_max_attempts: int = Field(5, ge=1)
    restart_backoff_s: float = Field(2, gt=0)
    restart_backoff_max_s: float = Field(300, gt=0)
    restart_reset_s: float = Field(600, gt=0)
    ended_launches_kept: int = Field(1000, ge=1)
    replicas_max: int = Field(64, ge=1)

    # Engine logs
    engine_log_segment_bytes: int = Field(16 * MIB, ge=4096)
    engine_log_max_bytes: int = Field(256 * MIB, ge=8192)
    ended_logs_max_bytes: int = Field(4 * GIB, ge=0)

    # GPUs
    devices: str | None = Field(None, pattern=r"^(mock:[1-9][0-9]?|cuda|cpu)$")
    mock_gpu_file: Path | None = None
    use_mock_model: bool = Field(False, validation_alias=_names("use_mock_model", "USE_MOCK_MODEL"))
    gpus: CommaList = ()
    cpu_slots: int = Field(1, ge=1)
    gpu_busy_bytes: int = Field(1 * GIB, ge=0)
    gpu_settle_timeout_s: float = Field(60, ge=0)
    gpu_settle_tolerance_bytes: int = Field(512 * MIB, ge=0)
    sleep_memory_reserve_bytes: int = Field(8 * GIB, ge=0)
    nvml_timeout_s: float = Field(5, gt=0)

    # Data plane
    max_in_flight_requests: int = Field(
        100,
        ge=1,
        validation_alias=_names("max_in_flight_requests", "MAX_IN_FLIGHT_REQUESTS", "MAX_CONCURRENT_REQUESTS"),
    )
    max_queued_bytes: int = Field(256 * MIB, ge=MIB)
    queue_timeout_s: float = Field(300, gt=0)
    realtime_reserve: float = Field(0.1, ge=0, le=0.9)
    realtime_ttft_factor: float = Field(1.5, gt=1)
    batch_floor: float = Field(0.05, ge=0, le=1)
    max_body_bytes: int = Field(64 * MIB, ge=1024)
    max_upload_bytes: int = Field(512 * MIB, ge=1024)
    spool_budget_bytes: int = Field(8 * GIB, ge=1024)
    max_header_bytes: int = Field(64 * 1024, ge=1024)
    max_header_count: int = Field(100, ge=8)
    header_timeout_s: float = Field(15, gt=0)
    body_timeout_s: float = Field(60, gt=0)
    keep_alive_s: float = Field(75, gt=0)
    max_connections: int = Field(10_000, ge=1)
    client_dead_after_s: float = Field(60, ge=0, le=3600)
    write_stall_timeout_s: float = Field(300, gt=0)
    upstream_connect_timeout_s: float = Field(5, gt=0)
    upstream_first_byte_timeout_s: float = Field(1800, gt=0)
    upstream_idle_timeout_s: float = Field(600, gt=0)
    upstream_keep_alive_s: float = Field(4, gt=0)
    revoked_keys_cut_streams: bool = False
    activity_rows: int = Field(100_000, ge=0)

    # Files and batches
    file_max_bytes: int = Field(2 * GIB, ge=1024)
    file_expires_after_s: float = Field(30 * 86400, ge=3600)
    disk_reserve_bytes: int = Field(256 * MIB, ge=0)
    batch_max_lines: int = Field(1_000_000, ge=1)
    batch_max_line_bytes: int = Field(8 * MIB, ge=1024)
    batch_max_unfinished: int = Field(1000, ge=1)
    batch_line_attempts: int = Field(5, ge=1)
    batch_prefix_order: bool = True
    batch_kept_s: float = Field(30 * 86400, ge=0)
    batch_max_size: int = Field(8, ge=1, le=1024, validation_alias=_names("batch_max_size", "BATCH_MAX_SIZE"))
    batch_max_latency_ms: float = Field(
        50, ge=0, validation_alias=_names("batch_max_latency_ms", "BATCH_MAX_LATENCY_MS")
    )
    item_expires_after_s: float = Field(86400, ge=60)
    items_max_queued: int = Field(100_000, ge=1)
    webhook_secret: SecretStr | None = None
    webhook_allow_private: bool = False
    webhook_attempts: int = Field(10, ge=1)

    # An idle box
    idle_after_s: float = Field(0, ge=0)
    idle_command: str | None = None
    idle_webhook: SecretStr | None = None

    # Models
    models_file: Path | None = None
    on_demand: Literal["catalogue", "any", "off"] | None = None
    cold_start_hold_s: float = Field(30, ge=0)
    model_ttl_s: float = Field(0, ge=0)
    model_asleep_ttl_s: float = Field(0, ge=0)
    model_min_loaded_s: float = Field(2, ge=0)
    model_max_wait_s: float = Field(15, ge=0)
    model_batch_turn_s: float = Field(600, ge=0)
    fit_check: bool = True
    downloads_at_once: int = Field(1, ge=1, le=16)
    adapter_max_bytes: int = Field(4 * GIB, ge=1024)
    model_id: str | None = Field(None, min_length=1, validation_alias=_names("model_id", "MODEL_ID"))
    model_revision: str | None = Field(None, validation_alias=_names("model_revision", "MODEL_REVISION"))
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = Field(
        "auto", validation_alias=_names("dtype", "DTYPE")
    )
    tensor_parallel: int = Field(1, ge=1, le=64, validation_alias=_names("tensor_parallel", "TENSOR_PARALLEL"))
    max_model_len: int = Field(8192, ge=1, validation_alias=_names("max_model_len", "MAX_MODEL_LEN"))
    gpu_memory_utilization: float = Field(
        0.90, gt=0, le=1, validation_alias=_names("gpu_memory_utilization", "GPU_MEMORY_UTILIZATION")
    )

    # How the daemon runs
    compiled: bool = True

    # Build facts, shown by /version
    build_sha: str = Field("dev", validation_alias=_names("build_sha", "BUILD_SHA"))
    build_time: str = Field("dev", validation_alias=_names("build_time", "BUILD_TIME"))

    @field_validator(
        "allowed_hosts", "gpus", "engine_env_passthrough", "allow_dangerous_args", "allowed_media_domains",
        "forwarded_allow_ips", mode="before",
    )  # fmt: skip
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("host")
    @classmethod
    def _host_is_address(cls, value: str) -> str:
        if value != "localhost":
            try:
                ipaddress.ip_address(value)
            except ValueError:
                raise ValueError(
                    f"HOST must be an IP address or 'localhost', not {value!r}. "
                    "Some shells export HOST: set VLLM_BOOTSTRAP_HOST, which wins."
                ) from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("SSL_CERTFILE and SSL_KEYFILE must be set together")
        if self.engine_port_end < self.engine_port_start:
            raise ValueError("VLLM_LAUNCH_PORT_END must not be below VLLM_LAUNCH_PORT_START")
        if self.engine_log_max_bytes < 2 * self.engine_log_segment_bytes:
            raise ValueError("VLLM_BOOTSTRAP_ENGINE_LOG_MAX_BYTES must hold at least two segments")
        if self.model_id is None and (pointless := self._changed(*OF_ONE_MODEL)):
            raise ValueError(
                f"{pointless[0].upper()} says how the model of MODEL_ID is run, and MODEL_ID is not set: set it, or "
                f"unset {pointless[0].upper()} (for models of the catalogue it stands in models.yaml)"
            )
        if (self.idle_command or self.idle_webhook) and "idle_after_s" not in self.model_fields_set:
            raise ValueError("VLLM_BOOTSTRAP_IDLE_AFTER_S must say after how long (0 turns it off)")
        return self

    def _changed(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @property
    def is_loopback(self) -> bool:
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback

    @property
    def engine_log_dir(self) -> Path:
        return self.log_dir or self.state_dir / "logs"

    @property
    def default_engine(self) -> str:
        return "simulator" if self.mock_devices else self.engine

    @property
    def models_by_request(self) -> Literal["catalogue", "any", "off"]:
        """Which models a request may have loaded. Where a pretended one was asked for, any."""
        return self.on_demand or ("any" if self.use_mock_model else "catalogue")

    @property
    def mock_devices(self) -> int:
        """Number of mock GPUs, 0 for real devices."""
        text = self.devices or ("mock:2" if self.use_mock_model else "")
        return int(text.removeprefix("mock:")) if text.startswith("mock:") else 0
