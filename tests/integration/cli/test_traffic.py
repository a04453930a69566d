"""The commands about inference requests, against the real control plane over made-up requests."""

import json
import threading

import pytest

from tests.integration.cli.test_commands import Box
from tests.support.control_plane import NOW, key, make, under_way, view
from tests.support.traffic import REPORT, close, history, record
from tests.support.waiting import wait_for
from vllm_bootstrap.cli import text
from vllm_bootstrap.cli.traffic import HEADER


@pytest.fixture
def box(tmp_path):
    with Box(tmp_path) as made:
        under_way(made.services, "req_1", owner="chat")
        under_way(made.services, "req_2", owner="bulk", cls="batch", state="queued", launch_id=None, queue_ms=1500)
        yield made


@pytest.fixture
def kept(box, tmp_path):
    """The box with a history of three requests."""
    records = [
        record(1, started_at=NOW),
        record(2, owner="bob", cls="batch", started_at=NOW + 60),
        record(3, status=429, code="queue_full", stream=None, first_byte_s=None, completion_tokens=None),
    ]
    box.services.activity = made = history(tmp_path, records)
    yield box
    close(made)


def test_requests_are_a_table(box):
    header, first, second = box.lines("requests")
    assert header.split() == ["ID", "STATE", "CLASS", "OWNER", "MODEL", "AGE", "WAITED", "TOKENS", "LAUNCH"]
    assert first.split()[:5] == ["req_1", "running", "realtime", "chat", "model"]
    assert second.split()[:5] == ["req_2", "queued", "batch", "bulk", "model"]
    assert "1.5 s" in second


def test_requests_as_json_and_filtered(box):
    shown = json.loads("\n".join(box.lines("requests", "--class", "batch", "--json")))
    assert [(row["id"], row["class"]) for row in shown["data"]] == [("req_2", "batch")]
    assert len(box.lines("requests", "--state", "running", "--owner", "chat", "--model", "model")) == 2
    more = box.run("requests", "--limit", "1")
    assert "There are more: --limit 2" in more.err


def test_a_wrong_filter_is_told_by_the_daemon(box):
    refused = box.run("requests", "--state", "done")
    assert refused.code == 1
    assert "state" in refused.err


def test_cancelling(box):
    assert box.lines("requests", "cancel", "req_1", "req_2") == [
        "req_1  cancelled (was running)", "req_2  cancelled (was queued)",
    ]  # fmt: skip
    gone = box.run("requests", "cancel", "req_1")
    assert (gone.code, gone.out) == (1, "")
    assert "Not under way, or not yours to cancel: req_1" in gone.err


def test_one_that_is_over_does_not_keep_the_others_alive(box):
    result = box.run("requests", "cancel", "req_1", "req_9", "req_2")
    assert (result.code, result.out) == (1, "req_1  cancelled (was running)\nreq_2  cancelled (was queued)\n")
    assert result.err.endswith("cancel: req_9.\n")


@pytest.mark.parametrize(
    ("width", "missing"),
    [(140, []), (80, ["LAUNCH"]), (62, ["LAUNCH", "WAITED"]), (40, ["LAUNCH", "WAITED", "MODEL", "CLASS"])],
)
def test_columns_are_left_out_on_a_narrow_terminal(box, width, missing):
    result = box.run("requests", terminal=True, env={"COLUMNS": str(width)})
    header, *rows = text.harmless(result.out, colours=False).splitlines()
    assert header.split() == [name for name in HEADER if name not in missing]
    assert [row.split()[0] for row in rows] == ["req_1", "req_2"]
    told = f"Not shown, this terminal is too narrow: {', '.join(name for name in HEADER if name in missing)}.\n"
    assert result.err == (told if missing else "")


def test_cancelling_as_json(box):
    shown = json.loads("\n".join(box.lines("requests", "cancel", "req_1", "--json")))
    assert shown["data"] == [{"api_version": "v1", "id": "req_1", "state": "running", "cancelled": True}]


def test_following_in_a_pipe_tells_changes(box, monkeypatch):
    from vllm_bootstrap.cli import traffic  # noqa: PLC0415 - its pause is changed here

    told = []
    looked = threading.Event()

    def pause(_seconds):
        if not looked.is_set():
            looked.set()
            box.services.requests.cancel("req_1")
            return
        raise KeyboardInterrupt

    monkeypatch.setattr(traffic.time, "sleep", pause)
    told = box.lines("requests", "--follow")
    assert [line.split("  ")[:2] for line in told] == [["req_1", "running"], ["req_2", "queued"], ["req_1", "over"]]


def test_history_is_a_table_of_what_ended(kept):
    header, *rows = kept.lines("activity")
    assert header.split()[:4] == ["TIME", "STATUS", "CLASS", "OWNER"]
    assert [row.split()[-1] for row in rows] == ["req_3", "req_2", "req_1"]
    assert "429 queue_full" in rows[0]
    assert "2027-01-15 08:01:00Z" in rows[1]
    assert "120 ms" in rows[1]
    assert len(kept.lines("activity", "--status", "4xx")) == 2
    assert [row.split()[-1] for row in kept.lines("activity", "--since", "2027-01-15T08:00:30+00:00")[1:]] == ["req_2"]
    assert [row["id"] for row in json.loads("\n".join(kept.lines("activity", "--limit", "1", "--json")))["data"]] == [
        "3"
    ]


def test_sums(kept):
    lines = kept.lines("usage")
    assert [line.split() for line in lines[1:]] == [
        ["alice", "realtime", "model", "2", "1", "14", "11"], ["bob", "batch", "model", "1", "0", "7", "11"],
    ]  # fmt: skip
    assert "goes back to" in kept.run("usage").err


def test_a_daemon_without_history_says_so(box):
    refused = box.run("activity")
    assert refused.code == 1
    assert "VLLM_BOOTSTRAP_ACTIVITY_ROWS is 0" in refused.err


@pytest.mark.parametrize("since", ["yesterday", "5", "-2h", "2h30m"])
def test_a_time_that_is_none_is_a_usage_error(box, since):
    refused = box.run("activity", f"--since={since}")
    assert refused.code == 2
    assert "write it as" in refused.err


def test_ps_and_status_show_queue_and_budget(box):
    launch = view(capacity=32)
    box.launches.add(launch)
    box.services.gate.reports[launch.launch_id] = REPORT
    header, row = box.lines("ps")
    assert header.split()[-1] == "BATCH"
    assert row.endswith("5 of 12")
    shown = box.lines("status", launch.launch_id)
    assert "requests   2 (2 realtime) running on 32 slots, 3 (3 batch) queued, the oldest for 1.5 s" in shown
    assert "batch      5 of 12 allowed (32 slots, 4 kept for realtime): Realtime is active." in shown


def test_ones_own_request_with_a_key_for_inference_alone(tmp_path):
    services = make([key("chat", "realtime"), key("watch", "monitor")])
    with Box(tmp_path, services) as made:
        under_way(services, "req_1", owner="chat")
        assert made.run("requests", env={"VLLM_BOOTSTRAP_KEY": "chat"}).code == 1
        assert made.run("requests", "cancel", "req_1", env={"VLLM_BOOTSTRAP_KEY": "chat"}).code == 0
        wait_for(lambda: services.requests.get("req_1") is None, 5, what="the request to be over")
