from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vllm_bootstrap.auth.guard import Pass
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ModelLoading, Unauthorized, UpstreamError
from vllm_bootstrap.gateway import headers
from vllm_bootstrap.gateway.familiar import FamiliarHeads, Memory
from vllm_bootstrap.gateway.head import Head, HeadLimits, parse_head
from vllm_bootstrap.gateway.targets import ToModel
from vllm_bootstrap.serving import Endpoint, Instance

INSTANCE = Instance(
    "l1", "l1", "vllm", "base", ("m",), Endpoint(uds="/x", credential="inner"), 1, (), priority_header=True
)


def head(*lines: str, query: str = "") -> Head:
    raw = "\r\n".join([f"POST /v1/x{query} HTTP/1.1", "Host: outer", *lines]) + "\r\n\r\n"
    return parse_head(raw.encode("latin-1"), HeadLimits())


def sent(of: Head, instance: Instance = INSTANCE, *, length: int | None = 5, cls: str = "realtime") -> list[str]:
    raw = headers.to_engine(of, "/v1/x", instance, body_length=length, request_id="r1", cls=cls)  # type: ignore[arg-type]
    assert raw.endswith(b"\r\n\r\n")
    return raw.decode("latin-1").split("\r\n")[:-2]


def test_what_an_engine_is_told_by_us() -> None:
    assert sent(head("Accept: a", "Content-Type: application/json", query="?q=1")) == [
        "POST /v1/x?q=1 HTTP/1.1",
        "host: localhost",
        "x-request-id: r1",
        "authorization: Bearer inner",
        "x-vllm-priority: 0",
        "content-length: 5",
        "accept: a",
        "content-type: application/json",
    ]


def test_another_engine() -> None:
    plain = Instance("l1", "l1", "x", "b", (), Endpoint(host="h", port=9, base_path="/base"), 1, ())
    assert sent(head(), plain, length=None) == ["POST /base/v1/x HTTP/1.1", "host: h:9", "x-request-id: r1"]


def test_a_familiar_head_is_rendered_once_for_each_engine_and_class_and_anew_for_an_engine_that_changed() -> None:
    first = head("Content-Length: 5", "Accept: a")
    permit = Pass(Principal("k", frozenset({"realtime"})), 1)
    memory = Memory(first, ToModel("/v1/x"), None, permit)
    again = replace(first, headers=memory.head.headers, memory=memory)
    assert sent(again) == sent(first)
    assert sent(again, cls="batch") == sent(first, cls="batch")
    known = dict(memory.rendered)
    assert len(known) == 2
    assert sent(again) == sent(first)
    assert all(memory.rendered[key] is value for key, value in known.items())
    restarted = replace(INSTANCE, endpoint=Endpoint(uds="/y", credential="another"))
    assert "authorization: Bearer another" in sent(again, restarted)
    for number in range(2 * headers.MOST_RENDERED):  # launches come and go, a head may be in use for months
        assert sent(again, replace(INSTANCE, launch_id=f"l{number}")) == sent(first)
    assert len(memory.rendered) <= headers.MOST_RENDERED


def test_a_familiar_head_brings_its_ids_to_the_engine() -> None:
    lines = ("Content-Length: 5", "Traceparent: 00-1", "Accept: a", "X-Request-Id: x", "tracestate: n={}")
    heads = FamiliarHeads(HeadLimits())
    heads.remember(head(*lines), ToModel("/v1/x"), None, Pass(Principal("k", frozenset({"realtime"})), 1))
    for number in range(3):
        plain = head(*(line.format(number) for line in lines))
        again = heads.read(plain.raw)
        assert again.memory is not None
        assert sorted(sent(again)) == sorted(sent(plain))
        assert sorted(sent(again, length=None)) == sorted(sent(plain, length=None))
        assert f"tracestate: n={number}" in sent(again)


def test_batch_goes_later() -> None:
    assert "x-vllm-priority: 100" in sent(head(), cls="batch")
    assert headers.priority("realtime") < headers.priority("batch")


