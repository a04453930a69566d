"""A snapshot of a launch, as much of it as a test cares for."""

from __future__ import annotations

from typing import Any

from vllm_bootstrap.launches.types import LaunchView


def launch_view(**fields: Any) -> LaunchView:
    """A ready launch ``l0`` of ``m``; ``fields`` say what is different."""
    launch_id = fields.get("launch_id", "l0")
    given: dict[str, Any] = {
        "launch_id": launch_id,
        "group_id": launch_id,
        "node_id": "local",
        "owner_id": "ada",
        "state": "ready",
        "why": None,
        "unresponsive": False,
        "model": "org/m",
        "engine": "simulator",
        "served_model_name": "m",
        "claims": (),
        "labels": {},
        "restart_policy": "never",
        "attempt": 1,
        "next_attempt_at": None,
        "pid": None,
        "shim_pid": None,
        "created_at": 0.0,
        "changed_at": 0.0,
        "transitions": {},
        "progress": None,
        "failure": None,
        "capacity": 4,
    }
    return LaunchView(**{**given, **fields})
