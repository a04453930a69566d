"""What no honest client or engine sends, and a few odd things that one may: requests and answers, byte by byte."""

from __future__ import annotations

from typing import Any

from tests.support.data_plane import LAUNCH, request
from tests.support.raw_upstream import EVENTS, answer, chunk

CHUNKED = [("Transfer-Encoding", "chunked")]
PIECES = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = b'{"model":"model","prompt":"x"}'


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in chunks) + end


def data(raw_body: bytes, **options: Any) -> bytes:
    return request(raw_body=raw_body, headers=CHUNKED, **options)


SMUGGLING = {
    "length and chunks": request(
        raw_body=b"0\r\n\r\nGET /x HTTP/1.1\r\n\r\n", headers=[*CHUNKED, ("Content-Length", "4")]
    ),
    "two lengths": request(raw_body=BODY, headers=[("Content-Length", "30"), ("Content-Length", "5")]),
    "two equal lengths": request(raw_body=BODY, headers=[("Content-Length", "30"), ("Content-Length", "30")]),
    "two codings": request(raw_body=chunked(BODY), headers=[("Transfer-Encoding", "chunked, identity")]),
    "unknown coding": request(raw_body=BODY, headers=[("Transfer-Encoding", "xchunked")]),
    "bare LF in head": request().replace(b"Host: 127.0.0.1\r\n", b"Host: 127.0.0.1\n"),
    "only LF": request().replace(b"\r\n", b"\n"),
    "folded line": request(headers=[("X-A", "b\r\n folded")]),
    "space before colon": request(headers=[("Content-Length ", "3")]),
    "CR in value": request(headers=[("X-A", "b\rX-Vllm-Priority: 1")]),
    "NUL in value": request(headers=[("X-A", "b\x00")]),
    "no host": request().replace(b"Host: 127.0.0.1\r\n", b""),
    "two hosts": request(headers=[("Host", "127.0.0.1")]),
    "empty host": request().replace(b"Host: 127.0.0.1", b"Host: "),
    "host with path": request().replace(b"Host: 127.0.0.1", b"Host: a/#@b"),
    "absolute target": request("POST", "http://127.0.0.1/v1/completions"),
    "asterisk": request("OPTIONS", "*"),
    "target without slash": request("POST", "v1/completions"),
    "double slash": request("POST", "//v1/completions"),
    "double slash inside": request("POST", "/v1//completions"),
    "dots": request("POST", "/v1/x/../completions"),
    "encoded dots": request("POST", "/v1/x/%2e%2e/completions"),
    "encoded slash": request("POST", "/v1%2fcompletions/%2e%2e"),
    "encoded letter": request("POST", f"/proxy/{LAUNCH}/v1/%63ompletions"),
    "backslash": request("POST", "/v1/x\\..\\completions"),
    "chunks in 1.0": data(chunked(BODY)).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\r\n\r\n",
    "chunk size with sign": data(b"+5\r\nhello\r\n0\r\n\r\n"),
    "chunk size with 0x": data(b"0x5\r\nhello\r\n0\r\n\r\n"),
    "chunk size with space": data(b"5 \r\nhello\r\n0\r\n\r\n"),
    "chunk size too large": data(b"fffffffffffffffff\r\n"),
    "bare LF after chunk size": data(b"5\nhello\r\n0\r\n\r\n"),
    "bad chunk extension": data(b"5;\x01=a\r\nhello\r\n0\r\n\r\n"),
    "LF in chunk extension": data(b"5;a\nhello\r\n0\r\n\r\n"),
    "chunk longer than said": data(b"5\r\nhello!\r\n0\r\n\r\n"),
    "length in trailers": data(chunked(BODY, end=b"0\r\nContent-Length: 5\r\n\r\n")),
    "LF in trailers": data(chunked(BODY, end=b"0\r\nX: y\n\r\n")),
}
"""Requests that may be understood in two ways, or not at all: 400, and nobody else hears of them."""

