from __future__ import annotations

import math
from dataclasses import replace

import pytest

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.gateway import GatewayLimits, targets
from vllm_bootstrap.gateway.head import Head
from vllm_bootstrap.gateway.targets import ToLaunch, ToModel
from vllm_bootstrap.serving import EngineRoute


@pytest.mark.parametrize(
    ("method", "path", "target"),
    [
        ("POST", "/v1/chat/completions", ToModel("/v1/chat/completions")),
        ("GET", "/v1/unknown", ToModel("/v1/unknown")),
        ("POST", "/v1/models", ToModel("/v1/models")),
        ("GET", "/v1/models", None),
        ("HEAD", "/v1/models", None),
        ("GET", "/v1/models/org/model", None),
        ("GET", "/v1/models/org%2Fmodel", None),
        ("GET", "/v1/modelsx", ToModel("/v1/modelsx")),
        ("POST", "/proxy/abc/v1/completions", ToLaunch("abc", "/v1/completions")),
        ("GET", "/proxy/abc/health", ToLaunch("abc", "/health")),
        ("GET", "/proxy/abc/", ToLaunch("abc", "/")),
        ("GET", "/proxy/abc", ToLaunch("abc", "/")),
        ("GET", "/", None),
        ("GET", "/v1", None),
        ("GET", "/proxy", None),
        ("POST", "/launch", None),
        ("POST", "/V1/completions", None),
        ("GET", "/proxyabc/x", None),
    ],
)
def test_where_a_request_goes(method: str, path: str, target: object) -> None:
    assert targets.find(method, path) == target


@pytest.mark.parametrize("path", ["/v1/chat%2Fcompletions", "/proxy/a%62c/health", '/v1/a"b', "/v1/a%20"])
def test_data_plane_paths_have_one_spelling(path: str) -> None:
    with pytest.raises(BadRequest):
        targets.find("POST", path)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "path", ["/v1/files", "/v1/files/file-1/content", "/v1/batches", "/v1/batches/b/cancel", "/v1/batch/completions"]
)
def test_durable_work_belongs_to_the_control_plane_whatever_the_method(method: str, path: str) -> None:
    assert targets.find(method, path) is None
    assert targets.file_brought(method, path) == ("file" if (method, path) == ("POST", "/v1/files") else None)


@pytest.mark.parametrize("path", ["/v1/filesystem", "/v1/batched", "/v1/files-1", "/v1/x/files"])
def test_what_only_looks_like_it_does_not(path: str) -> None:
    assert targets.find("POST", path) == ToModel(path)


@pytest.mark.parametrize(
    ("method", "path", "brought"),
    [
        ("POST", "/models/org/chat/adapters", "adapter"),
        ("POST", "/models/org%2Fchat/adapters", "adapter"),
        ("GET", "/models/org/chat/adapters", None),
        ("POST", "/models/adapters", None),
        ("POST", "/models/org/chat/adapters/one", None),
        ("POST", "/models", None),
    ],
)
def test_adapters_may_be_longer_than_other_bodies(method: str, path: str, brought: str | None) -> None:
    assert targets.file_brought(method, path) == brought
    limits = GatewayLimits(max_control_body_bytes=1, max_file_body_bytes=2, max_adapter_body_bytes=3)
    assert limits.of_body(targets.file_brought(method, path)) == (3 if brought else 1)
    assert limits.of_body("file") == 2


def test_rules_come_from_routes() -> None:
    plain = EngineRoute("POST", "/a", frozenset({"realtime"}))
    form = EngineRoute("POST", "/a", frozenset({"realtime"}), multipart=True)
    assert targets.rule_of(plain).media == ("application/json",)
    assert targets.rule_of(form).media == ("multipart/form-data",)
    assert targets.rule_of(plain).scopes == {"realtime"}
    assert targets.rule_of(plain) is targets.rule_of(plain)


def key(*scopes: str, max_class: str | None = None) -> Principal:
    return Principal("k", frozenset(scopes), max_class=max_class)


@pytest.mark.parametrize(
    ("principal", "asked", "cls"),
    [
        (key("realtime"), None, "realtime"),
        (key("realtime", "batch"), None, "realtime"),
        (key("admin"), None, "realtime"),
        (key("batch"), None, "batch"),
        (key("batch"), b"realtime", "batch"),
        (key("realtime"), b"batch", "batch"),
        (key("realtime"), b"realtime", "realtime"),
        (key("realtime", max_class="batch"), b"realtime", "batch"),
        (key("realtime", max_class="realtime"), None, "realtime"),
    ],
)
def test_classes(principal: Principal, asked: bytes | None, cls: str) -> None:
    assert targets.request_class(principal, asked) == cls


@pytest.mark.parametrize("word", [b"", b"high", b"-999999", b"REALTIME"])
def test_an_unknown_priority_is_refused(word: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        targets.request_class(key("realtime"), word)
    assert refused.value.param == "x-priority"


@pytest.mark.parametrize(
    ("own", "word", "hold", "shows"),
    [
        (None, None, None, False),
        (5.0, None, 5.0, False),
        (0.0, None, 0.0, False),
        (None, b"error", 0.0, False),
        (5.0, b"error", 0.0, False),
        (None, b"wait", None, False),
        (5.0, b"wait", 5.0, False),
        (0.0, b"wait", None, False),
        (None, b"progress", math.inf, True),
        (5.0, b"progress", 5.0, True),
        (0.0, b"progress", math.inf, True),
    ],
)
def test_for_how_long_a_cold_start_is_waited_for(
    own: float | None, word: bytes | None, hold: float | None, shows: bool
) -> None:
    principal = replace(key("realtime"), cold_start_hold_s=own)
    assert targets.cold_start(principal, word) == (hold, shows)


@pytest.mark.parametrize("word", [b"", b"WAIT", b"30", b"wait, error"])
def test_an_unknown_word_about_cold_starts_is_refused(word: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        targets.cold_start(key("realtime"), word)
    assert refused.value.param == "x-cold-start"


def handshake(query: bytes) -> Head:
    return Head("GET", "/v1/realtime", query, 1, [])


def test_the_model_of_a_websocket() -> None:
    assert targets.model_in_query(handshake(b"model=org%2Fm&x=y")) == "org/m"
    assert targets.model_in_query(handshake(b"")) is None
    with pytest.raises(BadRequest):
        targets.model_in_query(handshake(b"model=a&model=b"))
    with pytest.raises(BadRequest):
        targets.model_in_query(handshake(b"&".join(b"a=b" for _ in range(60))))


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/responses/resp_1", "GET"),
        ("/v1/responses/resp_1/cancel", "POST"),
        ("/v1/responses/resp_1/input_items", None),
        ("/v1/responses/", None),
        ("/v1/responses", None),
        ("/v1/chat/completions", None),
    ],
)
def test_paths_of_one_stored_response(path: str, method: str | None) -> None:
    route = targets.stateful(path)
    assert (None if route is None else route.method) == method
