"""Snapshots of launches for readers, made from an owner (active) or from stored rows (ended). No decisions here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from vllm_bootstrap.engines.base import Placement
from vllm_bootstrap.launches.lifecycle import State, Why, is_routable
from vllm_bootstrap.launches.owner import LaunchOwner
from vllm_bootstrap.launches.store import LaunchRow
from vllm_bootstrap.launches.types import ClaimView, FailureView, LaunchView, ProgressView
from vllm_bootstrap.serving import Advert, Instance


def claim_views(placement: Placement) -> tuple[ClaimView, ...]:
    share = placement.share_milli / 1000
    return tuple(ClaimView(gpu.uuid, gpu.index, gpu.name, share) for gpu in placement.gpus)


def failure_view(stored: Mapping[str, Any] | None) -> FailureView | None:
    if stored is None:
        return None
    return FailureView(
        failure_class=str(stored["failure_class"]),
        message=str(stored["message"]),
        hint=str(stored["hint"]),
        permanent=bool(stored["permanent"]),
        exit_code=stored.get("exit_code"),
        signal=stored.get("signal"),
        lines=tuple(stored.get("lines") or ()),
    )


def of_row(row: LaunchRow, claims: tuple[ClaimView, ...] = ()) -> LaunchView:
    """A launch nobody owns any more, as it was written."""
    return _view(row, claims)


def of_owner(owner: LaunchOwner) -> LaunchView:
    """A launch that is owned right now."""
    attempt = owner.attempt
    return _view(
        owner.row,
        claim_views(owner.placement),
        unresponsive=owner.unresponsive,
        next_attempt_at=owner.next_attempt_at,
        pid=attempt.pid if attempt else None,
        shim_pid=attempt.shim_pid if attempt else None,
        progress=_progress(owner),
        capacity=owner.spec.slots((attempt.traits if attempt else owner.engine.traits(owner.spec)).slots),
    )


def _view(
    row: LaunchRow,
    claims: tuple[ClaimView, ...],
    *,
    unresponsive: bool = False,
    next_attempt_at: float | None = None,
    pid: int | None = None,
    shim_pid: int | None = None,
    progress: ProgressView | None = None,
    capacity: int | None = None,
) -> LaunchView:
    return LaunchView(
        launch_id=row.id,
        group_id=row.group_id,
        node_id=row.node_id,
        owner_id=row.owner_id,
        state=row.phase.state.value,
        why=row.phase.why.value if row.phase.why else None,
        unresponsive=unresponsive,
        model=row.model,
        engine=row.engine,
        served_model_name=row.served_model_name,
        claims=claims,
        labels=row.labels,
        restart_policy=str(row.restart.get("policy", "never")),
        attempt=row.attempt,
        next_attempt_at=next_attempt_at,
        pid=pid,
        shim_pid=shim_pid,
        created_at=row.created_at,
        changed_at=row.changed_at,
        transitions=row.transitions,
        progress=progress,
        failure=failure_view(row.failure),
        capacity=capacity,
    )


def _progress(owner: LaunchOwner) -> ProgressView | None:
    if owner.phase.state is not State.BOOTSTRAPPING or owner.attempt is None:
        return None
    return owner.attempt.progress.view(time.monotonic())


def advert_of(owner: LaunchOwner) -> Advert:
    """What the data plane is told about a launch. One that is wished gone counts as stopping already."""
    row, phase = owner.row, owner.heading_for
    progress = _progress(owner) if phase.state is State.BOOTSTRAPPING else None
    return Advert(
        launch_id=row.id,
        group_id=row.group_id,
        base_model=row.model,
        served_names=owner.spec.served_names,
        state=phase.state.value,
        instance=_instance(owner),
        retry_after_s=progress.eta_s if progress is not None else None,
        stopped=phase.state is State.STOPPED or phase.why is Why.OPERATOR,
    )


def _instance(owner: LaunchOwner) -> Instance | None:
    attempt, row = owner.attempt, owner.row
    if attempt is None or attempt.endpoint is None or owner.withdrawn:
        return None
    if not is_routable(owner.heading_for, unresponsive=owner.unresponsive):
        return None
    traits = attempt.traits
    return Instance(
        launch_id=row.id,
        group_id=row.group_id,
        engine=row.engine,
        base_model=row.model,
        served_names=owner.spec.served_names,
        endpoint=attempt.endpoint,
        slots=owner.spec.slots(traits.slots),
        routes=traits.routes,
        priority_header=traits.priority_header,
        priority_field=traits.priority_field,
        refuses_http_media=traits.refuses_http_media,
        node_id=row.node_id,
        health_path=traits.health_path,
    )
