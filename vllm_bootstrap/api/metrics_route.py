"""``GET /metrics``: gauges of the present are set from what the daemon knows, then everything is printed."""

from __future__ import annotations

from collections import Counter

from starlette.responses import Response

from vllm_bootstrap.api.gpus import gpu_listing
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Services
from vllm_bootstrap.auth.scopes import MONITOR
from vllm_bootstrap.auth.types import Rule
from vllm_bootstrap.batches.jobs import TERMINAL, State
from vllm_bootstrap.metrics import CONTENT_TYPE
from vllm_bootstrap.scheduler.ports import BudgetReport
from vllm_bootstrap.wire import GpuListing

ACTIVE_STATES = ("bootstrapping", "ready", "falling_asleep", "asleep", "waking", "stopping")
GPU_STATES = ("free", "claimed", "busy", "unsettled", "unknown")
CLASSES = ("realtime", "batch")


def register(routes: Registrar) -> None:
    rule = Rule(scopes=frozenset({MONITOR}))
    routes.add("GET", "/metrics", read_metrics, rule, any_query=True, response_class=Response)


async def read_metrics(api: Api) -> Response:
    """Metrics of the daemon in the Prometheus text format."""
    listing = await gpu_listing(api)
    dropped = await api.supervisor.dropped_log_bytes()
    refresh(api, listing, dropped)
    return Response(api.metrics.render(), media_type=CONTENT_TYPE)


def refresh(api: Services, listing: GpuListing, dropped: int) -> None:
    """Set every gauge. Nothing is awaited, so that two scrapes never mix."""
    metrics = api.metrics
    states = Counter(view.state for view in api.supervisor.list(include_ended=False))
    for state in ACTIVE_STATES:
        metrics.launches.labels(state).set(states[state])
    metrics.build.labels(api.version, api.settings.build_sha).set(1)
    metrics.key_file_broken.set(api.keys.problem is not None)
    metrics.log_dropped.set(dropped)
    _refresh_traffic(api)
    _refresh_batches(api)
    _refresh_models(api)
    _refresh_gpus(api, listing)


def _refresh_traffic(api: Services) -> None:
    metrics = api.metrics
    reports = api.gate.queues().values()
    queued = [info for info in api.requests.list() if info.state == "queued"]
    for name in CLASSES:
        metrics.queue_depth.labels(name).set(sum(report.queued.get(name, 0) for report in reports))
        metrics.in_flight.labels(name).set(sum(report.in_flight.get(name, 0) for report in reports))
        oldest = max((info.queue_ms for info in queued if info.cls == name), default=0)
        metrics.queue_oldest.labels(name).set(oldest / 1000)
    metrics.traffic.history_dropped = api.activity.dropped
    _refresh_budgets(api)


def _refresh_budgets(api: Services) -> None:
    """What batch may use of each model: of all launches together that serve it."""
    metrics = api.metrics
    budgets = api.gate.budgets()
    by_model: dict[str, list[BudgetReport]] = {}
    for advert in api.gate.adverts():
        if advert.launch_id in budgets and advert.served_names:
            by_model.setdefault(advert.served_names[0], []).append(budgets[advert.launch_id])
    gauges = (metrics.batch_allowance, metrics.batch_running, metrics.realtime_reserve)
    for gauge in gauges:
        gauge.clear()
    for model, found in by_model.items():
        sums = (sum(b.allowance for b in found), sum(b.batch_sequences for b in found), sum(b.reserve for b in found))
        for gauge, value in zip(gauges, sums, strict=True):
            gauge.labels(model).set(value)


def _refresh_batches(api: Services) -> None:
    counts = api.batches.states()
    for state in State:
        if state not in TERMINAL:
            api.metrics.batches.labels(state.value).set(counts.get(state.value, 0))
    api.metrics.batches_paused.set(counts.get("paused", 0))
    api.metrics.items_waiting.set(api.items.waiting)


def _refresh_models(api: Services) -> None:
    views = api.models.list()
    held: Counter[str] = Counter()
    for view in views:
        if view.state != "loaded":
            held.update(view.waiting)
    api.metrics.models.held(held)
    api.metrics.models.states({view.entry.name: view.state for view in views})
    if api.idle is not None:
        report = api.idle.report()
        api.metrics.idle_time.gpus = report.gpus
        api.metrics.box_idle.set(report.idle_s)


def _refresh_gpus(api: Services, listing: GpuListing) -> None:
    metrics = api.metrics
    for gauge in (metrics.gpu_memory_used, metrics.gpu_memory_total, metrics.gpu_utilization, metrics.gpu_state):
        gauge.clear()  # a GPU that is not seen any more leaves no stale figure
    for gpu in listing.data:
        index = str(gpu.index)
        metrics.gpu_memory_total.labels(index).set(gpu.memory_total_bytes)
        if gpu.memory_used_bytes is not None:
            metrics.gpu_memory_used.labels(index).set(gpu.memory_used_bytes)
        if gpu.utilization is not None:
            metrics.gpu_utilization.labels(index).set(gpu.utilization)
        for state in GPU_STATES:
            metrics.gpu_state.labels(index, state).set(gpu.state == state)
