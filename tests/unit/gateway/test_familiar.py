"""Heads that come again are read by heart: the same meaning, a new length, and no key kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from vllm_bootstrap.auth.guard import Guard, Pass
from vllm_bootstrap.auth.keyfile import digest
from vllm_bootstrap.auth.keys import Key, KeyRing
from vllm_bootstrap.auth.sessions import Sessions
from vllm_bootstrap.auth.types import Principal, RequestHead, Rule
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.gateway import familiar
from vllm_bootstrap.gateway.familiar import FamiliarHeads
from vllm_bootstrap.gateway.head import HeadLimits, parse_head
from vllm_bootstrap.gateway.headers import may_pass
from vllm_bootstrap.gateway.targets import ToModel

RAW = (
    b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer sk-secret\r\n"
    b"Content-Length: 12\r\nX-Api-Key: sk-other\r\nX-Priority: batch\r\n\r\n"
)
WHO = Principal("who", frozenset({"realtime"}))
TARGET = ToModel("/v1/completions")
ENTRY = cast("Any", object())


def knowing(raw: bytes = RAW) -> FamiliarHeads:
    heads = FamiliarHeads(HeadLimits())
    heads.remember(parse_head(raw, HeadLimits()), TARGET, ENTRY, Pass(WHO, 1))
    return heads


@pytest.mark.parametrize("length", [b"12", b"1", b"999999999999999999"])
def test_only_the_length_may_differ(length: bytes) -> None:
    raw = RAW.replace(b"12", length)
    got, plain = knowing().read(raw), parse_head(raw, HeadLimits())
    assert got.memory is not None
    for name in (
        "method",
        "path",
        "query",
        "minor_version",
        "content_length",
        "chunked",
        "keep_alive",
        "raw",
        "upgrade",
    ):
        assert getattr(got, name) == getattr(plain, name)
    assert got.first(b"x-priority") == b"batch"
    assert got.headers == [(b"host", b"h"), (b"x-priority", b"batch")]


TRACED = RAW.replace(b"Host: h\r\n", b"X-Request-Id: one\r\nTraceparent: 00-1\r\nHost: h\r\ntracestate: a=1,b=2\r\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"00-1", b"00-2"),
        (b"a=1,b=2", b"c=3, d=4"),
        (b": one", b": two"),
        (b": 12", b": 34"),
        (b"one\r\nTraceparent: 00-1", b"!\r\nTraceparent: " + b"~" * 256),
    ],
)
def test_ids_by_which_a_request_is_traced_are_its_own(old: bytes, new: bytes) -> None:
    heads, raw = knowing(TRACED), TRACED.replace(old, new)
    got, plain = heads.read(raw), parse_head(raw, HeadLimits())
    assert got.memory is not None
    assert (got.content_length, got.raw) == (plain.content_length, raw)
    assert got.first(b"x-request-id") == plain.first(b"x-request-id")
    parent, state = plain.first(b"traceparent"), plain.first(b"tracestate")
    assert got.traces == b"traceparent: %b\r\ntracestate: %b\r\n" % (parent or b"", state or b"")
    assert got.headers == [(b"host", b"h"), (b"x-priority", b"batch")]
    assert got.first(b"traceparent") is None, "it is not kept"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"00-1", b"00-1 "),
        (b"00-1", b"00\t1"),
        (b"00-1", b""),
        (b"00-1", b"x" * 257),
        (b"00-1", "ü".encode()),
        (b"Traceparent", b"traceparent"),
        (b"Traceparent: 00-1\r\n", b""),
        (b"Traceparent: 00-1\r\n", b"Traceparent: 00-1\r\nTraceparent: 00-1\r\n"),
        (b"X-Request-Id: one\r\nTraceparent: 00-1", b"Traceparent: 00-1\r\nX-Request-Id: one"),
        (b"sk-secret", b"sk-secreT"),
    ],
)
def test_ids_that_are_written_in_another_way_make_another_head(old: bytes, new: bytes) -> None:
    assert knowing(TRACED).read(TRACED.replace(old, new)).memory is None


@pytest.mark.parametrize(
    "place", [b"X-Request-Id: \0", b"X-Request-Id: one\0", b"\0\r\nX-Request-Id: \0", b"X-Request-Id: \0\0"]
)
def test_the_place_of_an_id_cannot_be_feigned(place: bytes) -> None:
    with pytest.raises(BadRequest):
        knowing(TRACED).read(TRACED.replace(b"X-Request-Id: one", place))


@pytest.mark.parametrize("name", sorted(familiar.CHANGING - {b"content-length"}))
@pytest.mark.parametrize("spelled", [bytes.lower, bytes.title, bytes.upper])
def test_each_of_them_may_be_new_each_time_and_what_is_for_the_engine_is_passed_on(
    name: bytes, spelled: Callable[[bytes], bytes]
) -> None:
    raw = RAW.replace(b"Host: h", b"%b: 10.0.0.1, a=1\r\nHost: h" % spelled(name))
    got = knowing(raw).read(raw.replace(b"10.0.0.1", b"10.0.0.22"))
    assert got.memory is not None
    assert got.traces == (b"%b: 10.0.0.22, a=1\r\n" % name if may_pass(name) else b"")
    assert got.first(b"x-request-id") == (b"10.0.0.22, a=1" if name == b"x-request-id" else None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Host: h", b"Host: h\r\nTraceParent: "),
        (b"Host: h", b"Host: h\r\ntracestate:  a=1"),
        (b"Host: h", b"Host: h\r\nConnection: keep-alive, Traceparent"),
    ],
)
def test_a_head_that_says_more_about_its_ids_is_not_kept(old: bytes, new: bytes) -> None:
    raw = TRACED.replace(old, new)
    assert knowing(raw).read(raw).memory is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"sk-secret", b"sk-secreT"),
        (b"POST", b"PUT"),
        (b"Host: h", b"Host:  h"),
        (b"Content-Length", b"content-length"),
        (b"X-Priority: batch\r\n", b""),
        (b"12", b"0"),
    ],
)
def test_anything_else_is_read_anew(old: bytes, new: bytes) -> None:
    assert knowing().read(RAW.replace(old, new)).memory is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"X-Priority", b"Content-Length: 12\r\nX-Priority"),
        (b"X-Priority", b"Content-Length: 13\r\nX-Priority"),
        (b"X-Priority", b"Transfer-Encoding: chunked\r\nX-Priority"),
        (b": 12", b": 012x"),
        (b"\r\nContent-Length: 12\r\n", b"\0"),
        (b"Host: h", b"Host: h\0"),
    ],
)
def test_what_is_ambiguous_stays_refused_although_its_like_is_known(old: bytes, new: bytes) -> None:
    with pytest.raises(BadRequest):
        knowing().read(RAW.replace(old, new))


@pytest.mark.parametrize(
    "extra",
    [
        b"Transfer-Encoding: chunked",
        b"Content-Length: 5\r\nExpect: 100-continue",
        b"Content-Length: 5\r\nUpgrade: x",
        b"X: y",
    ],
)
def test_heads_of_other_kinds_are_not_kept(extra: bytes) -> None:
    raw = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n" + extra + b"\r\n\r\n"
    assert knowing(raw).read(raw).memory is None


def test_no_credential_is_kept() -> None:
    heads = knowing()
    memory = heads.read(RAW).memory
    kept = repr((heads._known, memory.head, memory.head.headers, memory.head._fields, memory.permit, memory.head.raw))
    assert "sk-" not in kept


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(familiar, "MOST_HEADS", 2)
    heads = knowing()
    for host in (b"i", b"j"):
        heads.remember(parse_head(RAW.replace(b"Host: h", b"Host: " + host), HeadLimits()), TARGET, ENTRY, Pass(WHO, 1))
    assert heads.read(RAW).memory is None
    assert heads.read(RAW.replace(b"Host: h", b"Host: j")).memory is not None
    long = RAW.replace(b"X-Priority: batch", b"X-Long: " + b"x" * familiar.MOST_BYTES)
    heads.remember(parse_head(long, HeadLimits()), TARGET, ENTRY, Pass(WHO, 1))
    assert heads.read(long).memory is None


def test_a_pass_ends_with_its_key_and_with_any_change_of_keys() -> None:
    now = [0.0]
    head = RequestHead("POST", "/x", ((b"host", b"localhost"), (b"authorization", b"Bearer t")))
    keys = KeyRing([Key(digest("t"), Principal("t", frozenset({"realtime"}), expires_at=10.0))], clock=lambda: now[0])
    guard = Guard(keys, Sessions(keys, lifetime_s=60), open_access=False)
    principal = guard.admit(head, Rule(scopes=frozenset({"realtime"})))
    assert principal is not None
    permit = guard.remember(head, principal)
    assert permit is not None
    assert guard.readmit(permit) is principal
    assert guard.remember(RequestHead("POST", "/x", ((b"cookie", b"a=b"),)), principal) is None
    now[0] = 10.0
    assert guard.readmit(permit) is None
    now[0] = 0.0
    keys.reload()
    assert guard.readmit(permit) is None


def test_a_head_is_worth_remembering_when_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = FamiliarHeads(HeadLimits())
    other = RAW.replace(b"batch", b"other")
    assert not heads.comes_again(parse_head(RAW, HeadLimits())), "it was not read here"
    first = heads.read(RAW)
    assert not heads.comes_again(first)
    assert not heads.comes_again(heads.read(other))
    assert heads.comes_again(heads.read(bytes(bytearray(RAW))))
    monkeypatch.setattr(familiar, "MOST_HEADS", 2)
    assert not heads.comes_again(heads.read(RAW.replace(b"batch", b"third")))
    assert not heads.comes_again(heads.read(RAW)), "what was seen long ago is forgotten"
