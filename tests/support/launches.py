"""Short ways to make launch rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_bootstrap.launches.lifecycle import BOOTSTRAPPING
from vllm_bootstrap.launches.records import LaunchRow


def launch_id(number: int) -> str:
    return f"l{number:020d}"


def row(number: int, **changed: Any) -> LaunchRow:
    """A new launch, made at second ``number``."""
    at = float(number)
    made = LaunchRow(
        id=launch_id(number),
        node_id="local",
        owner_id="alice",
        group_id=launch_id(number),
        model="org/model",
        engine="vllm",
        served_model_name="model",
        spec={"model": "org/model", "fields": {"max_model_len": 4096}},
        phase=BOOTSTRAPPING,
        attempt=1,
        created_at=at,
        changed_at=at,
        labels={"team": "grün"},
        restart={"policy": "on-failure"},
        transitions={"bootstrapping": at},
    )
    return replace(made, **changed)
