"""Every call of the control plane as a value: what is sent, and how the answer is read.

Invariant: no input or output here; the sync and the async client both send these, so that the two cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, BinaryIO, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from vllm_bootstrap.sdk.failures import UnexpectedAnswer
from vllm_bootstrap.sdk.sse import ServerEvent
from vllm_bootstrap.wire import (
    API_VERSION,
    Deleted,
    GpuListing,
    Health,
    LaunchEvent,
    LaunchGroup,
    LaunchStatus,
    Listing,
    LogPage,
    ModelListing,
    Stats,
    StopResult,
    Version,
)
from vllm_bootstrap.wire_requests import ActivityEntry, CancelResult, RequestEntry, UsageListing

T = TypeVar("T")
Replicas = int | Literal["per_gpu"]
EVENT_STREAM = "text/event-stream"


class RestartFields(TypedDict, total=False):
    """``policy`` is required by the daemon."""

    policy: Literal["never", "on-failure"]
    max_attempts: int
    backoff_s: float


class LaunchFields(TypedDict, total=False):
    """Everything that may go along with the model of a launch but its replicas, on which depends what comes back. What
    each means: ``docs/api.md``."""

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
    sleep: Literal[0, 1, 2] | None
    extra_args: dict[str, Any]
    env: dict[str, str]
    labels: dict[str, str]
    restart: RestartFields | Literal["never", "on-failure"] | None


class RequestFilter(TypedDict, total=False):
    """Which requests under way are wanted. ``after``: the ``last_id`` of the page before."""

    state: Literal["reading", "queued", "running"] | None
    request_class: Literal["realtime", "batch"] | None
    model: str | None
    owner: str | None
    after: str | None
    limit: int


class ActivityFilter(TypedDict, total=False):
    """Which finished requests are wanted. ``status``: a number, or a hundred as ``4xx``. ``after``: the ``last_id`` of
    the page before."""

    model: str | None
    request_class: Literal["realtime", "batch"] | None
    owner: str | None
    status: int | str | None
    since: datetime | None
    after: str | None
    limit: int


@dataclass(frozen=True, slots=True)
class Form:
    """A file to be sent, read as it goes out, and what is said about it."""

    source: BinaryIO
    filename: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """``read`` makes the result out of the body. ``may_repeat``: sending it again does no harm, so a broken connection
    is tried once more. ``timeout_s`` None: the client's own."""

    method: str
    path: str
    read: Callable[[bytes], T]
    params: Mapping[str, str | int] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    form: Form | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    may_repeat: bool = False


def base_headers(key: str | None, version: str) -> dict[str, str]:
    """What goes along with every call."""
    headers = {"x-api-version": API_VERSION, "user-agent": f"vllm-bootstrap-client/{version}"}
    return {**headers, "authorization": f"Bearer {key}"} if key else headers


_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)
_STATUS_OR_GROUP: TypeAdapter[LaunchStatus | LaunchGroup] = TypeAdapter(LaunchGroup | LaunchStatus)
_STATUSES: TypeAdapter[Listing[LaunchStatus]] = TypeAdapter(Listing[LaunchStatus])
_EVENTS: TypeAdapter[Listing[LaunchEvent]] = TypeAdapter(Listing[LaunchEvent])
_REQUESTS: TypeAdapter[Listing[RequestEntry]] = TypeAdapter(Listing[RequestEntry])
_ACTIVITY: TypeAdapter[Listing[ActivityEntry]] = TypeAdapter(Listing[ActivityEntry])


def launch(
    model: str, fields: Mapping[str, Any], idempotency_key: str, replicas: Replicas | None = None
) -> Call[LaunchStatus | LaunchGroup]:
    """``fields`` that are None are left out."""
    known = {**fields, "replicas": replicas}
    body = {"model": model, **{name: value for name, value in known.items() if value is not None}}
    headers = {"idempotency-key": idempotency_key}
    return Call("POST", "/launch", _STATUS_OR_GROUP.validate_json, body=body, headers=headers, may_repeat=True)


def status(launch_id: str) -> Call[LaunchStatus]:
    def read(content: bytes) -> LaunchStatus:
        found = _STATUS_OR_GROUP.validate_json(content)
        if isinstance(found, LaunchGroup):
            raise UnexpectedAnswer(f"{launch_id} is a group of replicas: group() and wait_group() are for these.")
        return found

    return Call("GET", f"/status/{segment(launch_id)}", read, may_repeat=True)


