"""Is an engine ready, is it healthy, what does it count? Questions over HTTP with bounded cost.

Invariant: ``ready`` never says yes on a log line or a health answer alone: the served name must be listed and a
request that fits the model's task must have been answered. Nothing here decides about states.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_bootstrap.engines.client import EngineClient, ProbeError, Reply
from vllm_bootstrap.engines.metrics_text import Counters, parse_counters
from vllm_bootstrap.serving import Endpoint

__all__ = ["Counters", "EngineClient", "ProbeError", "Reply", "counters", "healthy", "ready"]

# The first request may still compile kernels, so it may take longer than a health answer.
TASK_TIMEOUT_S = 60.0
# Statuses that say "this model does not do that" rather than "I am broken".
_DOES_NOT_FIT = frozenset({400, 404, 405, 415, 422, 501})
_BOUNDARY = "probe-boundary"


@dataclass(frozen=True, slots=True)
class _Task:
    """A smallest possible request of one kind of model."""

    path: str
    fields: dict[str, Any]
    audio: bool = False


_TASKS: Sequence[_Task] = (
    _Task("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}),
    _Task("/v1/completions", {"prompt": "Hi", "max_tokens": 1}),
    _Task("/v1/embeddings", {"input": "Hi"}),
    _Task("/v1/score", {"text_1": "Hi", "text_2": "Hi"}),
    _Task("/classify", {"input": "Hi"}),
    _Task("/pooling", {"input": "Hi"}),
    _Task("/v1/audio/transcriptions", {}, audio=True),
)


async def ready(
    endpoint: Endpoint,
    served_name: str,
    timeout_s: float,
    *,
    task_timeout_s: float = TASK_TIMEOUT_S,
    health_path: str = "/health",
) -> str | None:
    """None when the engine serves ``served_name``, else why not, in words for people.

    ``timeout_s`` bounds each of the two cheap questions, ``task_timeout_s`` the request to the model. Never raises;
    idempotent; costs one token.
    """
    client = EngineClient(endpoint)
    try:
        health = await client.request("GET", health_path, timeout_s=timeout_s)
        if health.status != 200:
            return f"{health_path} answered {health.status}"
        listed = await client.request("GET", "/v1/models", timeout_s=timeout_s)
        names = _names(listed)
        if served_name not in names:
            return f"/v1/models ({listed.status}) does not list {served_name!r} but {sorted(names)[:10]}"
        return await _does_its_task(client, served_name, task_timeout_s)
    except ProbeError as exc:
        return str(exc)


async def healthy(endpoint: Endpoint, timeout_s: float, *, health_path: str = "/health") -> bool:
    """Whether the health route answers 200 in time. Never raises. It says little: vLLM's answers while it hangs."""
    try:
        reply = await EngineClient(endpoint).request("GET", health_path, timeout_s=timeout_s)
    except ProbeError:
        return False
    return reply.status == 200


async def counters(endpoint: Endpoint, timeout_s: float) -> Counters | None:
    """The engine's counters, None when they could not be read. Never raises."""
    try:
        reply = await EngineClient(endpoint).request("GET", "/metrics", timeout_s=timeout_s)
    except ProbeError:
        return None
    return parse_counters(reply.body.decode("utf-8", "replace")) if reply.status == 200 else None


def _names(reply: Reply) -> set[str]:
    body = reply.json()
    data = body.get("data") if reply.status == 200 and isinstance(body, dict) else None
    return {str(model.get("id")) for model in data if isinstance(model, dict)} if isinstance(data, list) else set()


async def _does_its_task(client: EngineClient, served_name: str, timeout_s: float) -> str | None:
    """Try the tasks in turn: the first that fits must succeed. A model that does none of them is not ready."""
    refusals = []
    for task in _TASKS:
        content_type, body = _body(task, served_name)
        reply = await client.request("POST", task.path, body, timeout_s=timeout_s, content_type=content_type)
        if reply.status == 200:
            return None
        if reply.status not in _DOES_NOT_FIT:
            return f"{task.path} answered {reply.status}: {reply.body[:200].decode('utf-8', 'replace')}"
        refusals.append(f"{task.path} {reply.status}")
    return f"no kind of request fits this model: {', '.join(refusals)}"


def _body(task: _Task, served_name: str) -> tuple[str, bytes]:
    if task.audio:
        return f"multipart/form-data; boundary={_BOUNDARY}", _upload(served_name)
    return "application/json", json.dumps({"model": served_name, **task.fields}).encode()


def _upload(served_name: str) -> bytes:
    """A form with the model's name and a tenth of a second of silence."""
    name = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{served_name}\r\n'
    file = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="silence.wav"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    )
    return name.encode() + file.encode() + _SILENCE + f"\r\n--{_BOUNDARY}--\r\n".encode()


# RIFF header for 1600 samples of 16 bit mono at 16 kHz, then zeros.
_SILENCE = base64.b64decode("UklGRqQMAABXQVZFZm10IBAAAAABAAEAgD4AAAB9AAACABAAZGF0YYAMAAA=") + bytes(3200)
