"""What the clients send about files, batches and items, and how downloads go on."""

import io

import pytest

from vllm_bootstrap.sdk import batch_calls as calls
from vllm_bootstrap.sdk.batch_calls import WebhookTo
from vllm_bootstrap.sdk.failures import DaemonUnreachable, EndTimeout, UnexpectedAnswer
from vllm_bootstrap.sdk.transfers import Counted, Download
from vllm_bootstrap.sdk.waiting import EndWait


def test_a_batch_sends_only_what_was_given_and_may_be_repeated():
    call = calls.create("file-1", "/v1/completions", {}, "k")
    assert call.body == {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"}
    assert (call.headers, call.may_repeat) == ({"idempotency-key": "k"}, True)
    webhook = calls.create("f", "/v1/score", {"webhook": WebhookTo("https://x/"), "metadata": None}, "k").body[
        "webhook"
    ]
    assert webhook == {"url": "https://x/"}


@pytest.mark.parametrize("bad", ["../../x", "a b", "b/1?x"])
def test_ids_cannot_leave_their_place_in_the_path(bad):
    for path, slashes in (
        (calls.file(bad).path, 3), (calls.content_path(bad), 4), (calls.batch(bad).path, 3),
        (calls.change(bad, "pause").path, 4), (calls.watch(bad).path, 4), (calls.partial_path(bad, failed=True), 4),
        (calls.item(bad, 0).path, 4),
    ):  # fmt: skip
        assert (path.count("/"), "?" in path, " " in path) == (slashes, False, False)


def test_what_would_do_something_else_the_second_time_is_not_repeated():
    assert [calls.change("b", what).may_repeat for what in ("cancel", "pause", "resume", "retry")] == [
        True, True, True, False,
    ]  # fmt: skip
    upload = calls.upload(io.BytesIO(), "x", "batch", None)
    assert not any(call.may_repeat for call in (upload, calls.delete_file("f"), calls.delete_batch("b")))


def test_expiry_is_said_as_openai_says_it():
    fields = calls.upload(io.BytesIO(), "x", "batch", 3600).form.fields
    assert fields == {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}


def test_only_a_waiting_look_is_patient():
    assert (calls.item("i", 0).params, calls.item("i", 0).timeout_s) == ({}, None)
    assert (calls.item("i", 500).params, calls.item("i", 20).timeout_s) == ({"wait": "60"}, 50)


def test_a_download_goes_on_in_the_same_file():
    seen = []
    download = Download(on_progress=lambda *at: seen.append(at))
    assert download.headers() == {}
    download.opened(200, {"etag": '"e"', "content-length": "10"})
    download.took(4)
    assert download.headers() == {"range": "bytes=4-", "if-range": '"e"'}
    download.opened(206, {"content-length": "6"})
    download.took(6)
    assert seen == [(4, 10), (10, 10)]
    with pytest.raises(UnexpectedAnswer, match="another one"):
        download.opened(200, {})
    assert Download(7).headers() == {"range": "bytes=7-"}


def test_a_counted_file_begins_again_where_it_is_put(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    seen = []
    with path.open("rb") as opened:
        counted = Counted(opened, lambda *at: seen.append(at))
        assert (counted.read(4), counted.tell()) == (b"0123", 4)
        counted.seek(0)
        assert (counted.read(), counted.read()) == (b"0123456789", b"")
        assert counted.readable()
        assert counted.seekable()
    assert seen == [(4, 10), (10, 10)]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_waiting_for_an_end_slows_down_and_ends_with_its_time():
    clock, seen = Clock(), []
    waiting = EndWait("Batch b", 10, lambda value: value == "over", seen.append, clock)
    assert not waiting.saw("running")
    pauses = [waiting.pause() for _ in range(20)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 2
    clock.now = 9.5
    assert (waiting.pause(), waiting.left(60)) == (0.5, 0.5)
    assert waiting.saw("over")
    assert seen == ["running", "over"]
    clock.now = 10
    with pytest.raises(EndTimeout, match="Batch b has not ended after 10 s"):
        waiting.pause()


def test_a_daemon_that_stays_away_ends_the_waiting():
    clock, gone = Clock(), DaemonUnreachable("u", "gone")
    waiting = EndWait("Batch b", None, bool, clock=clock)
    with pytest.raises(DaemonUnreachable):
        waiting.missed(gone)
    waiting.saw(0)
    waiting.missed(gone)
    assert waiting.left(60) == 60
    clock.now = 61
    with pytest.raises(DaemonUnreachable):
        waiting.missed(gone)
