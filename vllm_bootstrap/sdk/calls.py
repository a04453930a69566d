"""Every call of the control plane as a value: what is sent, and how the answer is read.

Invariant: no input or output here; the sync and the async client both send these, so that the two cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from vllm_bootstrap.sdk.sse import ServerEvent
from vllm_bootstrap.wire import (
    API_VERSION,
    Deleted,
    GpuListing,
    Health,
    LaunchEvent,
    LaunchStatus,
    Listing,
    LogPage,
    ModelListing,
    Stats,
    StopResult,
    Version,
)

T = TypeVar("T")
EVENT_STREAM = "text/event-stream"


class RestartFields(TypedDict, total=False):
    """``policy`` is required by the daemon."""

    policy: Literal["never", "on-failure"]
    max_attempts: int
    backoff_s: float


class LaunchFields(TypedDict, total=False):
    """Everything that may go along with the model of a launch. What each means: ``docs/api.md``."""

    gpu_ids: list[int | str] | None
    gpu_count: int | None
    gpu_share: float | None
    served_model_name: str | None
    engine: str | None
    tensor_parallel_size: int | None
    pipeline_parallel_size: int | None
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] | None
    max_model_len: int | Literal["auto"] | None
    gpu_memory_utilization: float | None
    kv_cache_memory_bytes: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    quantization: str | None
    kv_cache_dtype: str | None
    revision: str | None
    tokenizer: str | None
    seed: int | None
    enforce_eager: bool | None
    enable_prefix_caching: bool | None
    trust_remote_code: bool | None
    extra_args: dict[str, Any]
    env: dict[str, str]
    replicas: int | Literal["per_gpu"] | None
    labels: dict[str, str]
    restart: RestartFields | Literal["never", "on-failure"] | None


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """``read`` makes the result out of the body. ``may_repeat``: sending it again does no harm, so a broken connection
    is tried once more. ``timeout_s`` None: the client's own."""

    method: str
    path: str
    read: Callable[[bytes], T]
    params: Mapping[str, str | int] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    may_repeat: bool = False


def base_headers(key: str | None, version: str) -> dict[str, str]:
    """What goes along with every call."""
    headers = {"x-api-version": API_VERSION, "user-agent": f"vllm-bootstrap-client/{version}"}
    return {**headers, "authorization": f"Bearer {key}"} if key else headers


_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)
_STATUS: TypeAdapter[LaunchStatus] = TypeAdapter(LaunchStatus)
_STATUSES: TypeAdapter[Listing[LaunchStatus]] = TypeAdapter(Listing[LaunchStatus])
_EVENTS: TypeAdapter[Listing[LaunchEvent]] = TypeAdapter(Listing[LaunchEvent])


def launch(model: str, fields: Mapping[str, Any], idempotency_key: str) -> Call[LaunchStatus]:
    """``fields`` that are None are left out."""
    body = {"model": model, **{name: value for name, value in fields.items() if value is not None}}
    headers = {"idempotency-key": idempotency_key}
    return Call("POST", "/launch", _STATUS.validate_json, body=body, headers=headers, may_repeat=True)


def status(launch_id: str) -> Call[LaunchStatus]:
    return Call("GET", f"/status/{_segment(launch_id)}", _STATUS.validate_json, may_repeat=True)


def launches(*, include_ended: bool, after: str | None, limit: int) -> Call[Listing[LaunchStatus]]:
    params = _given({"all": "true" if include_ended else None, "after": after, "limit": limit})
    return Call("GET", "/launches", _STATUSES.validate_json, params, may_repeat=True)


def events(launch_id: str, after: int, limit: int) -> Call[Listing[LaunchEvent]]:
    path = f"/status/{_segment(launch_id)}/events"
    return Call("GET", path, _EVENTS.validate_json, {"after": after, "limit": limit}, may_repeat=True)


def logs(
    launch_id: str, *, offset: int | None, limit: int | None, tail: int | None, attempt: int | None
) -> Call[LogPage]:
    params = _given({"offset": offset, "limit": limit, "tail": tail, "attempt": attempt})
    return Call("GET", f"/logs/{_segment(launch_id)}", LogPage.model_validate_json, params, may_repeat=True)


def stop(launch_id: str, *, wait: bool, force: bool, timeout_s: float) -> Call[StopResult]:
    params = _given({"wait": None if wait else "false", "force": "true" if force else None})
    path = f"/stop/{_segment(launch_id)}"
    patience = timeout_s if wait else None
    return Call("POST", path, StopResult.model_validate_json, params, timeout_s=patience, may_repeat=True)


def delete(launch_id: str) -> Call[Deleted]:
    return Call("DELETE", f"/launches/{_segment(launch_id)}", Deleted.model_validate_json)


def gpus() -> Call[GpuListing]:
    return Call("GET", "/gpus", GpuListing.model_validate_json, may_repeat=True)


def stats() -> Call[Stats]:
    return Call("GET", "/stats", Stats.model_validate_json, may_repeat=True)


def models() -> Call[ModelListing]:
    return Call("GET", "/v1/models", ModelListing.model_validate_json, may_repeat=True)


def version() -> Call[Version]:
    return Call("GET", "/version", Version.model_validate_json, may_repeat=True)


def healthz() -> Call[Health]:
    return Call("GET", "/healthz", Health.model_validate_json, may_repeat=True)


def raw(method: str, path: str, body: Any, timeout_s: float | None) -> Call[Any]:
    return Call(method, path, _ANYTHING.validate_json, body=body, timeout_s=timeout_s)


# -- streams: path, query and headers ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamCall:
    """A stream of server-sent events that can be taken up again after ``last_id``. ``pins_attempt``: which attempt it
    speaks about was the daemon's choice at first and must stay the same."""

    path: str
    params: Mapping[str, str | int]
    last_id: str | None = None
    pins_attempt: bool = False

    def headers(self) -> dict[str, str]:
        resume = {"last-event-id": self.last_id} if self.last_id is not None else {}
        return {"accept": EVENT_STREAM, **resume}


def follow_events(launch_id: str, after: int) -> StreamCall:
    return StreamCall(f"/status/{_segment(launch_id)}/events", {"after": after})


def follow_logs(launch_id: str, *, offset: int | None, tail: int | None, attempt: int | None) -> StreamCall:
    params = _given({"offset": offset, "tail": tail, "attempt": attempt})
    return StreamCall(f"/logs/{_segment(launch_id)}", params, pins_attempt=attempt is None)


def resumed(call: StreamCall, event: ServerEvent) -> StreamCall:
    """The same stream from behind ``event`` on; ``tail``, ``offset`` and ``after`` have done their work then."""
    if event.id is None:
        return call
    kept = {name: value for name, value in call.params.items() if name not in ("tail", "offset", "after")}
    if call.pins_attempt:
        kept["attempt"] = json.loads(event.data)["attempt"]
    return StreamCall(call.path, kept, event.id)


def _given(params: Mapping[str, str | int | None]) -> dict[str, str | int]:
    return {name: value for name, value in params.items() if value is not None}


def _segment(text: str) -> str:
    return quote(text, safe="")
