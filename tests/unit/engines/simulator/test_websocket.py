import pytest

from vllm_bootstrap.engines.simulator.websocket import (
    BAD_DATA,
    BINARY,
    CLOSE,
    CONTINUATION,
    GOING_AWAY,
    MAX_MESSAGE_BYTES,
    NO_CODE,
    NORMAL,
    PING,
    PONG,
    PROTOCOL_ERROR,
    TEXT,
    TOO_BIG,
    WebSocket,
    accept_key,
    frame,
    handshake,
)

MASK = b"\x01\x02\x03\x04"


def sent(opcode, payload, *, final=True, masked=True, reserved=0):
    """A frame as a client sends it."""
    size = len(payload)
    wide = 0 if size < 126 else 2 if size < 1 << 16 else 8
    length = b"\x7e\x7f"[wide == 8 : 1 + (wide == 8)] + size.to_bytes(wide, "big") if wide else bytes([size])
    body = bytes(b ^ MASK[i % 4] for i, b in enumerate(payload))
    head = bytes([(0x80 if final else 0) | reserved | opcode, length[0] | (0x80 if masked else 0)])
    return head + length[1:] + (MASK + body if masked else payload)


class Wire:
    """A transport that remembers."""

    def __init__(self):
        self.written, self.closed, self.aborted, self.reading = [], False, False, True

    def write(self, data):
        self.written.append(data)

    def close(self):
        self.closed = True

    def abort(self):
        self.aborted = True

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def gone():
    return []


@pytest.fixture
def peer(wire, gone):
    return WebSocket(wire, gone.append)


def closing(code, reason=b""):
    return frame(CLOSE, code.to_bytes(2, "big") + reason)


def test_the_handshake_is_that_of_the_rfc():
    # The example of RFC 6455, section 1.3.
    assert accept_key(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert b"sec-websocket-protocol: realtime\r\n" in handshake(b"x", b"realtime")
    assert b"sec-websocket-protocol" not in handshake(b"x", None)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
def test_messages_come_back_whole(peer, wire, size):
    payload = bytes(i % 251 for i in range(size))
    peer.data_received(sent(BINARY, payload))
    assert wire.written == [frame(BINARY, payload)]


def test_bytes_may_arrive_one_by_one(peer, wire):
    for byte in sent(TEXT, b"hello") + sent(BINARY, b"\x00" * 200):
        peer.data_received(bytes([byte]))
    assert wire.written == [frame(TEXT, b"hello"), frame(BINARY, b"\x00" * 200)]


def test_fragments_are_joined_and_control_frames_may_lie_between(peer, wire):
    peer.data_received(
        sent(TEXT, b"he", final=False) + sent(PING, b"p") + sent(CONTINUATION, b"", final=False)
        + sent(CONTINUATION, b"y")
    )  # fmt: skip
    assert wire.written == [frame(PONG, b"p"), frame(TEXT, b"hey")]


def test_a_pong_is_heard_and_not_answered(peer, wire):
    peer.data_received(sent(PONG, b"x"))
    assert wire.written == []


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (sent(TEXT, b"x", masked=False), PROTOCOL_ERROR),
        (sent(TEXT, b"x", reserved=0x40), PROTOCOL_ERROR),
        (sent(0x3, b"x"), PROTOCOL_ERROR),
        (sent(CONTINUATION, b"x"), PROTOCOL_ERROR),
        (sent(TEXT, b"x", final=False) + sent(TEXT, b"x"), PROTOCOL_ERROR),
        (sent(PING, b"x" * 126), PROTOCOL_ERROR),
        (sent(PING, b"x", final=False), PROTOCOL_ERROR),
        (sent(TEXT, b"\xff"), BAD_DATA),
        (b"\x82\xff" + (MAX_MESSAGE_BYTES + 1).to_bytes(8, "big"), TOO_BIG),
    ],
)
def test_broken_frames_close_with_the_rfcs_code(peer, wire, broken, code):
    peer.data_received(broken)
    assert wire.written == [closing(code)]
    assert wire.closed


def test_many_fragments_do_not_get_around_the_limit(peer, wire):
    size = MAX_MESSAGE_BYTES // 4 + 1
    rest = b"\xff" + size.to_bytes(8, "big") + bytes(4) + bytes(size)  # masked with zeros
    peer.data_received(b"\x02" + rest)
    for _ in range(4):
        peer.data_received(b"\x00" + rest)
    assert wire.written == [closing(TOO_BIG)]


@pytest.mark.parametrize(
    ("payload", "answer"),
    [
        (b"", frame(CLOSE, b"")),
        (NORMAL.to_bytes(2, "big") + b"bye", closing(NORMAL)),
        ((4321).to_bytes(2, "big"), closing(4321)),
        ((999).to_bytes(2, "big"), closing(PROTOCOL_ERROR)),
        (b"\x03", closing(PROTOCOL_ERROR)),
    ],
)
def test_closing_is_answered(peer, wire, payload, answer):
    peer.data_received(sent(CLOSE, payload))
    assert wire.written == [answer]
    assert wire.closed


def test_texts_make_it_act(wire, gone):
    peer = WebSocket(wire, gone.append)
    peer.data_received(sent(TEXT, b"ping:abc"))
    peer.data_received(sent(TEXT, b"close:4001:for a reason"))
    peer.data_received(sent(TEXT, b"more"))
    assert wire.written == [frame(PING, b"abc"), closing(4001, b"for a reason")]
    dropped = Wire()
    WebSocket(dropped, gone.append).data_received(sent(TEXT, b"drop") + sent(TEXT, b"more"))
    assert dropped.aborted
    assert dropped.written == []


def test_it_closes_once_and_says_when_it_is_gone(peer, wire, gone):
    peer.close(GOING_AWAY)
    peer.close(NO_CODE)
    peer.connection_lost(None)
    assert wire.written == [closing(GOING_AWAY)]
    assert gone == [peer]


def test_a_slow_reader_is_not_read_from(peer, wire):
    peer.pause_writing()
    assert not wire.reading
    peer.resume_writing()
    assert wire.reading


def test_it_greets(peer, wire):
    peer.greet("s1")
    assert wire.written == [frame(TEXT, b'{"type": "session.created", "id": "s1"}')]
