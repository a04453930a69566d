"""Which headers cross the gateway, in both directions, and the bytes of heads and error answers. PURE.

Invariant: an engine never sees a client's key, cookies, claims about where it came from, or anything that would set
priority or routing; a client never sees an engine's hop-by-hop headers, cookies or cross-origin grants. Hop-by-hop
headers end here, those named in ``Connection`` included. Knows no sockets and no bodies beyond their framing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from http import HTTPStatus

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gateway.head import Head, Headers
from vllm_bootstrap.serving import Endpoint, Instance, RequestClass

HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    b"http2-settings", b"proxy-authenticate", b"proxy-authorization",
})  # fmt: skip

_NOT_TO_ENGINE = HOP_BY_HOP | {
    # ours to say
    b"host", b"content-length", b"expect", b"x-request-id", b"content-encoding",
    # credentials and what a browser adds
    b"authorization", b"x-api-key", b"api-key", b"cookie", b"origin", b"referer",
    # claims about the client
    b"forwarded", b"via", b"x-real-ip", b"true-client-ip", b"cf-connecting-ip", b"client-ip", b"x-original-url",
    b"x-rewrite-url", b"x-http-method-override", b"x-http-method", b"x-method-override",
    # priority and routing
    b"x-vllm-priority", b"x-priority", b"x-data-parallel-rank", b"x-session-id", b"x-launch-id", b"x-queue-ms",
    b"x-cold-start",
}  # fmt: skip
_NOT_TO_ENGINE_PREFIXES = (b"x-forwarded-", b"proxy-", b"sec-fetch-")

_NOT_TO_CLIENT = HOP_BY_HOP | {
    b"content-length", b"x-request-id", b"x-launch-id", b"x-queue-ms", b"set-cookie", b"alt-svc",
    b"strict-transport-security",
}  # fmt: skip
_NOT_TO_CLIENT_PREFIXES = (b"access-control-", b"x-ratelimit-")
_NOT_IN_TRAILERS = _NOT_TO_CLIENT | {b"content-type", b"content-encoding", b"content-range", b"host", b"authorization"}

MOST_KEPT_HEADS = 256
MOST_KEPT_BYTES = 2048
"""Of one head of an engine's answer: together these bound what remembering them costs."""

MOST_RENDERED = 32
"""Launches, by class, for which one familiar head is kept as they get it."""

_NOTHING: frozenset[bytes] = frozenset()
_PRIORITY: dict[RequestClass, int] = {"realtime": 0, "batch": 100}
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_SUBPROTOCOL_KEY = b"openai-insecure-api-key."


def _status_line(status: int) -> bytes:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(100, 1000)}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def priority(cls: RequestClass) -> int:
    """The engine's own priority of a class: lower goes first."""
    return _PRIORITY[cls]


def valid_request_id(value: bytes | None) -> str | None:
    """A client's request id when it is harmless in logs and headers, else None."""
    return value.decode() if value is not None and _REQUEST_ID.fullmatch(value) else None


