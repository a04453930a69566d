from __future__ import annotations

import pytest

from vllm_bootstrap.errors import BadRequest, HeadersTooLarge
from vllm_bootstrap.gateway.head import Head, HeadLimits
from vllm_bootstrap.gateway.inbox import MAX_AHEAD, SMALL_REST, Inbox

RAW = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def inbox() -> Inbox:
    return Inbox(HeadLimits(max_bytes=1000))


def request(length: int | None = None, *, chunked: bool = False, expects: bool = False) -> Head:
    return Head("POST", "/", b"", 1, [], length, chunked, expects_continue=expects)


@pytest.mark.parametrize("cut", range(1, len(RAW)))
def test_a_head_is_given_out_once_it_is_whole(cut: int) -> None:
    box = inbox()
    box.add(RAW[:cut])
    assert box.take_head() is None
    box.add(RAW[cut:])
    assert box.take_head() == RAW
    assert box.ahead == b""


def test_heads_come_one_by_one_and_empty_lines_before_them_are_ignored() -> None:
    box = inbox()
    box.add(b"\r\n" + RAW + RAW + b"GE")
    assert box.take_head() == RAW
    assert box.take_head() == RAW
    assert box.take_head() is None
    assert box.take_ahead() == b"GE"


def test_a_head_that_gets_too_long() -> None:
    box = inbox()
    box.add(b"GET /" + b"a" * 1000)
    with pytest.raises(HeadersTooLarge):
        box.take_head()


@pytest.mark.parametrize("raw", [b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost: a\n\n", b"\n"])
def test_bare_newlines_are_refused_without_waiting_for_more(raw: bytes) -> None:
    box = inbox()
    box.add(raw)
    with pytest.raises(BadRequest):
        box.take_head()


def test_a_body_that_is_here_is_taken_whole() -> None:
    box = inbox()
    box.add(b"abcde")
    assert box.take_body(5) == b"abcde"
    assert (box.ahead, box.misses_some) == (b"", False)
    box.add(b"abcdeGET")
    assert box.take_body(5) == b"abcde"
    assert (box.ahead, box.misses_some) == (b"GET", False)


def test_a_counted_body_ends_where_it_ends() -> None:
    box = inbox()
    box.expect(request(5))
    assert box.body_part(b"abc") == b"abc"
    assert box.body_part(b"deGET") == b"de"
    assert box.ahead == b"GET"
    assert box.body_part(b"x") == b""
    assert box.ahead == b"GETx"


def test_no_body() -> None:
    box = inbox()
    box.expect(request())
    assert box.body_part(b"GET") == b""
    assert box.ahead == b"GET"


def test_where_chunks_end_is_not_known_here() -> None:
    box = inbox()
    box.expect(request(chunked=True))
    assert box.body_part(b"0\r\n\r\nGET") == b"0\r\n\r\nGET"
    assert not box.rest_is_small


def test_what_is_sent_early_is_bounded() -> None:
    box = inbox()
    box.add_early(b"a" * MAX_AHEAD)
    assert not box.overflowed
    box.add_early(b"a")
    assert box.overflowed
    assert box.ahead == b""


def test_a_rest_worth_dropping() -> None:
    box = inbox()
    box.expect(request(SMALL_REST + 1))
    assert not box.rest_is_small
    box.body_part(b"a")
    assert box.rest_is_small
    box.expect(request(10, expects=True))
    assert not box.rest_is_small  # it may never come
    box.body_part(b"a")
    assert box.rest_is_small


def test_whether_bytes_of_a_counted_body_are_still_to_come() -> None:
    box = inbox()
    box.expect(request(3))
    assert box.misses_some
    box.body_part(b"ab")
    assert box.misses_some
    box.body_part(b"cGET")
    assert not box.misses_some
