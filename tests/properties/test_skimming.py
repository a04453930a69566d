"""Streams whose usual chunks pass the parser by, against the same ones parsed to the last byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from vllm_bootstrap.gateway.chunks import framed
from vllm_bootstrap.gateway.head import Head
from vllm_bootstrap.gateway.outbox import HeldTransport, Outbox
from vllm_bootstrap.gateway.relay import Relay
from vllm_bootstrap.gateway.upstream import MAX_RESPONSE_HEAD, UpstreamConnection
from vllm_bootstrap.scheduler.tickets import Usage

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
REQUEST = Head("POST", "/v1/completions", b"", 1, [])
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
DATA = b"data: " + b"x" * 20 + b"\n\n"

events = st.sampled_from([
    DATA, b"data: " + b"y" * 250 + b"\n\n", b"data: " + b"z" * 2040 + b"\n\n", USAGE, b"data: [DONE]\n\n", b"data: x",
    b"\n", b"\n\n", b"data: a\n\ndata: b\n\n", b"data: a\r\n\r\n", b": c\n\n", DATA + b"data: half", b"x\r\n\n\r\n",
    b"\r\n" * 9, b"10\r\n" + b"q" * 16 + b"\r\n", b'data: {"usage"',
])  # fmt: skip
oddities = st.sampled_from([
    b"1", b"0", b"\r\n", b"\n", b"\r", b"A\r\n" + b"i" * 10 + b"\r\n", b"10;x=y\r\n" + b"e" * 16 + b"\r\n", b"10", b";",
    b"010\r\n" + b"l" * 16 + b"\r\n", b"10\r\n" + b"s" * 15 + b"\r\n", b"10\r\n" + b"m" * 17 + b"\r\n", b"\x00" * 21,
    b"\x00" * 260 + b"\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"20\r\n", b"f\r\n", b"16\r\n" + DATA,
    framed(DATA)[:-1] + b"\r", framed(DATA).upper(), HEAD, b"-1\r\n", b"+1c\r\n" + DATA + b"\r\n",
])  # fmt: skip
usual = st.sampled_from([framed(DATA), framed(b"data: {}\n\n"), framed(b"data: " + b"w" * 300 + b"\n\n")])
parts = st.lists(st.one_of(usual, usual, events.map(framed), oddities), min_size=2, max_size=12)


class Sink:
    """A client's transport."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        pass


@dataclass
class Client:
    transport: HeldTransport
    write_paused: bool = False

    def closes_after_answer(self) -> bool:
        return False