def group(group_id: str) -> Call[LaunchGroup]:
    def read(content: bytes) -> LaunchGroup:
        found = _STATUS_OR_GROUP.validate_json(content)
        if isinstance(found, LaunchStatus):
            raise UnexpectedAnswer(f"{group_id} is a single launch: status() and wait_ready() are for these.")
        return found

    return Call("GET", f"/status/{segment(group_id)}", read, may_repeat=True)


def launches(
    *, include_ended: bool, after: str | None, limit: int, group: str | None = None
) -> Call[Listing[LaunchStatus]]:
    params = given({"all": "true" if include_ended else None, "group": group, "after": after, "limit": limit})
    return Call("GET", "/launches", _STATUSES.validate_json, params, may_repeat=True)


def events(launch_id: str, after: int, limit: int) -> Call[Listing[LaunchEvent]]:
    path = f"/status/{segment(launch_id)}/events"
    return Call("GET", path, _EVENTS.validate_json, {"after": after, "limit": limit}, may_repeat=True)


def logs(
    launch_id: str, *, offset: int | None, limit: int | None, tail: int | None, attempt: int | None
) -> Call[LogPage]:
    params = given({"offset": offset, "limit": limit, "tail": tail, "attempt": attempt})
    return Call("GET", f"/logs/{segment(launch_id)}", LogPage.model_validate_json, params, may_repeat=True)


def stop(launch_id: str, *, wait: bool, force: bool, timeout_s: float) -> Call[StopResult]:
    params = given({"wait": None if wait else "false", "force": "true" if force else None})
    path = f"/stop/{segment(launch_id)}"
    patience = timeout_s if wait else None
    return Call("POST", path, StopResult.model_validate_json, params, timeout_s=patience, may_repeat=True)


def delete(launch_id: str) -> Call[Deleted]:
    return Call("DELETE", f"/launches/{segment(launch_id)}", Deleted.model_validate_json)


def requests(wanted: RequestFilter) -> Call[Listing[RequestEntry]]:
    return Call("GET", "/requests", _REQUESTS.validate_json, _filter(wanted), may_repeat=True)


def cancel_request(request_id: str) -> Call[CancelResult]:
    return Call("POST", f"/requests/{segment(request_id)}/cancel", CancelResult.model_validate_json)


def activity(wanted: ActivityFilter) -> Call[Listing[ActivityEntry]]:
    return Call("GET", "/activity", _ACTIVITY.validate_json, _filter(wanted), may_repeat=True)


def usage(since: datetime | None) -> Call[UsageListing]:
    return Call("GET", "/usage", UsageListing.model_validate_json, _filter({"since": since}), may_repeat=True)


def _filter(wanted: Mapping[str, Any]) -> dict[str, str | int]:
    """A filter as query parameters."""
    named = {"class" if name == "request_class" else name: value for name, value in wanted.items()}
    if named.get("since") is not None:
        named["since"] = named["since"].astimezone().isoformat()
    return given(named)


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
    return StreamCall(f"/status/{segment(launch_id)}/events", {"after": after})


def follow_logs(launch_id: str, *, offset: int | None, tail: int | None, attempt: int | None) -> StreamCall:
    params = given({"offset": offset, "tail": tail, "attempt": attempt})
    return StreamCall(f"/logs/{segment(launch_id)}", params, pins_attempt=attempt is None)


def resumed(call: StreamCall, event: ServerEvent) -> StreamCall:
    """The same stream from behind ``event`` on; ``tail``, ``offset`` and ``after`` have done their work then."""
    if event.id is None:
        return call
    kept = {name: value for name, value in call.params.items() if name not in ("tail", "offset", "after")}
    if call.pins_attempt:
        kept["attempt"] = json.loads(event.data)["attempt"]
    return StreamCall(call.path, kept, event.id)


def given(params: Mapping[str, str | int | None]) -> dict[str, str | int]:
    """Query parameters without those that are left out."""
    return {name: value for name, value in params.items() if value is not None}


def segment(text: str) -> str:
    """``text`` as one segment of a path, whatever stands in it."""
    return quote(text, safe="")
