from __future__ import annotations

import pytest

from vllm_bootstrap.errors import ApiError, BadRequest, HeadersTooLarge, MethodNotAllowed
from vllm_bootstrap.gateway.head import Head, HeadLimits, parse_head

LIMITS = HeadLimits(max_bytes=4096, max_count=10)


def parse(text: str, limits: HeadLimits = LIMITS) -> Head:
    return parse_head(text.replace("\n", "\r\n").encode("latin-1"), limits)


def get(target: str = "/", *headers: str) -> Head:
    return parse("\n".join([f"GET {target} HTTP/1.1", "Host: a", *headers]) + "\n\n")


def refusal(raw: bytes, limits: HeadLimits = LIMITS) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parse_head(raw, limits)
    return refused.value


def test_an_ordinary_head() -> None:
    head = parse("POST /v1/x?a=b&c HTTP/1.1\nHost: h:80\nX-Some: \t v w \nContent-Length: 12\n\n")
    assert (head.method, head.path, head.query, head.minor_version) == ("POST", "/v1/x", b"a=b&c", 1)
    assert head.headers == [(b"host", b"h:80"), (b"x-some", b"v w"), (b"content-length", b"12")]
    assert (head.content_length, head.chunked, head.keep_alive, head.has_body) == (12, False, True, True)
    assert (head.expects_continue, head.upgrade) == (False, None)
    assert head.first(b"x-some") == b"v w"
    assert head.first(b"x-other") is None


def test_values_may_hold_tabs_and_bytes_above_ascii() -> None:
    assert get("/", "X: a\tb\xe9").first(b"x") == b"a\tb\xe9"
    assert get("/", "X:").first(b"x") == b""


@pytest.mark.parametrize(
    ("headers", "keep"),
    [((), True), (("Connection: keep-alive",), True), (("Connection: foo, Close",), False),
     (("Connection: foo", "Connection: close"), False)],
)  # fmt: skip
def test_keep_alive(headers: tuple[str, ...], keep: bool) -> None:
    assert get("/", *headers).keep_alive is keep


def test_http_1_0_closes() -> None:
    head = parse("GET / HTTP/1.0\nHost: a\nConnection: keep-alive\n\n")
    assert head.keep_alive is False
    assert head.minor_version == 0


def test_an_upgrade_counts_only_when_connection_says_so() -> None:
    assert get("/", "Connection: Upgrade", "Upgrade: WebSocket").upgrade == b"websocket"
    assert get("/", "Upgrade: websocket").upgrade is None
    assert get("/", "Connection: upgrade").upgrade is None
    assert get("/", "Connection: keep-alive", "Upgrade: h2c").upgrade is None


def test_expectations() -> None:
    assert get("/", "Expect: 100-Continue").expects_continue
    old = parse("POST / HTTP/1.0\nHost: a\nExpect: 100-continue\n\n")
    assert not old.expects_continue
    assert refusal(b"GET / HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\n\r\n").param == "expect"


def test_chunked() -> None:
    head = parse("POST / HTTP/1.1\nHost: a\nTransfer-Encoding: Chunked\n\n")
    assert head.chunked
    assert head.content_length is None
    assert head.has_body
    assert not get().has_body
    assert not get("/", "Content-Length: 0").has_body


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\tfolded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x0bb\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX\xe9: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"n" * 257 + b": a\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\xe9 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
        b"GET /\r\nHost: a\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
        b"GET / http/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"\r\n\r\n",
    ],
)
def test_what_two_parsers_could_read_differently(head: bytes) -> None:
    assert type(refusal(head)) is BadRequest


