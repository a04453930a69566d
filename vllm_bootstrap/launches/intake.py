"""A launch request as the first row of its story: id, times, restart wish. Brings clock and chance, decides nothing."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict

from vllm_bootstrap import ids
from vllm_bootstrap.engines.base import LaunchSpec
from vllm_bootstrap.launches import lifecycle
from vllm_bootstrap.launches.store import LaunchRow
from vllm_bootstrap.launches.types import LaunchOrder


def new_row(order: LaunchOrder, spec: LaunchSpec, owner_id: str, node_id: str) -> LaunchRow:
    """The row of a launch that is about to be accepted, under a fresh id. A single launch is its own group."""
    now = time.time()
    launch_id = ids.new_id("l", int(now * 1000), secrets.token_bytes(ids.RANDOM_BYTES))
    return LaunchRow(
        id=launch_id,
        node_id=node_id,
        owner_id=owner_id,
        group_id=launch_id,
        model=spec.model,
        engine=spec.engine,
        served_model_name=spec.served_model_name,
        spec=asdict(spec),
        labels=dict(order.labels),
        restart=_restart(order),
        phase=lifecycle.BOOTSTRAPPING,
        attempt=1,
        created_at=now,
        changed_at=now,
        ended_at=None,
        failure=None,
        transitions={lifecycle.State.BOOTSTRAPPING.value: now},
    )


def _restart(order: LaunchOrder) -> dict[str, object]:
    wish = {
        "policy": order.restart_policy,
        "max_attempts": order.restart_max_attempts,
        "backoff_s": order.restart_backoff_s,
    }
    return {name: value for name, value in wish.items() if value is not None}
