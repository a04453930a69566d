"""The machine-readable description: what FastAPI knows of our routes, plus the data plane, which it never sees.

Invariant: every operation says which scopes it needs (``x-scopes``, empty for public ones), and the data plane is
described beside the control plane although it is served below ASGI. Pure functions of the registered routes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from vllm_bootstrap.api.registrar import Registered
from vllm_bootstrap.auth import scopes
from vllm_bootstrap.gateway.targets import BY_MODEL, STATEFUL

JSON_BODY, MULTIPART = "application/json", "multipart/form-data"


_SUMMARIES = {
    "/v1/chat/completions": "Chat completion",
    "/v1/completions": "Completion",
    "/v1/responses": "Response (OpenAI's newer form)",
    "/v1/embeddings": "Embeddings",
    "/v1/rerank": "Order documents by relevance",
    "/v1/score": "Score pairs of texts",
    "/v1/messages": "Message (Anthropic's form)",
    "/v1/messages/count_tokens": "Count the tokens of a message",
    "/v1/audio/transcriptions": "Speech to text",
    "/v1/audio/translations": "Speech to English text",
    "/v1/realtime": "Websocket for realtime audio (upgrade; the model is a query parameter)",
}
_STORED = {
    "GET": "A stored response, of the key that made it (engines that keep responses only)",
    "POST": "Cancel a response that is made in the background",
}
_STREAMING = frozenset({
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions",
    "/v1/audio/translations",
})  # fmt: skip
_PROXY = "Send a request to one launch, whatever model name it carries. Which paths exist depends on the engine."


@dataclass(frozen=True, slots=True)
class Operation:
    """A data-plane operation. ``path`` is OpenAPI's form."""

    method: str
    path: str
    summary: str
    scopes: frozenset[str]
    body: str | None = JSON_BODY
    streams: bool = False


def data_plane() -> list[Operation]:
    """Every operation that is served below ASGI: the routes by model name, and the proxy to one launch."""
    found = [
        Operation(
            route.method,
            route.path,
            _SUMMARIES[route.path],
            route.scopes,
            MULTIPART if route.multipart else JSON_BODY if route.method == "POST" else None,
            route.path in _STREAMING,
        )
        for route in BY_MODEL.values()
    ]
    for route in STATEFUL:
        path = route.path.replace("*", "{response_id}")
        found.append(Operation(route.method, path, _STORED[route.method], route.scopes, None, route.method == "GET"))
    proxy = "/proxy/{launch_id}/{upstream_path}"
    found.append(Operation("GET", proxy, _PROXY, scopes.INFERENCE | {scopes.MONITOR}, None))
    found.append(Operation("POST", proxy, _PROXY, scopes.INFERENCE | {scopes.ADMIN}, streams=True))
    return found


def describe(app: FastAPI, entries: Iterable[Registered]) -> dict[str, Any]:
    """The OpenAPI document. Takes tens of milliseconds; the caller keeps it."""
    document = get_openapi(
        title="vllm-bootstrap",
        version="v1",
        description="Launches, watches and stops engines on this box and carries OpenAI requests to them.",
        routes=app.routes,
    )
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "basic": {"type": "http", "scheme": "basic", "description": "Any user name, the key as password"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for operation in data_plane():
        document["paths"].setdefault(operation.path, {})[operation.method.lower()] = _data_plane(operation)
    for entry in entries:
        described = document["paths"].get(entry.path.replace(":path}", "}"), {}).get(entry.method.lower())
        if described is not None:
            _secure(described, frozenset() if entry.rule.public else entry.rule.scopes)
    return document


def _secure(described: dict[str, Any], needed: frozenset[str]) -> None:
    described["x-scopes"] = sorted(needed)
    described["security"] = [{"bearer": []}, {"basic": []}, {"x-api-key": []}] if needed else []


def _data_plane(operation: Operation) -> dict[str, Any]:
    answers: dict[str, Any] = {JSON_BODY: {"schema": {"type": "object"}}}
    if operation.streams:
        answers["text/event-stream"] = {"schema": {"type": "string"}}
    problem = {"$ref": "#/components/schemas/ErrorBody"}
    described: dict[str, Any] = {
        "tags": ["data plane"],
        "summary": operation.summary,
        "description": "Served by the engine; bodies pass unchanged. Headers in answers: `x-request-id`, "
        "`x-launch-id`, `x-queue-ms`.",
        "operationId": f"{operation.method}_{operation.path}".lower().strip("/").replace("/", "_"),
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in ("launch_id", "upstream_path", "response_id")
            if "{" + name + "}" in operation.path
        ],
        "responses": {
            "200": {"description": "The engine's answer", "content": answers},
            "default": {"description": "Refusal or failure", "content": {JSON_BODY: {"schema": problem}}},
        },
    }
    if operation.body is not None:
        schema = {"type": "object", "additionalProperties": True}
        described["requestBody"] = {"required": True, "content": {operation.body: {"schema": schema}}}
    _secure(described, operation.scopes)
    return described