@pytest.mark.parametrize(
    "line",
    [
        "Authorization: Bearer sk-secret", "X-Api-Key: sk-secret", "api-key: sk-secret", "Cookie: a=sk-secret",
        "Proxy-Authorization: sk-secret", "Proxy-Anything: sk-secret", "Origin: http://sk-secret",
        "Referer: http://sk-secret", "X-Forwarded-For: sk-secret", "X-Forwarded-Anything: sk-secret",
        "Forwarded: for=sk-secret", "X-Real-IP: sk-secret", "Via: sk-secret", "X-Vllm-Priority: -999999 sk-secret",
        "X-Priority: sk-secret", "X-data-parallel-rank: sk-secret", "X-Session-ID: sk-secret",
        "X-Request-Id: sk-secret", "TE: trailers, sk-secret", "Trailer: sk-secret", "Upgrade: h2c, sk-secret",
        "HTTP2-Settings: sk-secret", "Keep-Alive: sk-secret", "Proxy-Connection: sk-secret", "X_Api_Key: sk-secret",
        "x_vllm_priority: sk-secret", "X_Forwarded_For: sk-secret", "Sec-Fetch-Site: sk-secret",
        "X-HTTP-Method-Override: sk-secret",
    ],
)  # fmt: skip
def test_what_an_engine_never_sees(line: str) -> None:
    assert not [sent_line for sent_line in sent(head(line)) if "sk-secret" in sent_line]
    upgrade = headers.handshake_to_engine(head(line), "/v1/realtime", INSTANCE, request_id="r", cls="batch")
    assert b"sk-secret" not in upgrade


def test_what_connection_names_ends_here() -> None:
    lines = sent(head("Connection: x-mine, keep-alive,X-Other", "Connection: content-type", "X-Mine: 1", "x-other: 2",
                      "Content-Type: a", "X-Third: 3"))  # fmt: skip
    assert lines[6:] == ["x-third: 3"]


def test_our_own_headers_cannot_be_taken_away_by_connection() -> None:
    lines = sent(head("Connection: x-vllm-priority, authorization, x-request-id, host"))
    assert "x-vllm-priority: 0" in lines
    assert "authorization: Bearer inner" in lines


def test_underscores_alone_are_no_crime() -> None:
    assert "x_custom: 1" in sent(head("x_custom: 1"))


def test_a_websocket_handshake() -> None:
    of = head(
        "Connection: keep-alive, Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: k", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.sk-secret, other", "Origin: http://a",
        query="?model=m",
    )  # fmt: skip
    plain = Instance("l1", "l1", "x", "b", (), Endpoint(host="h", port=9), 1, ())
    raw = headers.handshake_to_engine(of, "/v1/realtime", INSTANCE, request_id="r1", cls="realtime")
    assert raw.decode().split("\r\n")[:-2] == [
        "POST /v1/realtime?model=m HTTP/1.1", "host: localhost", "x-request-id: r1", "authorization: Bearer inner",
        "connection: Upgrade", "upgrade: websocket", "x-vllm-priority: 0", "sec-websocket-key: k",
        "sec-websocket-version: 13", "sec-websocket-protocol: realtime, other",
    ]  # fmt: skip
    only_key = head("Sec-WebSocket-Protocol: openai-insecure-api-key.sk-secret")
    raw = headers.handshake_to_engine(only_key, "/v1/realtime", plain, request_id="r1", cls="realtime")
    assert b"protocol" not in raw
    assert b"priority" not in raw