def test_another_version_is_said_to_be_the_problem() -> None:
    assert "HTTP/1.1 and HTTP/1.0" in refusal(b"GET / HTTP/2.0\r\nHost: a\r\n\r\n").message


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 1\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 1",
        b"Content-Length: 1\r\nContent-Length: 1",
        b"Content-Length: 1\r\nContent-Length: 2",
        b"Content-Length: 1, 1",
        b"Content-Length: +1",
        b"Content-Length: -1",
        b"Content-Length: 0x1",
        b"Content-Length: 1_0",
        b"Content-Length:",
        b"Content-Length: 1234567890123456789",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: identity, chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding:",
        b"Content-Type: a\r\nContent-Type: b",
        b"Expect: 100-continue\r\nExpect: 100-continue",
    ],
)
def test_ambiguous_framing(lines: bytes) -> None:
    assert refusal(b"POST / HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n\r\n").status == 400


def test_chunks_are_no_part_of_http_1_0() -> None:
    error = refusal(b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert error.param == "transfer-encoding"


@pytest.mark.parametrize(
    "host", ["a", "a.b-c_d", "a:1", "127.0.0.1:8000", "[::1]", "[::1]:80", "a" * 253]
)  # fmt: skip
def test_hosts(host: str) -> None:
    assert parse(f"GET / HTTP/1.1\nHost: {host}\n\n").first(b"host") == host.encode()


@pytest.mark.parametrize(
    "lines",
    [b"", b"Host: a\r\nHost: a\r\n", b"Host:\r\n", b"Host: a/#@b\r\n", b"Host: a b\r\n", b"Host: a@b\r\n",
     b"Host: a, b\r\n", b"Host: a:\r\n", b"Host: a:123456\r\n", b"Host: [::1\r\n", b"Host: http://a\r\n",
     b"Host: a\\b\r\n", b"Host: a?b\r\n"],
)  # fmt: skip
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_exactly_one_valid_host(lines: bytes, version: bytes) -> None:
    error = refusal(b"GET / HTTP/" + version + b"\r\n" + lines + b"\r\n")
    assert type(error) is BadRequest
    assert error.param == "host"


@pytest.mark.parametrize(
    "target",
    ["http://a/", "*", "a:80", "a", "//a", "/a//b", "/a/", "/../a", "/a/..", "/a/./b", "/.", "/a/%2e%2e/b", "/%2E/a",
     "/a/.%2e", "/a%2f..%2fb", "/a%2f%2e%2e", "/a\\b", "/a%5cb", "/a%00", "/a%0d%0a", "/a%7f", "/a#b", "/a?b#c", "/a%",
     "/a%zz", "/a%1"],
)  # fmt: skip
def test_targets_that_are_no_plain_path(target: str) -> None:
    if target == "/a/":
        assert get(target).path == "/a/"
        return
    assert refusal(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode()).status == 400


@pytest.mark.parametrize(
    "target", ["/", "/a.b/..c/d..", "/v1/models/org%2Fmodel", "/a%20b", "/...", "/.a", "/a?x=//..%00"]
)
def test_targets_that_are(target: str) -> None:
    path, _, query = target.partition("?")
    head = get(target)
    assert (head.path, head.query) == (path, query.encode())


def test_methods() -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        assert parse(f"{method} / HTTP/1.1\nHost: a\n\n").method == method
    for method in (b"TRACE", b"get", b"BREW", b"CONNECT"):
        assert isinstance(refusal(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n"), MethodNotAllowed)


def test_sizes() -> None:
    exact = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
    fill = LIMITS.max_bytes - len(exact) - 4
    assert parse_head(exact + b"x" * fill + b"\r\n\r\n", LIMITS).first(b"x") == b"x" * fill
    assert isinstance(refusal(exact + b"x" * (fill + 1) + b"\r\n\r\n"), HeadersTooLarge)
    many = "\n".join(["GET / HTTP/1.1", "Host: a", *(f"X{n}: y" for n in range(9))]) + "\n\n"
    assert len(parse(many).headers) == 10
    more = many.replace("\n\n", "\nY: y\n\n").replace("\n", "\r\n").encode()
    assert isinstance(refusal(more), HeadersTooLarge)
    long = b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"
    assert "request line" in refusal(long, HeadLimits()).message