HONEST = [
    data(chunked(BODY)),
    data(chunked(BODY[:5], BODY[5:])),
    data(b"1e;name=value\r\n" + BODY + b"\r\n0\r\n\r\n"),
    data(b"001E\r\n" + BODY + b"\r\n000\r\n\r\n"),
    data(chunked(BODY, end=b"0\r\nX-Vllm-Priority: -5\r\nAuthorization: x\r\n\r\n")),
    request(raw_body=BODY),
    b"\r\n" + request(raw_body=BODY),
]
"""One meaning, on both sides: ``BODY`` for the model."""

BEFORE_HEADERS = {
    "closes at once": b"",
    "half a status line": b"HTTP/1.1 20",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "garbage": b"\x00\x01garbage\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
    "length and chunks": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok",
    "unknown coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nok",
    "coding over chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "bad length": b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
    "folded header": b"HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n",
    "bad header": b"HTTP/1.1 200 OK\r\na b: c\r\n\r\n",
    "unasked switch": b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    "interim with a length": b"HTTP/1.1 100 Continue\r\ncontent-length: 2\r\n\r\n" + answer(b"ok"),
    "odd interim with a body": b"HTTP/1.1 104 Odd\r\ncontent-length: 2\r\n\r\nno" + answer(b"ok"),
    "interim in chunks": b"HTTP/1.1 103 Early\r\ntransfer-encoding: chunked\r\n\r\n" + PIECES + chunk(b"ok"),
    "only interim": b"HTTP/1.1 100 Continue\r\n\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 300_000,
    "odd status": b"HTTP/1.1 99 Odd\r\n\r\n",
    "CR in a value": b"HTTP/1.1 200 OK\r\na: b\rset-cookie: c\r\ncontent-length: 2\r\n\r\nok",
    "LF in a value": b"HTTP/1.1 200 OK\r\na: b\nset-cookie: c\r\ncontent-length: 2\r\n\r\nok",
    "NUL in a value": b"HTTP/1.1 200 OK\r\na: b\x00\r\ncontent-length: 2\r\n\r\nok",
    "only LF": b"HTTP/1.1 200 OK\ncontent-length: 2\n\nok",
    "chunked twice": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "length with a sign": b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok",
    "list of lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nok",
    "space before the colon": b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\nok",
}
"""What is no answer: a 502."""

AFTER_HEADERS = {
    "cut in a stream": EVENTS + chunk(b"data: 1\n\n"),
    "cut in a chunk": EVENTS + chunk(b"data: 1\n\n") + b"20\r\ndata: 2",
    "bad chunk": EVENTS + chunk(b"data: 1\n\n") + b"zz\r\n",
}
"""Streams that break: an error event at their end."""

BROKEN = [
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 50\r\n\r\ndata: 1\n\n",
    EVENTS.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n") + chunk(b"hello"),
    PIECES + b"+2\r\nok\r\n0\r\n\r\n",
    PIECES + b"0x2\r\nok\r\n0\r\n\r\n",
    PIECES + b"fffffffffffffffff\r\n",
    PIECES + b"2\r\nok!\r\n0\r\n\r\n",
    PIECES + b"2\nok\r\n0\r\n\r\n",
    PIECES + b"2;\x01=a\r\nok\r\n0\r\n\r\n",
    PIECES + b"2;a\nok\r\n0\r\n\r\n",
    PIECES + b'2;a="b\r\nok\r\n0\r\n\r\n',
    PIECES + b"2\r\nok\r\n0;\x00\r\n\r\n",
    PIECES + b"2\r\nok\r\n0\r\nx: y\n\r\n",
    PIECES + b"2\r\nok\r\n0\r\nx: y\r\n\n",
    PIECES + b"2\r\nok\r\n0\r\nx: y\r\n z\r\n\r\n",
    PIECES + b"2\r\nok\r\n0\r\nx y\r\n\r\n",
    PIECES + b"2\r\nok\r\n0\r\ncontent-length: 2\r\n\r\n",
]
"""Answers that break where nothing can be said any more: the connection is cut."""
