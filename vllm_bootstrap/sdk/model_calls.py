"""Every call about the catalogue as a value: what is sent, and how the answer is read; and when waiting is over.

Invariant: as in ``calls``, of which this is a part: no input or output here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO, Literal, TypedDict

from pydantic import TypeAdapter

from vllm_bootstrap.sdk.batch_calls import UPLOAD_TIMEOUT_S
from vllm_bootstrap.sdk.calls import Call, Form, StreamCall, given, segment
from vllm_bootstrap.sdk.failures import DownloadFailed, LoadFailed, PrefetchFailed
from vllm_bootstrap.wire import Listing
from vllm_bootstrap.wire_models import (
    AdapterInfo,
    AdapterRemoved,
    DownloadInfo,
    FilesRemoved,
    FitInfo,
    ModelFiles,
    ModelRemoved,
    ModelState,
    ModelStatus,
    ModelStatuses,
    PrefetchInfo,
)

UNLOAD_TIMEOUT_S = 300.0
CHECK_TIMEOUT_S = 120.0  # it may ask the hub for what is not on the daemon's disk
SLOWEST_LOAD_POLL_S = 0.5


class EntryFields(TypedDict, total=False):
    """What an entry of the catalogue may hold besides name and source. What each means: ``docs/models.md``."""

    revision: str | None
    aliases: list[str]
    engine: str | None
    args: Mapping[str, Any]
    extra_args: Mapping[str, Any]
    env: Mapping[str, str]
    gpus: Mapping[str, Any]
    replicas: int | Literal["per_gpu"]
    restart: Literal["never", "on-failure"]
    ttl: float | str | None
    pin: bool
    preload: bool
    priority: int
    max_parallel: int | None
    sleep: Literal[0, 1, 2]
    show_loading: bool
    defaults: Mapping[str, Any]
    strip: list[str]
    adapters: Mapping[str, Any]
    description: str | None


class ModelFilter(TypedDict, total=False):
    """Which models are wanted. ``after``: the ``last_id`` of the page before."""

    state: ModelState | None
    after: str | None
    limit: int


_ADAPTERS: TypeAdapter[Listing[AdapterInfo]] = TypeAdapter(Listing[AdapterInfo])


def models(wanted: ModelFilter) -> Call[ModelStatuses]:
    params: dict[str, str | int | None] = {**wanted}  # type: ignore[dict-item]
    return Call("GET", "/models", ModelStatuses.model_validate_json, given(params), may_repeat=True)


def model(name: str) -> Call[ModelStatus]:
    return Call("GET", _model(name), ModelStatus.model_validate_json, may_repeat=True)


def add(name: str, source: str, fields: EntryFields) -> Call[ModelStatus]:
    """``fields`` that are None are left out."""
    told = {field: value for field, value in fields.items() if value is not None}
    body = {**told, "name": name, "source": source}
    return Call("POST", "/models", ModelStatus.model_validate_json, body=body)


def remove(name: str) -> Call[ModelRemoved]:
    return Call("DELETE", _model(name), ModelRemoved.model_validate_json)


def load(name: str) -> Call[ModelStatus]:
    return Call("POST", f"{_model(name)}/load", ModelStatus.model_validate_json, may_repeat=True)


def unload(name: str, *, force: bool, timeout_s: float) -> Call[ModelStatus]:
    params = given({"force": "true" if force else None})
    read = ModelStatus.model_validate_json
    return Call("POST", f"{_model(name)}/unload", read, params, timeout_s=timeout_s, may_repeat=True)


def check(name: str, gpu_count: int | None, max_model_len: int | None) -> Call[FitInfo]:
    body = given({"gpu_count": gpu_count, "max_model_len": max_model_len})
    read = FitInfo.model_validate_json
    return Call("POST", f"{_model(name)}/check", read, body=body, timeout_s=CHECK_TIMEOUT_S, may_repeat=True)


def download(method: Literal["GET", "POST", "DELETE"], name: str) -> Call[DownloadInfo]:
    """Look at, begin, or give up."""
    return Call(method, f"{_model(name)}/download", DownloadInfo.model_validate_json, may_repeat=True)


def watch_download(name: str) -> StreamCall:
    return StreamCall(f"{_model(name)}/download", {})


def prefetch(method: Literal["GET", "POST", "DELETE"], name: str) -> Call[PrefetchInfo]:
    """Look at, begin, or give up."""
    return Call(method, f"{_model(name)}/prefetch", PrefetchInfo.model_validate_json, may_repeat=True)


def files(name: str) -> Call[ModelFiles]:
    return Call("GET", f"{_model(name)}/files", ModelFiles.model_validate_json, may_repeat=True)


def delete_files(name: str) -> Call[FilesRemoved]:
    return Call("DELETE", f"{_model(name)}/files", FilesRemoved.model_validate_json)


def adapters(name: str) -> Call[Listing[AdapterInfo]]:
    return Call("GET", f"{_model(name)}/adapters", _ADAPTERS.validate_json, may_repeat=True)


def upload_adapter(base: str, name: str, source: BinaryIO, filename: str) -> Call[AdapterInfo]:
    path, form = f"{_model(base)}/adapters", Form(source, filename, {"name": name})
    return Call("POST", path, AdapterInfo.model_validate_json, form=form, timeout_s=UPLOAD_TIMEOUT_S)


def delete_adapter(base: str, name: str) -> Call[AdapterRemoved]:
    return Call("DELETE", f"{_model(base)}/adapters/{segment(name)}", AdapterRemoved.model_validate_json)


def _model(name: str) -> str:
    return f"/models/{segment(name)}"


# -- when waiting is over ---------------------------------------------------------------------------------------------


class Loading:
    """One wait for a model to be loaded."""

    def __init__(self) -> None:
        self._begun = False

    def is_over(self, status: ModelStatus) -> bool:
        """Raises ``LoadFailed`` when it has failed, or was put away again before it was loaded."""
        if status.state == "failed" or (self._begun and status.state in {"unloaded", "asleep"}):
            raise LoadFailed(status)
        self._begun = self._begun or status.state in {"loading", "waking"}
        return status.state == "loaded"


def is_fetched(info: DownloadInfo) -> bool:
    """Raises ``DownloadFailed`` when it ended any other way."""
    if info.state in {"failed", "cancelled"}:
        raise DownloadFailed(info)
    return info.state == "completed"


def is_read(info: PrefetchInfo) -> bool:
    """Raises ``PrefetchFailed`` when it ended any other way."""
    if info.state in {"failed", "cancelled"}:
        raise PrefetchFailed(info)
    return info.state == "completed"
