"""A launch request as the first rows of its story: ids, times, restart wish. Brings clock and chance, no decisions."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict

from vllm_bootstrap import ids
from vllm_bootstrap.engines.base import LaunchSpec
from vllm_bootstrap.launches import lifecycle
from vllm_bootstrap.launches.store import LaunchRow
from vllm_bootstrap.launches.types import LaunchOrder


def new_rows(order: LaunchOrder, spec: LaunchSpec, owner_id: str, node_id: str, count: int) -> list[LaunchRow]:
    """The rows of launches that are about to be accepted, under fresh ids, in the order of these. A single launch is
    its own group; replicas, were it only one, get a group id."""
    now = time.time()
    launch_ids = sorted(_fresh("l", now) for _ in range(count))
    group_id = launch_ids[0] if order.replicas == 1 else _fresh("g", now)
    return [
        LaunchRow(
            id=launch_id,
            node_id=node_id,
            owner_id=owner_id,
            group_id=group_id,
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
        for launch_id in launch_ids
    ]


def _fresh(prefix: str, now: float) -> str:
    return ids.new_id(prefix, int(now * 1000), secrets.token_bytes(ids.RANDOM_BYTES))


def _restart(order: LaunchOrder) -> dict[str, object]:
    wish = {
        "policy": order.restart_policy,
        "max_attempts": order.restart_max_attempts,
        "backoff_s": order.restart_backoff_s,
    }
    return {name: value for name, value in wish.items() if value is not None}
