"""Reading token counts out of answers without changing or delaying them."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_bootstrap.gateway import usage
from vllm_bootstrap.gateway.usage import LOOK_BYTES, BodyTap, EventTap, make_tap, read_usage
from vllm_bootstrap.scheduler.tickets import Usage

DONE = b"data: [DONE]\n\n"
COUNTS = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def chunk(content: str, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    return b"data: %b\n\n" % json.dumps({"id": "c", "choices": [choice], **more}).encode()


USAGE = b'data: {"id":"c","choices":[],"usage":%b}\n\n' % json.dumps(COUNTS).encode()
BODY = [chunk("Hi"), chunk('say "usage":{} and "choices":[]'), chunk("ünïcode"), b": ping\n\n"]
TOLD = Usage(7, 3)


def through(tap: EventTap | BodyTap, *reads: list[bytes]) -> bytes:
    out = b"".join(tap.feed(b"".join(parts)) for parts in reads)
    return out + tap.end()


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("drops", [True, False])
def test_any_two_cuts_give_the_same_bytes_and_the_same_counts(end: str, *, drops: bool) -> None:
    def spelled(*events: bytes) -> bytes:
        return b"".join(events).replace(b"\n", end.encode())

    whole = spelled(*BODY, USAGE, DONE)
    wanted = spelled(*BODY, DONE) if drops else whole
    for first in range(len(whole)):
        for second in range(first, min(first + 3, len(whole))):
            tap = EventTap(drops_usage=drops)
            assert through(tap, *([one] for one in pieces(whole, [first, second]))) == wanted
            assert (tap.usage, tap.tokens) == (TOLD, 5 + (not drops))


@given(st.lists(st.integers(0, 700), max_size=30), st.booleans(), st.sampled_from([b"\n", b"\r\n"]))
@example([*range(700)], True, b"\n")
@example([*range(700)], True, b"\r\n")
def test_any_cuts_at_all(cuts: list[int], together: bool, end: bytes) -> None:
    whole = b"".join([*BODY, USAGE, DONE]).replace(b"\n", end)
    tap = EventTap(drops_usage=True)
    parts = pieces(whole, [cut for cut in cuts if cut < len(whole)])
    reads = [parts] if together else [[one] for one in parts]
    assert through(tap, *reads) == b"".join([*BODY, DONE]).replace(b"\n", end)
    assert tap.usage == TOLD


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("drops", [True, False])
def test_it_is_known_whether_what_was_passed_on_ends_an_event(end: bytes, *, drops: bool) -> None:
    whole = b"".join([*BODY, USAGE, DONE]).replace(b"\n", end)
    for cut in range(1, len(whole)):
        tap, out = EventTap(drops_usage=drops), b""
        for piece in (whole[:cut], whole[cut:]):
            out += tap.feed(piece)
            assert tap.between_events is (not out or out.endswith(end + end)), (cut, out[-20:])
    assert BodyTap().between_events


def test_whole_events_are_passed_on_as_they_are() -> None:
    tap, read = EventTap(drops_usage=True), chunk("a")
    assert tap.feed(read) is read
    assert tap.tokens == 1
    several = chunk("a") + chunk("b")
    assert tap.feed(several) is several
    assert tap.tokens == 3
    crlf = chunk("a").replace(b"\n", b"\r\n")
    assert tap.feed(crlf) is crlf
    assert tap.tokens == 4
    named = b"event: token\n" + chunk("a")
    assert tap.feed(named) is named
    assert tap.tokens == 5


def test_a_piece_of_one_byte_is_no_event() -> None:
    tap = EventTap()
    assert (tap.feed(b"x"), tap.tokens, tap.between_events) == (b"x", 0, False)
    assert (tap.feed(b"\n\n"), tap.tokens, tap.between_events) == (b"\n\n", 1, True)


def test_content_that_is_cut_is_not_held_back() -> None:
    tap, event = EventTap(drops_usage=True), chunk("a longer piece of text")
    at = event.index(b"longer")
    assert tap.feed(event[:at]) == event[:at]
    assert tap.feed(event[at:]) == event[at:]
    assert tap.feed(b": comm") == b": comm"  # no data line: it cannot be the one to drop
    assert tap.feed(b"ent\n\n") == b"ent\n\n"


def test_what_may_be_the_extra_event_waits_for_its_end_only() -> None:
    tap = EventTap(drops_usage=True)
    assert tap.feed(USAGE[:30]) == b""
    assert tap.feed(USAGE[30:] + DONE) == DONE


def test_a_stream_that_ends_within_an_event_loses_nothing_but_the_extra_one() -> None:
    assert through(EventTap(drops_usage=True), [chunk("a") + b"data: {"]) == chunk("a") + b"data: {"
    assert through(EventTap(drops_usage=True), [chunk("a") + USAGE.rstrip()]) == chunk("a")
    assert through(EventTap(drops_usage=False), [chunk("a") + b"data: {"]) == chunk("a") + b"data: {"
    assert through(EventTap(drops_usage=True), [b"data: " + b"x" * LOOK_BYTES]) == b"data: " + b"x" * LOOK_BYTES


def test_memory_is_bounded_by_a_huge_event() -> None:
    huge = b'data: {"choices":[' + b" " * LOOK_BYTES * 3
    for drops in (True, False):
        tap = EventTap(drops_usage=drops)
        out = b""
        for at in range(0, len(huge), 1000):
            out += tap.feed(huge[at : at + 1000])
            assert len(tap._held) <= LOOK_BYTES + 1000
        assert out == huge  # nothing waits once it is clear that this is not the one
        tail = b"]}\n\n" + USAGE + DONE
        assert tap.feed(tail) == tail.replace(USAGE, b"" if drops else USAGE)
        assert tap.usage == TOLD


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[],"usage":null}\n\n',
        b'data: {"choices":[],"usage":"much"}\n\n',
        b'data: {"choices":[],"usage":{}\n\n',
        b'data: {"choices":[],"other":{"usage":{"prompt_tokens":1}}}\n\n',
        b'data: {"choices":[{"usage":{"prompt_tokens":1}}]}\n\n',
        b'data: {"choices":[{"x":1}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: "usage"\n\n',
        b'data: {"choices":[],"error":"usage"}\n\n',
    ],
)
def test_only_the_extra_event_is_dropped(event: bytes) -> None:
    assert through(EventTap(drops_usage=True), [event]) == event


def test_counts_of_each_chunk_count_once_and_stay() -> None:
    tap = EventTap()
    with_counts = chunk("a", usage={"prompt_tokens": 7, "completion_tokens": 1})
    assert through(tap, [with_counts], [chunk("b", usage=COUNTS)]) == with_counts + chunk("b", usage=COUNTS)
    assert tap.usage == TOLD


def test_anthropic_tells_the_prompt_first_and_the_answer_last() -> None:
    tap = make_tap("/v1/messages", b"text/event-stream")
    assert isinstance(tap, EventTap)
    start = {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 9, "output_tokens": 1}}}
    delta = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 4, "cache_read_input_tokens": 2}}
    data = [b"event: x\ndata: %b\n\n" % json.dumps(one).encode() for one in (start, delta)]
    assert through(tap, data) == b"".join(data)
    assert tap.usage == Usage(9, 4, 2)


@pytest.mark.parametrize("size", [10, LOOK_BYTES * 2])
def test_a_response_tells_its_id_first_and_its_counts_in_its_last_event(size: int) -> None:
    ids: list[str] = []
    tap = make_tap("/proxy/l1/v1/responses", b"text/event-stream", on_id=ids.append)
    assert isinstance(tap, EventTap)
    created = {"response": {"id": "resp_1", "usage": None}, "type": "response.created"}
    usage = {"input_tokens": 5, "output_tokens": 6, "input_tokens_details": {"cached_tokens": 1}}
    tools = [{"parameters": {"usage": {"input_tokens": 0, "output_tokens": 0}}}]
    whole = {"id": "resp_1", "output": "x" * size, "tools": tools, "usage": usage, "user": None}
    done = {"response": whole, "sequence_number": 3, "type": "response.completed"}
    data = [b"event: x\ndata: %b\n\n" % json.dumps(one).encode() for one in (created, {"delta": "a"}, done)]
    cut = pieces(b"".join(data), [*range(50, 40_000, 3_000)])
    assert through(tap, *([one] for one in cut)) == b"".join(data)
    assert (tap.usage, ids) == (Usage(5, 6, 1), ["resp_1"])


def test_it_is_not_idle_before_it_has_seen_the_id() -> None:
    ids: list[str] = []
    tap = EventTap(on_id=ids.append)
    assert not tap.is_idle
    tap.feed(b"data: x\n\n")
    assert not tap.is_idle
    tap.feed(b'data: {"id":"resp_1"}\n\n')
    assert (ids, tap.is_idle) == (["resp_1"], True)
    assert EventTap().is_idle


def test_an_id_that_is_not_there_is_looked_for_in_vain() -> None:
    ids: list[str] = []
    tap = EventTap(on_id=ids.append)
    assert through(tap, [chunk("a").replace(b'"id"', b'"no"')], [b"data: x\n\n"])
    body = BodyTap(ids.append)
    assert through(body, [b'{"usage":{"input_tokens":1}}']) == b'{"usage":{"input_tokens":1}}'
    assert not ids


@given(st.lists(st.integers(0, 5_000), max_size=20))
def test_a_whole_body_is_read_however_it_comes(cuts: list[int]) -> None:
    body = json.dumps({"id": "c", "choices": [{"text": '"usage":{}' * 300}], "usage": COUNTS, "z": None}).encode()
    tap = BodyTap()
    assert through(tap, *([one] for one in pieces(body, [cut for cut in cuts if cut < len(body)]))) == body
    assert (tap.usage, tap.tokens) == (TOLD, 3)


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (b'{"data":[' + b"0.1," * 20_000 + b'0],"usage":{"prompt_tokens":4,"total_tokens":4}}', Usage(4, 0)),
        (b'{"id":"r","usage":{"total_tokens":8},"results":[' + b"1," * 20_000 + b"1]}", Usage(8, 0)),
        (b'{"a":{"usage":{"total_tokens":1}},"usage" : {"total_tokens":8},"results":[' + b"1," * 20_000 + b"1]}",
         Usage(8, 0)),
        (b'{"usage":{"type":"duration","seconds":1}}', None),
        (b'{"usage":null}', None),
        (b'{"text":"x"}', None),
        (b'{"usage"' + b" " * LOOK_BYTES * 3 + b":{}}", None),
        (b'{"usage":' + b"[" * LOOK_BYTES * 3, None),
        (b'{"usage":' + b"[" * 8_000, None),
        (b'{"a":{"usage":{"prompt_tokens":1}},"b":0}', None),
        (b'{"usage":[1],"results":[' + b"1," * 20_000 + b"1]}", None),
        (b'["usage","usage","usage","usage","usage","usage"]', None),
        (b'{"usage":{"prompt_tokens":true,"completion_tokens":-1}}', None),
        (b'{"usage":{"prompt_tokens":1e400}}', None),
    ],
)  # fmt: skip
def test_usage_of_whole_bodies(body: bytes, usage: Usage | None) -> None:
    tap = BodyTap()
    assert through(tap, *([one] for one in pieces(body, [10, 4000, 9000, 30_000]))) == body
    assert tap.usage == usage


def test_the_id_of_a_whole_response() -> None:
    ids: list[str] = []
    tap = make_tap("/v1/responses", b"application/json", on_id=ids.append)
    assert tap is not None
    through(tap, [b'{"id":"resp_2","output":[],"usage":{"input_tokens":1,"output_tokens":2}}'])
    assert (tap.usage, ids) == (Usage(1, 2), ["resp_2"])


def test_what_has_no_counts_is_not_looked_at() -> None:
    assert make_tap("/v1/audio/speech", b"audio/mpeg") is None
    assert make_tap("/v1/completions", b"") is None


def test_dialects() -> None:
    assert read_usage({}, None) is None
    assert read_usage({}, Usage(1, 2)) == Usage(1, 2)
    assert read_usage({"total_tokens": 5}, None) == Usage(5, 0)
    assert read_usage({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}, None) == Usage(5, 0, 4)
    assert read_usage({"prompt_tokens": 5, "prompt_tokens_details": None}, None) == Usage(5, 0)
    assert read_usage({"output_tokens": 2}, Usage(3, 1, 1)) == Usage(3, 2, 1)


# -- the plain spelling, which has a way of its own --------------------------------------------------------------------

PLAIN = (
    b'{"id":"c","choices":[],"usage":{"prompt_tokens":7,"total_tokens":10,"completion_tokens":3,'
    b'"prompt_tokens_details":null},"prompt_logprobs":null,"kv_transfer_params":null}'
)
NEVER = re.compile(rb"(?!)")
odd = [b"07", b"-1", b"1e3", b"1000000000", b"null", b"true", b'"3"', b""]
counts = st.sampled_from([b"0", b"3", b"999999999"] * 24 + odd)  # a body has three, and is plain only if they all are
details = st.sampled_from([b"", b',"prompt_tokens_details":null', b',"prompt_tokens_details":{"cached_tokens":5}'])
members = st.lists(
    st.sampled_from([b',"a":null', b',"usage":null', b',"b":1', b',"c":"\\"usage\\":{}"', b',"d":{}', b"}", b" "]),
    max_size=3,
).map(b"".join)
ends = st.sampled_from([b"}", b"}\n", b"}} ", b"", b"}]"])


@st.composite
def spellings(draw: st.DrawFn) -> bytes:
    """Bodies that are spelt plainly, nearly so, or that end in the middle."""
    parts = b'"prompt_tokens":%b,"total_tokens":%b,"completion_tokens":%b' % tuple(draw(counts) for _ in range(3))
    text = b'{"id":"c","usage":{%b%b}%b%b' % (parts, draw(details), draw(members), draw(ends))
    at = draw(st.integers(0, len(text)))
    return draw(st.sampled_from([text, text, text, text, text[:at], text[at:], text[:at] + b'"usage":' + text[at:]]))


@given(st.one_of(spellings(), st.just(PLAIN)), st.booleans())
@example(PLAIN, True)
@example(PLAIN, False)
@example(PLAIN.replace(b":3,", b":03,"), True)
@example(PLAIN.replace(b":3,", b":03,"), False)
@example(PLAIN + b"]", True)
@example(PLAIN + b"}", True)
@example(PLAIN.replace(b'details":null', b'details":{"cached_tokens":5}'), True)
@example(PLAIN.replace(b'params":null', b'params":{"usage":{}}'), True)
def test_what_is_spelt_plainly_counts_as_it_would_by_way_of_json(body: bytes, streamed: bool) -> None:
    def told() -> tuple[bytes, Usage | None, int]:
        tap = EventTap(drops_usage=True) if streamed else BodyTap()
        first = b'data: {"usage":{"prompt_tokens":1,"prompt_tokens_details":{"cached_tokens":1}},"choices":[1]}\n\n'
        out = through(tap, [first, b"data: ", body, b"\n\n"]) if streamed else tap.end(body)
        return out, tap.usage, tap.tokens

    found = told()
    with patch.object(usage, "_PLAIN", NEVER):
        assert told() == found
    if body == PLAIN:
        assert found[1] == Usage(7, 3, int(streamed))


def test_the_plain_spelling_is_read_without_json() -> None:
    with patch.object(usage, "_loads", side_effect=AssertionError):
        tap = BodyTap()
        tap.end(PLAIN)
        assert tap.usage == TOLD
