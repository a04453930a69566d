"""Fault 39: what of an engine can be reached at all."""

import pytest

from vllm_bootstrap.auth.scopes import ADMIN, BATCH, MONITOR, REALTIME
from vllm_bootstrap.engines.capabilities import recorded_versions
from vllm_bootstrap.engines.routes import COMMON, known_routes, vllm_routes

INFERENCE = frozenset({REALTIME, BATCH})
# The whole surface of the newest vLLM, written out a second time on purpose.
EXPECTED = {
    "GET /health": (INFERENCE, ""),
    "GET /version": (INFERENCE, ""),
    "GET /v1/models": (INFERENCE, ""),
    "GET /metrics": (frozenset({MONITOR}), ""),
    "POST /tokenize": (INFERENCE, ""),
    "POST /detokenize": (INFERENCE, ""),
    "POST /v1/chat/completions": (INFERENCE, "inference"),
    "POST /v1/completions": (INFERENCE, "inference"),
    "POST /v1/responses": (INFERENCE, "inference"),
    "POST /v1/messages": (INFERENCE, "inference"),
    "POST /v1/messages/count_tokens": (INFERENCE, "inference"),
    "POST /v1/embeddings": (INFERENCE, "inference"),
    "POST /v1/rerank": (INFERENCE, "inference"),
    "POST /v1/score": (INFERENCE, "inference"),
    "POST /v1/audio/transcriptions": (INFERENCE, "inference multipart"),
    "POST /v1/audio/translations": (INFERENCE, "inference multipart"),
    "GET /v1/realtime": (INFERENCE, "inference websocket"),
    "POST /v1/load_lora_adapter": (frozenset({ADMIN}), ""),
    "POST /v1/unload_lora_adapter": (frozenset({ADMIN}), ""),
}

# Only for engines that keep responses; those started here keep none.
KEPT = {"GET /v1/responses/*", "POST /v1/responses/*/cancel"}


def traits(route):
    return " ".join(name for name in ("inference", "multipart", "websocket") if getattr(route, name))


def test_the_allow_list_is_exactly_this():
    found = {f"{r.method} {r.path}": (r.scopes, traits(r)) for r in vllm_routes()}
    assert found == EXPECTED
    assert known_routes().keys() == EXPECTED.keys() | KEPT


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/collective_rpc",
        "/sleep",
        "/wake_up",
        "/pause",
        "/resume",
        "/load",
        "/ping",
        "/docs",
        "/openapi.json",
        "/server_info",
        "/start_profile",
        "/scale_elastic_ep",
        "/abort_requests",
        "/v1/responses/{id}",
        "/inference/v1/generate",
        "/reset_prefix_cache",
    ],
)
def test_what_can_stop_or_take_over_an_engine_is_absent(path):
    assert all(route.path != path for route in vllm_routes())


@pytest.mark.parametrize(
    ("path", "since"),
    [
        ("/v1/audio/translations", (0, 9, 2)),
        ("/v1/responses", (0, 10, 2)),
        ("/v1/messages", (0, 12, 0)),
        ("/v1/messages/count_tokens", (0, 18, 1)),
        ("/v1/realtime", (0, 18, 1)),
        ("/v1/chat/completions", (0, 8, 5)),
    ],
)
def test_routes_appear_with_their_version(path, since):
    for version in recorded_versions():
        assert any(route.path == path for route in vllm_routes(version)) == (version >= since), version


def test_common_routes_are_a_part_of_them():
    assert set(COMMON) < set(vllm_routes())