def connection_options(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Header names listed in ``Connection``."""
    found = [value for name, value in headers if name.lower() == b"connection"]
    return frozenset(token.strip().lower() for value in found for token in value.split(b",")) if found else _NOTHING


def to_engine(
    head: Head, path: str, instance: Instance, *, body_length: int | None, request_id: str, cls: RequestClass
) -> bytes:
    """The head to send to an engine. ``body_length`` None: a request without a body."""
    memory = head.memory
    known = memory.rendered.get((instance.launch_id, cls)) if memory is not None else None
    if known is None or known[0] is not instance:
        known = (instance, *_around_the_id(head, path, instance, cls))
        if memory is not None:
            if len(memory.rendered) >= MOST_RENDERED:  # launches come and go, heads stay
                memory.rendered.clear()
            memory.rendered[instance.launch_id, cls] = known
    _, before, between, after = known
    if body_length is None:
        return b"%b%b%b%b%b" % (before, request_id.encode("ascii"), between, head.traces, after)
    return b"%b%b%bcontent-length: %d\r\n%b%b" % (
        before, request_id.encode("ascii"), between, body_length, head.traces, after,
    )  # fmt: skip


def _around_the_id(head: Head, path: str, instance: Instance, cls: RequestClass) -> tuple[bytes, bytes, bytes]:
    """What of a head to an engine is the same for every request with this head: up to the request's id, up to the
    body's length, and the rest."""
    between = [b"\r\n", *_credential(instance.endpoint)]
    if instance.priority_header:
        between.append(b"x-vllm-priority: %d\r\n" % priority(cls))
    after: list[bytes] = []
    dropped = connection_options(head.headers)
    for name, value in head.headers:
        if name not in dropped and may_pass(name):
            after += (name, b": ", value, b"\r\n")
    after.append(b"\r\n")
    return _beginning(head, path, instance.endpoint), b"".join(between), b"".join(after)


def handshake_to_engine(head: Head, path: str, instance: Instance, *, request_id: str, cls: RequestClass) -> bytes:
    """The head of a websocket handshake to send to an engine."""
    out = [_beginning(head, path, instance.endpoint), request_id.encode("ascii"), b"\r\n"]
    out += _credential(instance.endpoint)
    out.append(b"connection: Upgrade\r\nupgrade: websocket\r\n")
    if instance.priority_header:
        out.append(b"x-vllm-priority: %d\r\n" % priority(cls))
    dropped = connection_options(head.headers)
    for name, value in head.headers:
        if name == b"sec-websocket-protocol":
            # Browsers can send a key nowhere else; the engine must not see it.
            offers = [offer.strip() for offer in value.split(b",")]
            value = b", ".join(offer for offer in offers if not offer.startswith(_SUBPROTOCOL_KEY))  # noqa: PLW2901
            if not value:
                continue
        if name not in dropped and may_pass(name):
            out += (name, b": ", value, b"\r\n")
    out.append(b"\r\n")
    return b"".join(out)


def _request_line(head: Head, path: str, endpoint: Endpoint) -> bytes:
    query = b"?" + head.query if head.query else b""
    return b"%b %b%b HTTP/1.1\r\n" % (head.method.encode(), (endpoint.base_path + path).encode("ascii"), query)


def _beginning(head: Head, path: str, endpoint: Endpoint) -> bytes:
    host = endpoint.authority.encode("ascii")
    return b"%bhost: %b\r\nx-request-id: " % (_request_line(head, path, endpoint), host)


def _credential(endpoint: Endpoint) -> list[bytes]:
    if endpoint.credential is None:
        return []
    return [b"authorization: Bearer %b\r\n" % endpoint.credential.encode("ascii")]


@functools.lru_cache(maxsize=1024)
def may_pass(name: bytes) -> bool:
    """Whether an engine may see a header. Some servers take ``_`` for ``-``, so both spellings count as one."""
    plain = name.replace(b"_", b"-")
    return plain not in _NOT_TO_ENGINE and not plain.startswith(_NOT_TO_ENGINE_PREFIXES)


def stream_head(request_id: str, own: bytes, *, close: bool) -> bytes:
    """The head of an event stream that begins before any engine has answered. ``own``: finished header lines."""
    return b"%bcontent-type: text/event-stream; charset=utf-8\r\nx-request-id: %b\r\nx-accel-buffering: no\r\n%b%b" % (
        STATUS_LINES[200], request_id.encode("ascii"), own, b"connection: close\r\n\r\n" if close else b"\r\n",
    )  # fmt: skip


def own_headers(request_id: str, launch_id: str, queue_ms: int) -> bytes:
    """What every relayed answer says about its way here, as lines."""
    return b"x-request-id: %b\r\nx-launch-id: %b\r\nx-queue-ms: %d\r\n" % (
        request_id.encode("ascii"), launch_id.encode("ascii"), queue_ms,
    )  # fmt: skip


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join(map(b"%b: %b\r\n".__mod__, headers))


class AnswerHead:
    """What an engine's head comes to. ``lines``: status line and headers as the client gets them. ``codings``: transfer
    codings in lower case. ``kind``: content type in lower case, empty for one that is compressed, because nothing can
    be read from such a body or added to it."""

    __slots__ = ("codings", "drops_date", "is_events", "kind", "lines")

    def __init__(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        out = [STATUS_LINES[status]]
        dropped = connection_options(headers)
        self.codings: list[bytes] = []
        kind, plain = b"", True
        for name, value in headers:
            lower = name.lower()
            if lower == b"content-type":
                kind = value.lower()
            elif lower == b"content-encoding":
                plain = value.lower() == b"identity"
            elif lower == b"transfer-encoding":
                self.codings.append(value.strip().lower())
            if lower not in _NOT_TO_CLIENT and lower not in dropped and not lower.startswith(_NOT_TO_CLIENT_PREFIXES):
                out += (name, b": ", value, b"\r\n")
        self.lines = b"".join(out)
        self.drops_date = b"date" in dropped
        self.kind = kind.partition(b";")[0].strip() if plain else b""
        self.is_events = plain and kind.startswith(b"text/event-stream")


_heads: dict[tuple[int, tuple[tuple[bytes, bytes], ...]], AnswerHead] = {}


def answer_head(status: int, headers: Headers) -> AnswerHead:
    """The same for an engine's next answer: but for what is in their own fields (``content-length``, ``date``), its
    heads repeat byte for byte. What is too long or too varied to come again is not kept for long."""
    key = status, tuple(headers)
    head = _heads.get(key)
    if head is None:
        head = AnswerHead(status, headers)
        if sum(len(name) + len(value) for name, value in headers) <= MOST_KEPT_BYTES:
            if len(_heads) >= MOST_KEPT_HEADS:
                del _heads[next(iter(_heads))]
            _heads[key] = head
    return head


def to_client(head: AnswerHead, own: bytes, *, close: bool) -> bytes:
    """The head of an engine's answer as the client gets it. ``own``: finished header lines, of the framing too."""
    return b"%b%b%b" % (head.lines, own, b"connection: close\r\n\r\n" if close else b"\r\n")


def handshake_to_client(headers: Headers, own: bytes) -> bytes:
    """The 101 answer of an engine as the client gets it."""
    return b"%b%bconnection: Upgrade\r\nupgrade: websocket\r\n\r\n" % (AnswerHead(101, headers).lines, own)


def trailers_to_client(trailers: Headers) -> bytes:
    """The end of a chunked body: last chunk, the trailers that may pass, empty line."""
    if not trailers:
        return b"0\r\n\r\n"
    kept = [name + b": " + value + b"\r\n" for name, value in trailers if name.lower() not in _NOT_IN_TRAILERS]
    return b"0\r\n" + b"".join(kept) + b"\r\n"


def websocket_accept(key: bytes) -> bytes:
    """What a server that understood the handshake with ``Sec-WebSocket-Key: key`` answers (RFC 6455, 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _WEBSOCKET_GUID, usedforsecurity=False).digest())


def error_answer(
    error: ApiError, *, request_id: str | None, close: bool, own: Iterable[tuple[bytes, bytes]] = (), body: bool = True
) -> bytes:
    """A whole answer in the public error shape. ``body`` False for HEAD."""
    content = json.dumps(error.body(), ensure_ascii=False).encode()
    out = [STATUS_LINES[error.status], b"content-type: application/json\r\ncontent-length: %d\r\n" % len(content)]
    for key, value in error.headers().items():
        out.append(f"{key}: {value}\r\n".encode("latin-1"))
    if request_id is not None:
        out.append(b"x-request-id: %b\r\n" % request_id.encode("ascii"))
    out.append(_lines(own))
    out.append(b"x-api-version: v1\r\n")
    out.append(b"connection: close\r\n\r\n" if close else b"\r\n")
    if body:
        out.append(content)
    return b"".join(out)


def error_event(error: ApiError, *, at_boundary: bool, anthropic: bool) -> bytes:
    """A server-sent event that ends a broken stream. ``at_boundary``: the last event was complete."""
    content = error.body()
    if anthropic:
        content = {"type": "error", **content}
    lead = b"" if at_boundary else b"\n\n"
    name = b"event: error\n" if anthropic else b""
    return b"%b%bdata: %b\n\n" % (lead, name, json.dumps(content, ensure_ascii=False).encode())