@dataclass
class Pair:
    """A connection to an engine and what relays its answer, joined as an exchange joins them."""

    skims: bool
    drops: bool
    told: list[str] = field(default_factory=list)
    skimmed: int = 0

    def __post_init__(self) -> None:
        self.outbox = Outbox()
        self.outbox.call_soon = lambda _: None
        self.sink = Sink()
        self.relay = Relay(Client(HeldTransport(self.outbox, self.sink)), REQUEST)  # type: ignore[arg-type]
        self.connection = UpstreamConnection(self)  # type: ignore[arg-type]
        self.connection.transport = HeldTransport(self.outbox, Sink())
        self.connection.start(self, b"", now=0.0)

    def on_received(self, connection: UpstreamConnection) -> None:
        lead = b"" if self.relay.begun else self.relay.begin(connection, b"", drops_usage=self.drops)
        self.relay.deliver(connection, lead)
        if connection.complete:
            self.told.append(f"complete, reusable: {connection._reusable}, trailers: {connection.trailers}")
            connection.abort()
        else:
            connection.flow = self.relay.flow()
            self.skim = self.relay.skim()
            connection.skim = self.count if self.skims else None

    def count(self, data: bytes) -> bool:
        assert self.skim is not None
        took = self.skim(data)
        self.skimmed += took
        return took

    def on_broken(self, _: UpstreamConnection, reason: str) -> None:
        self.told.append(reason)

    def on_crash(self) -> None:
        raise  # noqa: PLE0704 - it is being handled

    def discard(self, _: UpstreamConnection) -> None:
        self.told.append("more than was asked for")

    def keep(self, *_: Any) -> None:
        self.told.append("kept")

    def feed(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self.connection.data_received(piece)
            self.outbox.flush()

    def outcome(self) -> tuple[bytes, list[str], int, int, Usage | None, bool]:
        tap = self.relay.tap
        assert tap is not None
        return self.sink.written, self.told, self.relay.bytes_out, tap.tokens, tap.usage, tap.between_events


@st.composite
def arrivals(draw: st.DrawFn) -> list[bytes]:
    """A stream, in the pieces in which it was written, but for some cuts and joins."""
    pieces = [HEAD, *draw(parts)]
    if draw(st.booleans()):
        return pieces
    whole, found = b"".join(pieces), []
    cuts = sorted(draw(st.sets(st.integers(1, len(whole)), max_size=6)))
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        found.append(whole[start:end])
    return [piece for piece in found if piece]


@given(arrivals(), st.booleans())
@example([HEAD + framed(DATA) + b"1", framed(DATA), framed(DATA)], False)  # not 1c but 11c bytes
@example([HEAD + framed(DATA) + b"30\r\n", framed(DATA), framed(DATA)], False)  # a chunk in a chunk
@example([HEAD + framed(DATA), b"0\r\nx: y\r\n", framed(DATA), b"\r\n"], False)  # in the trailers
@example([HEAD + framed(DATA), framed(DATA), b"0\r\n\r\n", framed(DATA)], False)  # after the end
@example([HEAD + framed(DATA), framed(b"\n"), framed(DATA)], False)  # no empty line, but for the size's end
@settings(max_examples=1000, deadline=None)
def test_what_is_skimmed_is_what_would_have_been_parsed(pieces: list[bytes], drops: bool) -> None:
    parsed, skimmed = Pair(False, drops), Pair(True, drops)
    parsed.feed(pieces)
    skimmed.feed(pieces)
    event(f"skimmed: {min(skimmed.skimmed, 3)}")
    if parsed.relay.begun or skimmed.relay.begun:
        assert skimmed.outcome() == parsed.outcome()
    assert skimmed.told == parsed.told


def test_the_usual_stream_is_skimmed_from_its_second_chunk_on() -> None:
    usual = [framed(b"data: " + b"x" * size + b"\n\n") for size in range(10, 2000)]
    pair = Pair(True, drops=True)
    pair.feed([HEAD, *usual, framed(USAGE), *usual, b"0\r\n\r\n"])
    body = b"".join([*usual, *usual, b"0\r\n\r\n"])
    assert pair.sink.written.endswith(b"\r\n\r\n" + body)
    assert pair.skimmed == 2 * len(usual) - 1
    assert pair.told == ["complete, reusable: True, trailers: []"]
    assert pair.relay.bytes_out == 2 * sum(size + 8 for size in range(10, 2000))
    assert pair.relay.tap is not None
    assert (pair.relay.tap.tokens, pair.relay.tap.usage) == (2 * len(usual), Usage(3, 4))


def test_what_comes_after_the_end_is_not_skimmed_whoever_still_holds_the_connection() -> None:
    pair = Pair(True, drops=False)
    pair.feed([HEAD + framed(DATA), framed(DATA)])
    flow = pair.connection.flow
    pair.on_received = lambda _: pair.told.append("complete")  # type: ignore[method-assign]
    pair.feed([framed(DATA) + b"0\r\n\r\n"])
    assert pair.connection.complete
    assert pair.connection.flow is flow
    written = pair.sink.written
    pair.feed([framed(DATA)])
    assert (pair.skimmed, pair.sink.written) == (1, written)
    assert pair.told == ["complete", "complete"]


def test_the_next_answer_on_a_kept_connection_is_not_the_last_ones() -> None:
    pair = Pair(True, drops=False)
    pair.feed([HEAD + framed(DATA), framed(DATA)])
    pair.on_received = lambda connection: connection.release(0.0)  # type: ignore[method-assign]
    pair.feed([b"0\r\n\r\n"])
    assert pair.told == ["kept"]
    written = pair.sink.written

    taken: list[bytes] = []
    other = Pair(True, drops=False)
    other.on_received = lambda connection: taken.append(connection.take())  # type: ignore[method-assign]
    pair.connection.start(other, b"", now=0.0)
    pair.feed([HEAD + framed(b"{}"), framed(DATA)])
    assert taken == [b"{}", DATA]
    assert (pair.skimmed, pair.sink.written) == (1, written)


def test_size_lines_that_come_apart_from_their_chunks_add_up_to_nothing() -> None:
    """What is bounded is what comes between two chunks, however many there are."""
    line = b"1;" + b"x" * 500
    for pieces in ([line, b"\r\na\r\n"], [line, b"\r", b"\n", b"a\r\n"], [line + b"\r", b"\na\r", b"\n"]):
        pair = Pair(True, drops=False)
        pair.sink.write = lambda _: None  # type: ignore[method-assign]
        pair.feed([HEAD, *(MAX_RESPONSE_HEAD // len(pieces[0]) + 2) * pieces])
        assert pair.told == []
        pair.feed([b"0\r\n\r\n"])
        assert pair.told == ["complete, reusable: True, trailers: []"]


def test_what_comes_between_two_chunks_is_bounded_to_the_byte() -> None:
    line = b"0\r\nx: "
    for size, told in (
        (MAX_RESPONSE_HEAD - 7, []),
        (MAX_RESPONSE_HEAD - 6, ["sent trailers larger than 262144 bytes"]),
    ):
        pair = Pair(True, drops=False)
        pair.feed([HEAD + framed(DATA), framed(DATA), line, *[b"y" * 1000] * (size // 1000), b"y" * (size % 1000)])
        assert pair.told == told
