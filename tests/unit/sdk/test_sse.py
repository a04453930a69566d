"""Server-sent events, cut anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_bootstrap.sdk.sse import EventParser, ServerEvent

STREAM = (
    b': hello\n\nid: 7\ndata: {"a": "\xe2\x80\xa8"}\n\nevent: end\r\ndata: one\r\ndata:two\r\n\r\nretry: 5\rdata: x\r\r'
    b"event: lost\n\ndata: cut off"
)
EVENTS = [
    ServerEvent('{"a": "\u2028"}', "message", "7"),
    ServerEvent("one\ntwo", "end", "7"),
    ServerEvent("x", "message", "7"),
]


def test_events_of_a_stream():
    # A lone CR at the very end may still become CRLF, so it waits for what follows.
    assert EventParser().feed(STREAM) == EVENTS


@given(st.lists(st.integers(0, len(STREAM))))
def test_cuts_do_not_matter(cuts):
    parser, found, before = EventParser(), [], 0
    for cut in [*sorted(cuts), len(STREAM)]:
        found += parser.feed(STREAM[before:cut])
        before = cut
    assert found == EVENTS


@pytest.mark.parametrize("stream", [b"", b"\n\n", b": only a comment\n\n", b"event: named\n\n", b"data: unfinished\n"])
def test_nothing_to_give_out(stream):
    assert EventParser().feed(stream) == []
