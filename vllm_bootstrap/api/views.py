"""Inner snapshots to wire types and back: the whole mapping between what is known and what is shown.

Pure functions. Times become RFC 3339 in UTC here; what a caller may not see is left out by an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from vllm_bootstrap.activity import ActivityRow, UsageRow
from vllm_bootstrap.gateway.inflight import RequestInfo
from vllm_bootstrap.gpus.condition import Condition
from vllm_bootstrap.gpus.readings import GpuProcess, GpuReading
from vllm_bootstrap.launches.types import EventView, FailureView, LaunchOrder, LaunchView, ProgressView
from vllm_bootstrap.scheduler.ports import BudgetReport
from vllm_bootstrap.serving import LoadReport
from vllm_bootstrap.wire import (
    BatchBudget,
    Failure,
    GpuClaim,
    GpuInfo,
    GpuUser,
    LaunchEvent,
    LaunchRequest,
    LaunchStatus,
    Load,
    Progress,
    RestartSpec,
)
from vllm_bootstrap.wire_requests import ActivityEntry, RequestEntry, UsageEntry

_ORDER_FIELDS = frozenset({
    "model", "gpu_ids", "gpu_count", "gpu_share", "served_model_name", "engine", "tensor_parallel_size",
    "pipeline_parallel_size", "extra_args", "env", "replicas", "labels", "restart",
    "sleep",
})  # fmt: skip


def when(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def order_of(body: LaunchRequest) -> LaunchOrder:
    """What a launch request asks for."""
    restart = body.restart if isinstance(body.restart, RestartSpec) else RestartSpec(policy=body.restart or "never")
    return LaunchOrder(
        model=body.model,
        engine=body.engine,
        served_model_name=body.served_model_name,
        gpu_ids=None if body.gpu_ids is None else tuple(body.gpu_ids),
        gpu_count=body.gpu_count,
        gpu_share=body.gpu_share,
        tensor_parallel_size=body.tensor_parallel_size,
        pipeline_parallel_size=body.pipeline_parallel_size,
        fields=body.model_dump(exclude=set(_ORDER_FIELDS), exclude_none=True),
        extra_args=body.extra_args,
        env=body.env,
        labels=body.labels,
        restart_policy=restart.policy,
        restart_max_attempts=restart.max_attempts,
        restart_backoff_s=restart.backoff_s,
        replicas=1 if body.replicas is None else body.replicas,
        sleep=body.sleep,
    )


def status(view: LaunchView, report: LoadReport, *, with_lines: bool, queues: Waiting | None = None) -> LaunchStatus:
    """A launch as shown. ``with_lines``: the caller may see log lines. ``queues``: what waits, everywhere."""
    queues = queues or Waiting()
    oldest = queues.longest(view.launch_id, view.served_model_name)
    return LaunchStatus(
        launch_id=view.launch_id,
        group_id=view.group_id,
        node_id=view.node_id,
        owner=view.owner_id,
        state=view.state,
        unresponsive=view.unresponsive,
        stopping_because=view.why,
        model=view.model,
        engine=view.engine,
        served_model_name=view.served_model_name,
        gpus=[GpuClaim(uuid=c.uuid, index=c.index, name=c.name, share=c.share) for c in view.claims],
        labels=dict(view.labels),
        restart=view.restart_policy,
        attempt=view.attempt,
        next_attempt_at=when(view.next_attempt_at),
        pid=view.pid,
        shim_pid=view.shim_pid,
        created_at=_at(view.created_at),
        state_changed_at=_at(view.changed_at),
        transitions={state: _at(at) for state, at in view.transitions.items()},
        progress=_progress(view.progress),
        failure=_failure(view.failure, with_lines=with_lines),
        load=load(report, view.capacity, oldest, queues.budgets.get(view.launch_id)),
        proxy_url=f"/proxy/{view.launch_id}",
        group_size=view.group_size,
    )


@dataclass(frozen=True, slots=True)
class Waiting:
    """All launches' queues at one moment. ``oldest``: how many seconds the longest wait has lasted, by the id of a
    launch or the name of a model. ``budgets``: what batch may use, by launch."""

    oldest: Mapping[str, float] = field(default_factory=dict)
    budgets: Mapping[str, BudgetReport] = field(default_factory=dict)

    def longest(self, launch_id: str, *names: str) -> float | None:
        """How long the oldest request waits that this launch may get."""
        return max((self.oldest[name] for name in (launch_id, *names) if name in self.oldest), default=None)


def waiting(requests: Iterable[RequestInfo], budgets: Mapping[str, BudgetReport]) -> Waiting:
    """The queues out of all requests under way."""
    oldest: dict[str, float] = {}
    for info in requests:
        name = info.launch_id or info.model
        if info.state == "queued" and name is not None:
            oldest[name] = max(oldest.get(name, 0.0), info.queue_ms / 1000)
    return Waiting(oldest, budgets)


def load(
    report: LoadReport,
    capacity: int | None = None,
    oldest_wait_s: float | None = None,
    budget: BudgetReport | None = None,
) -> Load:
    batch = None if budget is None else BatchBudget.model_validate(_rounded(budget))
    return Load(
        capacity=capacity, in_flight=report.in_flight, queued=report.queued, oldest_wait_s=oldest_wait_s, batch=batch
    )


def _rounded(budget: BudgetReport) -> dict[str, Any]:
    """Its fields, times to the tenth of a millisecond."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(budget).items()}


