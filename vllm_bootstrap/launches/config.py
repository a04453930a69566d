"""The numbers and places a supervisor works with, as plain values. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """Times in seconds, sizes in bytes. ``instance_secret`` keys the derivation of internal engine keys."""

    node_id: str
    state_id: str
    boot_id: str
    instance_secret: bytes = field(repr=False)
    log_base: Path
    lock_dir: Path
    default_engine: str
    port_range: tuple[int, int]
    base_env: Mapping[str, str] = field(repr=False)
    hf_token: str | None = field(repr=False)
    hf_home: Path
    uid: int | None
    gid: int | None
    allow_dangerous_args: tuple[str, ...]
    start_timeout_s: float
    start_stall_timeout_s: float
    stop_grace_s: float
    probe_interval_s: float
    probe_timeout_s: float
    unresponsive_after_s: float
    unhealthy_after_s: float
    restart_max_attempts: int
    restart_backoff_s: float
    restart_backoff_max_s: float
    restart_reset_s: float
    ended_launches_kept: int
    replicas_max: int
    log_segment_bytes: int
    log_max_bytes: int
    ended_logs_max_bytes: int
    gpu_busy_bytes: int
    gpu_settle_timeout_s: float
    gpu_settle_tolerance_bytes: int
    sleep_memory_reserve_bytes: int = 8 * 1024**3