def test_the_websocket_key_of_the_rfc() -> None:
    assert headers.websocket_accept(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def test_what_a_client_gets() -> None:
    answer = [
        (b"Content-Type", b"text/plain"), (b"Content-Length", b"9"), (b"Connection", b"X-Hop"), (b"X-Hop", b"1"),
        (b"Keep-Alive", b"1"), (b"Set-Cookie", b"a=b"), (b"Access-Control-Allow-Origin", b"*"),
        (b"X-Request-Id", b"engine"), (b"X-RateLimit-Limit", b"1"), (b"Date", b"today"), (b"X-Kept", b"\xe9"),
    ]  # fmt: skip
    own = b"x-own: 1\r\ncontent-length: 9\r\n"
    raw = headers.to_client(headers.answer_head(200, answer), own, close=True)
    assert raw.split(b"\r\n") == [
        b"HTTP/1.1 200 OK", b"Content-Type: text/plain", b"Date: today", b"X-Kept: \xe9", b"x-own: 1",
        b"content-length: 9", b"connection: close", b"", b"",
    ]  # fmt: skip
    assert b"connection" not in headers.to_client(headers.answer_head(599, []), b"", close=False)


def test_a_handshake_answer() -> None:
    raw = headers.handshake_to_client([(b"Upgrade", b"websocket"), (b"Sec-WebSocket-Accept", b"x")], b"")
    assert raw == (
        b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: x\r\n"
        b"connection: Upgrade\r\nupgrade: websocket\r\n\r\n"
    )


def test_trailers() -> None:
    assert headers.trailers_to_client([]) == b"0\r\n\r\n"
    found = headers.trailers_to_client([(b"X-Sum", b"1"), (b"Content-Length", b"5"), (b"Set-Cookie", b"a")])
    assert found == b"0\r\nX-Sum: 1\r\n\r\n"


@pytest.mark.parametrize("value", [b"abc", b"a-b_c.d:e", b"x" * 128])
def test_request_ids_that_are_taken(value: bytes) -> None:
    assert headers.valid_request_id(value) == value.decode()


@pytest.mark.parametrize("value", [None, b"", b"a b", b"x" * 129, b"a\xe9", b'"', b"a/b", b"a\n"])
def test_request_ids_that_are_not(value: bytes | None) -> None:
    assert headers.valid_request_id(value) is None


def test_errors() -> None:
    raw = headers.error_answer(ModelLoading("soon", retry_after=3), request_id="r1", close=True, own=[(b"x-own", b"1")])
    first, _, content = raw.partition(b"\r\n\r\n")
    lines = first.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 503 Service Unavailable"
    assert {b"retry-after: 3", b"x-request-id: r1", b"x-own: 1", b"x-api-version: v1", b"connection: close"} <= set(
        lines
    )
    assert b"content-length: %d" % len(content) in lines
    assert json.loads(content)["error"]["code"] == "model_loading"
    bare = headers.error_answer(Unauthorized(), request_id=None, close=False, body=False)
    assert bare.endswith(b"\r\n\r\n")
    assert b"www-authenticate: Basic" in bare
    assert b"x-request-id" not in bare
    assert b"connection" not in bare


def test_error_events() -> None:
    event = headers.error_event(UpstreamError("died"), at_boundary=True, anthropic=False)
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert json.loads(event[6:])["error"]["message"] == "died"
    assert headers.error_event(UpstreamError("died"), at_boundary=False, anthropic=False).startswith(b"\n\ndata: ")
    named = headers.error_event(UpstreamError("died"), at_boundary=True, anthropic=True)
    assert named.startswith(b"event: error\ndata: ")
    assert json.loads(named.partition(b"data: ")[2])["type"] == "error"


def test_a_stream_can_begin_before_its_engine() -> None:
    assert headers.stream_head("req_1", b"x-own: 1\r\n", close=False) == (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nx-request-id: req_1\r\n"
        b"x-accel-buffering: no\r\nx-own: 1\r\n\r\n"
    )
    assert headers.stream_head("req_1", b"", close=True).endswith(b"no\r\nconnection: close\r\n\r\n")


def test_what_every_answer_says_about_its_way() -> None:
    assert headers.own_headers("req_1", "l1", 17) == b"x-request-id: req_1\r\nx-launch-id: l1\r\nx-queue-ms: 17\r\n"


def test_an_engines_head_is_read_once_however_often_it_comes() -> None:
    answer = [(b"Content-Type", b"Text/Event-Stream; charset=utf-8"), (b"Connection", b"Date"), (b"X-A", b"1")]
    first = headers.answer_head(200, answer)
    assert headers.answer_head(200, list(answer)) is first
    assert headers.answer_head(201, answer) is not first
    assert (first.is_events, first.kind, first.drops_date, first.codings) == (True, b"text/event-stream", True, [])
    assert first.lines == b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\nX-A: 1\r\n"


def test_nothing_is_read_from_a_compressed_answer() -> None:
    plain = headers.answer_head(200, [(b"content-encoding", b"identity"), (b"content-type", b"application/json")])
    packed = headers.answer_head(200, [(b"content-encoding", b"gzip"), (b"content-type", b"text/event-stream")])
    assert (plain.kind, plain.drops_date) == (b"application/json", False)
    assert (packed.kind, packed.is_events) == (b"", False)
    coded = headers.answer_head(200, [(b"Transfer-Encoding", b" GZIP"), (b"transfer-encoding", b"chunked")])
    assert coded.codings == [b"gzip", b"chunked"]


def test_what_is_known_of_engines_heads_is_bounded() -> None:
    long = [(b"x-long", b"a" * headers.MOST_KEPT_BYTES)]
    assert headers.answer_head(200, long) is not headers.answer_head(200, long)
    dropped = [(b"set-cookie", b"a" * headers.MOST_KEPT_BYTES)]  # no client gets it, but it would be kept as well
    assert headers.answer_head(200, dropped) is not headers.answer_head(200, dropped)
    first = headers.answer_head(200, [(b"x-number", b"-1")])
    for number in range(headers.MOST_KEPT_HEADS):
        headers.answer_head(200, [(b"x-number", b"%d" % number)])
    assert headers.answer_head(200, [(b"x-number", b"-1")]) is not first
    assert len(headers._heads) <= headers.MOST_KEPT_HEADS
