"""Idle time as shown. Pure functions: inner values to wire types."""

from __future__ import annotations

from vllm_bootstrap.api.views import when
from vllm_bootstrap.models.idle_time import DeviceTime, IdleReport, Spent
from vllm_bootstrap.wire import DeviceHours, Hours, Idle, IdleAction


def idle(report: IdleReport) -> Idle:
    """How long the box and its devices were idle, and what is done about it."""
    return Idle(
        idle_s=round(report.idle_s, 3),
        busy_because=report.busy_because,
        box=_device(report.box),
        gpus=[_device(gpu) for gpu in report.gpus],
        after_s=report.after_s,
        fires_in_s=None if report.fires_in_s is None else round(report.fires_in_s, 3),
        actions=[
            IdleAction(
                name=action.name,
                state=action.state,
                attempts=action.attempts,
                last_at=when(action.last_at),
                last_error=action.last_error,
            )
            for action in report.actions
        ],
    )


def _device(time: DeviceTime) -> DeviceHours:
    since = when(time.since)
    assert since is not None  # noqa: S101  (narrows a type)
    return DeviceHours(
        device=time.device, index=time.index, since=since, total=_hours(time.total), this_start=_hours(time.this_start)
    )


def _hours(spent: Spent) -> Hours:
    return Hours(
        claimed_h=round(spent.claimed_s / 3600, 6),
        working_h=round(spent.working_s / 3600, 6),
        idle_h=round(spent.idle_s / 3600, 6),
    )
