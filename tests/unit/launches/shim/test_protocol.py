"""Framing and names of the control protocol."""

import pytest

from vllm_bootstrap.launches.shim import protocol
from vllm_bootstrap.launches.shim.order import Order, Refused
from vllm_bootstrap.launches.sweep import attempt_of


def test_messages_survive_any_cut():
    messages = [{"id": 1, "op": "hello"}, {"env": {"A": "ü\udc80"}}, {}]
    data = b"".join(protocol.encode(message) for message in messages)
    for cut in range(len(data)):
        buffer = protocol.LineBuffer()
        assert buffer.feed(data[:cut]) + buffer.feed(data[cut:]) == messages


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000])
def test_anything_else_is_refused(line):
    with pytest.raises(protocol.ProtocolError):
        protocol.decode(line)


def test_lines_have_a_limit():
    buffer = protocol.LineBuffer()
    buffer.feed(b"x" * protocol.MAX_LINE)
    with pytest.raises(protocol.ProtocolError):
        buffer.feed(b"x")


def test_markers_name_state_launch_and_attempt():
    marker = protocol.marker("state", "l1", 3)
    assert attempt_of(marker, "state") == ("l1", 3)
    for other in ("", "state", "state/l1", "state//3", "state/l1/x", "stat/l1/3", "state2/l1/3"):
        assert attempt_of(other, "state") is None


GOOD = {
    "argv": ["engine"], "env": {"A": "1"}, "cwd": "/", "tmp_dir": "/t", "log_dir": "/l",
    "log_segment_bytes": 10, "log_max_bytes": 20,
}  # fmt: skip


def test_an_order_may_leave_out_what_has_a_default_and_say_more_than_is_known():
    order = Order({**GOOD, "from_a_later_version": 1})
    assert (order.argv, order.env, order.uid, order.gid, order.shared) == (["engine"], {"A": "1"}, None, None, False)
    assert (order.secrets, order.gpu_locks, order.lock_dir, order.lock_owner) == ([], [], "", "")
    assert Order({**GOOD, "uid": 7, "gid": 8, "secrets": ["ü\udc80"]}).secrets == [b"\xc3\xbc\x80"]


@pytest.mark.parametrize(
    "change",
    [{"argv": []}, {"argv": None}, {"env": []}, {"uid": "me"}, {"cwd": "x"}, {"tmp_dir": "x"}, {"log_dir": ""}],
)
def test_orders_that_cannot_be_followed(change):
    with pytest.raises(Refused) as caught:
        Order({**GOOD, **change})
    assert caught.value.kind == "bad_order"


def test_an_order_that_is_none():
    for raw in (None, [], {}):
        with pytest.raises(Refused):
            Order(raw)