def request(info: RequestInfo) -> RequestEntry:
    """A request under way as shown."""
    return RequestEntry(
        id=info.id,
        request_class=info.cls,
        owner=info.owner,
        model=info.model,
        launch_id=info.launch_id,
        state=info.state,
        method=info.method,
        path=info.path,
        age_s=round(info.age_s, 3),
        queue_ms=info.queue_ms,
        sequences=info.sequences,
        tokens=info.tokens,
        stream=info.stream,
    )


def finished(row: ActivityRow) -> ActivityEntry:
    """A finished request as shown."""
    shown = row._asdict()
    return ActivityEntry.model_validate({
        **shown, "id": str(row.id), "class": shown.pop("cls"), "started_at": _at(row.started_at),
    })  # fmt: skip


def usage(row: UsageRow) -> UsageEntry:
    """Sums as shown."""
    shown = row._asdict()
    return UsageEntry.model_validate({
        **shown, "class": shown.pop("cls"), "first_at": _at(row.first_at), "last_at": _at(row.last_at),
    })  # fmt: skip


def _progress(view: ProgressView | None) -> Progress | None:
    if view is None:
        return None
    return Progress(
        phase=view.phase,
        fraction=view.fraction,
        detail=view.detail,
        elapsed_s=view.elapsed_s,
        eta_s=view.eta_s,
        downloaded_bytes=view.downloaded_bytes,
        download_total_bytes=view.download_total_bytes,
    )


def _failure(view: FailureView | None, *, with_lines: bool) -> Failure | None:
    if view is None:
        return None
    return Failure(
        failure_class=view.failure_class,
        message=view.message,
        hint=view.hint,
        permanent=view.permanent,
        exit_code=view.exit_code,
        signal=view.signal,
        lines=list(view.lines) if with_lines else None,
    )


def event(view: EventView) -> LaunchEvent:
    return LaunchEvent(
        seq=view.seq,
        launch_id=view.launch_id,
        attempt=view.attempt,
        at=_at(view.at),
        event=view.event,
        from_state=view.from_state,
        to_state=view.to_state,
        detail=dict(view.detail),
    )


def gpu(reading: GpuReading, kind: str, condition: Condition, shares: Mapping[str, float]) -> GpuInfo:
    """A device as shown. ``shares``: launch id to the share of this GPU it owns."""
    return GpuInfo(
        index=reading.gpu.index,
        uuid=reading.gpu.uuid,
        name=reading.gpu.name,
        kind=kind,
        state=condition.state.value,
        reason=condition.reason,
        memory_total_bytes=reading.gpu.total_bytes,
        memory_used_bytes=reading.used_bytes,
        utilization=reading.utilization,
        temperature_c=reading.temperature_c,
        power_w=reading.power_w,
        claims=[{"launch_id": owner, "share": shares.get(owner)} for owner in condition.owners],
        others=[_user(process) for process in condition.others],
    )


def _user(process: GpuProcess) -> GpuUser:
    return GpuUser(pid=process.pid, user=process.user, name=process.name, used_bytes=process.used_bytes)
