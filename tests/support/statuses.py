"""Launch states and devices as the API answers them, with few words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from vllm_bootstrap.wire import GpuInfo, GpuListing, LaunchStatus

NOW = datetime(2026, 5, 17, 12, 0, 0, tzinfo=UTC)
ID = "l01hxyzabcdefghjkmnp0"
GIB = 1024**3


def status(state: str = "ready", **fields: Any) -> LaunchStatus:
    """A launch, created a minute before ``NOW`` and in its state for ten seconds."""
    given = {
        "launch_id": ID,
        "group_id": ID,
        "node_id": "local",
        "owner": "ada",
        "state": state,
        "model": "org/model",
        "engine": "simulator",
        "served_model_name": "org/model",
        "gpus": [{"uuid": "GPU-0", "index": 0, "name": "Mock", "share": 1.0}],
        "attempt": 1,
        "created_at": NOW - timedelta(seconds=60),
        "state_changed_at": NOW - timedelta(seconds=10),
        "proxy_url": f"/proxy/{ID}",
    }
    return LaunchStatus.model_validate({**given, **fields})


def gpu(index: int = 0, state: str = "free", **fields: Any) -> GpuInfo:
    given = {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": "NVIDIA H200",
        "kind": "cuda",
        "state": state,
        "memory_total_bytes": 80 * GIB,
        "memory_used_bytes": 0,
    }
    return GpuInfo.model_validate({**given, **fields})


def gpus(*data: GpuInfo, **fields: Any) -> GpuListing:
    return GpuListing(**{"data": list(data), "kind": "cuda", **fields})
