"""``GET /metrics``: gauges of the present are set from what the daemon knows, then everything is printed."""

from __future__ import annotations

from collections import Counter

from starlette.responses import Response

from vllm_bootstrap.api.gpus import gpu_listing
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Services
from vllm_bootstrap.auth.scopes import MONITOR
from vllm_bootstrap.auth.types import Rule
from vllm_bootstrap.metrics import CONTENT_TYPE
from vllm_bootstrap.wire import GpuListing

ACTIVE_STATES = ("bootstrapping", "ready", "stopping")
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
    reports = api.gate.queues().values()
    for name in CLASSES:
        metrics.queue_depth.labels(name).set(sum(report.queued.get(name, 0) for report in reports))
        metrics.in_flight.labels(name).set(sum(report.in_flight.get(name, 0) for report in reports))
    metrics.log_dropped.set(dropped)
    _refresh_gpus(api, listing)


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
