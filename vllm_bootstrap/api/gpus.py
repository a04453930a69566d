"""GPUs, their owners and users; figures of the host."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter
from pathlib import Path

import psutil
from starlette.responses import Response

from vllm_bootstrap.api import idle_views, views
from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Services
from vllm_bootstrap.auth.scopes import MONITOR
from vllm_bootstrap.auth.types import Rule
from vllm_bootstrap.gpus.condition import assess
from vllm_bootstrap.wire import GpuInfo, GpuListing, HostStats, Stats


def register(routes: Registrar) -> None:
    monitor = Rule(scopes=frozenset({MONITOR}))
    routes.add("GET", "/gpus", list_gpus, monitor, answer=GpuListing)
    routes.add("GET", "/stats", read_stats, monitor, answer=Stats)


async def list_gpus(api: Api) -> Response:
    """Every device the daemon may use: memory, use, owners, others' processes, and why it cannot be given out."""
    return answer(await gpu_listing(api))


async def read_stats(api: Api) -> Response:
    """Host, GPU and queue figures in one answer."""
    active = api.supervisor.list(include_ended=False)
    queues = api.queues()
    listing = await gpu_listing(api)
    host = await asyncio.to_thread(host_stats, api.settings.state_dir)
    stats = Stats(
        host=host,
        launches=dict(Counter(view.state for view in active)),
        gpus=dict(Counter(gpu.state for gpu in listing.data)),
        queues={
            model: views.load(report, oldest_wait_s=queues.longest(model))
            for model, report in api.gate.queues().items()
        },
        uptime_s=round(max(0.0, api.clock() - api.started_at), 3),
        idle=None if api.idle is None else idle_views.idle(api.idle.report()),
    )
    return answer(stats)


async def gpu_listing(api: Services) -> GpuListing:
    """All devices with their owners, for routes and metrics."""
    snapshot = await api.inventory.snapshot()
    own_pids = await api.supervisor.own_pids(snapshot)
    busy_bytes = api.settings.gpu_busy_bytes
    data: list[GpuInfo] = []
    for reading in snapshot.gpus:
        claims = api.ledger.claims_on(reading.gpu.uuid)
        shares = {owner: claim.share_milli / 1000 for owner, claim in claims.items()}
        condition = assess(reading, snapshot, api.ledger, api.gpus.unsettled, busy_bytes=busy_bytes, own_pids=own_pids)
        data.append(views.gpu(reading, snapshot.kind, condition, shares))
    return GpuListing(data=data, kind=snapshot.kind, unknown=snapshot.unknown, pids_trusted=snapshot.pids_trusted)


def host_stats(state_dir: Path) -> HostStats:
    """Figures of this host. Blocks on the file system."""
    memory = psutil.virtual_memory()
    return HostStats(
        cpu_count=os.cpu_count() or 1,
        load_1m=os.getloadavg()[0],
        memory_total_bytes=memory.total,
        memory_available_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(state_dir).free,
    )
