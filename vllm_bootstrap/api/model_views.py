"""The catalogue's values to wire types. Pure functions; times become RFC 3339 in UTC here."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from vllm_bootstrap.api.views import when
from vllm_bootstrap.models.types import (
    AdapterView,
    DownloadView,
    FitReport,
    ModelEntry,
    ModelProgress,
    ModelTrouble,
    ModelView,
    OnDisk,
    PrefetchView,
)
from vllm_bootstrap.wire import Progress
from vllm_bootstrap.wire_models import (
    AdapterInfo,
    AdapterSpec,
    DownloadInfo,
    FitInfo,
    GpuWish,
    ModelFailure,
    ModelFiles,
    ModelLaunch,
    ModelStatus,
    PrefetchInfo,
    StoredFile,
)
from vllm_bootstrap.wire_models import ModelEntry as ShownEntry

_SAME = (
    "source", "revision", "engine", "replicas", "restart", "pin", "preload", "priority", "max_parallel", "sleep",
    "show_loading", "description",
)  # fmt: skip


def model(view: ModelView, download: DownloadView | None = None, prefetch: PrefetchView | None = None) -> ModelStatus:
    """A model as shown, with the newest download and prefetch of it."""
    return ModelStatus(
        name=view.entry.name,
        state=view.state,
        origin=view.entry.origin,
        why=view.why,
        entry=entry(view.entry),
        launches=[ModelLaunch.model_validate(launch._asdict()) for launch in view.launches],
        group_id=view.group_id,
        progress=_progress(view.progress),
        failure=_failure(view.trouble),
        load_est_s=view.load_est_s,
        wake_est_s=view.wake_est_s,
        waiting=dict(view.waiting),
        in_flight=view.in_flight,
        batch_lines=view.batch_lines,
        idle_s=None if view.idle_s is None else round(view.idle_s, 3),
        loaded_at=when(view.loaded_at),
        outdated=view.outdated,
        download=None if download is None else download_info(download),
        prefetch=None if prefetch is None else prefetch_info(prefetch),
    )


def entry(found: ModelEntry) -> ShownEntry:
    """An entry as shown: of its environment only the names."""
    same: dict[str, Any] = {name: getattr(found, name) for name in _SAME}
    return ShownEntry(
        **same,
        aliases=list(found.aliases),
        args=dict(found.args),
        extra_args=dict(found.extra_args),
        env=sorted(found.env),
        gpus=GpuWish(
            count=found.gpus.count,
            ids=None if found.gpus.ids is None else list(found.gpus.ids),
            min_memory=found.gpus.min_memory,
            share=found.gpus.share,
        ),
        ttl=found.ttl_s,
        defaults=dict(found.rewrite.defaults),
        strip=sorted(found.rewrite.strip),
        adapters={one.name: AdapterSpec(source=one.source, aliases=list(one.aliases)) for one in found.adapters},
    )


def _progress(found: ModelProgress | None) -> Progress | None:
    if found is None:
        return None
    return Progress(
        phase=found.phase,
        fraction=found.fraction,
        detail=found.detail,
        elapsed_s=found.elapsed_s,
        eta_s=found.eta_s,
    )


def _failure(found: ModelTrouble | None) -> ModelFailure | None:
    if found is None:
        return None
    return ModelFailure(
        failure_class=found.failure_class,
        message=found.message,
        hint=found.hint,
        at=datetime.fromtimestamp(found.at, UTC),
        retry_at=when(found.retry_at),
        launch_id=found.launch_id,
    )


def fit(report: FitReport) -> FitInfo:
    return FitInfo.model_validate({**asdict(report), "suggestions": [dict(one) for one in report.suggestions]})


def download_info(view: DownloadView) -> DownloadInfo:
    return DownloadInfo(
        id=view.id,
        model=view.model,
        repo=view.repo,
        revision=view.revision,
        commit=view.commit,
        owner=view.owner,
        state=view.state,
        bytes_done=view.bytes_done,
        bytes_total=view.bytes_total,
        files_done=view.files_done,
        files_total=view.files_total,
        bytes_per_s=view.rate,
        eta_s=view.eta_s,
        error=view.error,
        hint=view.hint,
        created_at=datetime.fromtimestamp(view.created_at, UTC),
        ended_at=when(view.ended_at),
    )


def prefetch_info(view: PrefetchView) -> PrefetchInfo:
    return PrefetchInfo(
        model=view.model,
        state=view.state,
        bytes_done=view.bytes_done,
        bytes_total=view.bytes_total,
        seconds=round(view.seconds, 3),
        method=view.method,
        error=view.error,
    )


def files(name: str, found: OnDisk) -> ModelFiles:
    return ModelFiles(
        model=name,
        source=found.source,
        path=found.path,
        commit=found.commit,
        bytes=found.bytes,
        complete=found.complete,
        incomplete_bytes=found.incomplete_bytes,
        cached_bytes=found.cached_bytes,
        files=[StoredFile(path=one.path, bytes=one.bytes, cached_bytes=one.cached_bytes) for one in found.files],
    )


def adapter(view: AdapterView) -> AdapterInfo:
    return AdapterInfo(
        name=view.name,
        base=view.base,
        owner=view.owner,
        bytes=view.bytes,
        rank=view.rank,
        created_at=datetime.fromtimestamp(view.created_at, UTC),
    )
