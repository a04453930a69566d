"""What of an engine may be reached through the proxy: an allow-list of (method, path) with scopes. PURE.

Invariant: a route that is not here does not exist for callers, whatever the engine serves: new versions of vLLM keep
adding open routes, among them ones that run code or stop the engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_bootstrap.auth.scopes import ADMIN, INFERENCE, MONITOR
from vllm_bootstrap.engines.versions import NEWEST, Version
from vllm_bootstrap.serving import EngineRoute

_ADMIN = frozenset({ADMIN})
_MONITOR = frozenset({MONITOR})
_ALWAYS: Version = (0, 0, 0)


def _infer(path: str, *, multipart: bool = False) -> EngineRoute:
    return EngineRoute("POST", path, INFERENCE, inference=True, multipart=multipart)


# Route and the vLLM release from which on it is known to be there.
_VLLM: tuple[tuple[EngineRoute, Version], ...] = (
    (EngineRoute("GET", "/health", INFERENCE), _ALWAYS),
    (EngineRoute("GET", "/version", INFERENCE), _ALWAYS),
    (EngineRoute("GET", "/v1/models", INFERENCE), _ALWAYS),
    (EngineRoute("GET", "/metrics", _MONITOR), _ALWAYS),
    (EngineRoute("POST", "/tokenize", INFERENCE), _ALWAYS),
    (EngineRoute("POST", "/detokenize", INFERENCE), _ALWAYS),
    (_infer("/v1/chat/completions"), _ALWAYS),
    (_infer("/v1/completions"), _ALWAYS),
    (_infer("/v1/embeddings"), _ALWAYS),
    (_infer("/v1/rerank"), _ALWAYS),
    (_infer("/v1/score"), _ALWAYS),
    (_infer("/v1/audio/transcriptions", multipart=True), _ALWAYS),
    (_infer("/v1/audio/translations", multipart=True), (0, 9, 2)),
    (_infer("/v1/responses"), (0, 10, 2)),
    (_infer("/v1/messages"), (0, 12, 0)),
    (_infer("/v1/messages/count_tokens"), (0, 18, 1)),
    (EngineRoute("GET", "/v1/realtime", INFERENCE, inference=True, websocket=True), (0, 18, 1)),
    (EngineRoute("POST", "/v1/load_lora_adapter", _ADMIN), _ALWAYS),
    (EngineRoute("POST", "/v1/unload_lora_adapter", _ADMIN), _ALWAYS),
)


def vllm_routes(version: Version = NEWEST) -> tuple[EngineRoute, ...]:
    """What a vLLM of ``version`` has of the allow-list."""
    return tuple(route for route, since in _VLLM if version >= since)


# For engines that keep responses. Those we start ourselves keep none (see ``vllm_command``).
_STORED = (
    EngineRoute("GET", "/v1/responses/*", INFERENCE),
    EngineRoute("POST", "/v1/responses/*/cancel", INFERENCE),
)


def known_routes() -> Mapping[str, EngineRoute]:
    """Every allow-listed route by ``METHOD /path``, for operators to name in the engines file."""
    return {f"{route.method} {route.path}": route for route in (*(route for route, _ in _VLLM), *_STORED)}


# What nearly every OpenAI-compatible server has; the default of an operator's own engines.
COMMON = tuple(
    known_routes()[name]
    for name in (
        "GET /health",
        "GET /v1/models",
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/embeddings",
    )
)
