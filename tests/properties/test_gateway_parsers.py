"""The gateway's own readings against independent ones: JSON against ``json``, heads against llhttp."""

from __future__ import annotations

import json
from typing import Any

import httptools
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gateway import bodies
from vllm_bootstrap.gateway.head import HeadLimits, parse_head
from vllm_bootstrap.gateway.inbox import Inbox

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
names = st.text(max_size=6) | st.sampled_from(["priority", "model", "prompt", 'a"b', "\\", "é", "\u2028", "\x7f"])
objects = st.dictionaries(names, values, max_size=6)
blanks = st.text(" \t\r\n", max_size=3)


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A JSON object in one of its many spellings, and what it means."""
    meaning = draw(objects)
    ascii_only = draw(st.booleans())
    members = [
        f"{draw(blanks)}{json.dumps(name, ensure_ascii=ascii_only)}{draw(blanks)}:{draw(blanks)}"
        f"{json.dumps(value, ensure_ascii=not ascii_only)}{draw(blanks)}"
        for name, value in meaning.items()
    ]
    return f"{draw(blanks)}{{{','.join(members) or draw(blanks)}}}{draw(blanks)}", meaning


@given(texts())
@settings(max_examples=150, deadline=None)
def test_an_object_means_what_json_says_it_means(made: tuple[str, dict[str, Any]]) -> None:
    text, meaning = made
    raw = text.encode("utf-8", "surrogatepass")
    try:
        body = bodies.parse(raw)
    except ApiError:
        assert _has_surrogates(text)  # no UTF-8 at all
        return
    assert body.fields == meaning
    for name, (start, value, end) in body.spans.items():
        assert json.loads(text[value:end]) == meaning[name]
        assert json.loads("{" + text[start:end] + "}") == {name: meaning[name]}


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


@given(texts(), st.sampled_from([None, 0, 100]))
@settings(max_examples=150, deadline=None)
def test_an_edit_changes_one_member_and_keeps_every_other_byte(
    made: tuple[str, dict[str, Any]], priority: int | None
) -> None:
    text, meaning = made
    if _has_surrogates(text):
        return
    body = bodies.parse(text.encode())
    edited = bodies.with_members(body, {"priority": priority})
    expected = {name: value for name, value in meaning.items() if name != "priority"}
    if priority is not None:
        expected["priority"] = priority
    after = bodies.parse(edited)
    assert after.fields == expected
    for name in expected:
        if name != "priority":
            assert _written(after, name) == _written(body, name)


@given(texts(), st.data())
@settings(max_examples=250, deadline=None)
def test_edits_of_several_members_keep_every_other_byte(made: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    text, meaning = made
    if _has_surrogates(text):
        return
    body = bodies.parse(text.encode())
    some = st.sampled_from(sorted(meaning)) if meaning else st.just("new")
    edits = data.draw(st.dictionaries(some | names, st.none() | st.integers() | st.booleans(), max_size=6))
    if any(map(_has_surrogates, edits)):
        return
    after = bodies.parse(bodies.with_members(body, edits))
    assert after.fields == {
        **{name: value for name, value in meaning.items() if name not in edits},
        **{name: value for name, value in edits.items() if value is not None},
    }
    untouched = [name for name in meaning if name not in edits]
    assert [_written(after, name) for name in untouched] == [_written(body, name) for name in untouched]
    assert [name for name in after.spans if name in untouched] == untouched


def _written(body: bodies.JsonBody, name: str) -> str:
    start, _, end = body.spans[name]
    return body.text[start:end]


pieces = st.sampled_from([
    b"GET", b"POST", b" ", b"/", b"/v1/x", b"//", b"..", b"%2e", b"?a=b", b"#", b"HTTP/1.1", b"HTTP/1.0", b"\r\n",
    b"\r\n", b"\n", b"\r", b"Host", b"Host: a", b":", b"a", b"Content-Length: 1", b"Transfer-Encoding: chunked",
    b"Connection: close", b"Connection: upgrade", b"Upgrade: websocket", b"\t", b"\x00", b"\xe9", b"X-A", b"\x0b",
])  # fmt: skip
heads = st.lists(pieces, max_size=12).map(b"".join)
nearly = st.tuples(st.lists(pieces, max_size=3).map(b"".join), st.lists(pieces, max_size=3).map(b"".join)).map(
    lambda cut: b"POST /v1/x" + cut[0] + b" HTTP/1.1\r\nHost: a\r\n" + cut[1] + b"\r\n\r\n"
)


class Heard:
    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.parser = httptools.HttpRequestParser(self)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.method = self.parser.get_method().decode()
        self.keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() == "1.1"
        self.upgrades = self.parser.should_upgrade()


def _without_upgrade(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [header for header in headers if header[0] != b"upgrade"]


@given(heads | nearly)
@example(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\nContent-Length: 5\r\n\r\n")
@settings(max_examples=500, deadline=None)
def test_a_head_that_passes_is_read_the_same_by_llhttp(raw: bytes) -> None:
    try:
        head = parse_head(raw, HeadLimits())
        heard = Heard()
        heard.parser.feed_data(head.raw)
    except (ApiError, httptools.HttpParserError):
        return  # refused by either is refused
    assert heard.method == head.method
    assert heard.url == head.path.encode() + (b"?" + head.query if b"?" in heard.url else b"")
    assert _without_upgrade(head.headers) == _without_upgrade(heard.headers)
    assert heard.keep_alive == head.keep_alive
    assert not heard.upgrades


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_heads_are_the_same_however_they_arrive(cuts: list[int]) -> None:
    one = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    stream, box, found = one * 5, Inbox(HeadLimits()), []
    while stream:
        size = cuts[len(stream) % len(cuts)]
        box.add(stream[:size])
        stream = stream[size:]
        while (head := box.take_head()) is not None:
            found.append(head)
    assert found == [one] * 5
    assert box.ahead == b""
