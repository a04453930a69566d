"""Requests under way and finished, against a running daemon and a simulated engine: seen, cancelled, remembered."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

ADMIN, CHAT, OTHER, WATCH = ("token-of-admin", "token-of-chat", "token-of-other", "token-of-watch")
SECRET = "a secret in a prompt"
ASKED = [{"role": "user", "content": SECRET}]
LONG = {"model": "sim", "messages": ASKED, "max_tokens": 20_000, "ignore_eos": True, "stream": True}
SHORT = {"model": "sim", "messages": [{"role": "user", "content": "one two three"}]}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    entries: list[dict[str, Any]] = [
        {"name": "admin", "token": ADMIN, "scopes": ["admin"]},
        {"name": "chat", "token": CHAT, "scopes": ["realtime"]},
        {"name": "other", "token": OTHER, "scopes": ["batch"]},
        {"name": "watch", "token": WATCH, "scopes": ["monitor"]},
    ]
    keys.write_text(json.dumps({"keys": entries}))
    keys.chmod(0o600)
    with DaemonProcess(auth_keys_file=keys, key=ADMIN) as made:
        made.ready(max_num_seqs=1, knobs={"tokens_per_second": 20})
        yield made


class Call:
    """A chat that streams until somebody ends it."""

    def __init__(self, daemon: DaemonProcess, key: str) -> None:
        self.connection = daemon.connection(30)
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(LONG), headers)

    def answer(self) -> http.client.HTTPResponse:
        return self.connection.getresponse()


def under_way(daemon: DaemonProcess, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = daemon.request("GET", f"/requests{query}", key=WATCH).json()["data"]
    return found


def cancel(daemon: DaemonProcess, name: str, key: str) -> int:
    return daemon.request("POST", f"/requests/{name}/cancel", key=key).status


def test_one_runs_one_waits_and_each_is_ended_by_those_who_may(daemon: DaemonProcess) -> None:
    first = Call(daemon, CHAT)
    running = first.answer()
    second = Call(daemon, OTHER)
    wait_for(lambda: under_way(daemon, "?state=queued"), 5, what="the second request to wait")
    (one,) = under_way(daemon, "?state=running")
    (two,) = under_way(daemon, "?state=queued")
    assert (one["owner"], one["class"], one["model"], one["stream"]) == ("chat", "realtime", "sim", True)
    assert (two["owner"], two["class"], two["launch_id"]) == ("other", "batch", None)
    assert running.headers["x-request-id"] == one["id"]
    wait_for(lambda: under_way(daemon, "?state=running")[0]["tokens"] > 2, 5, what="tokens to be counted")

    status = daemon.status(one["launch_id"])
    assert status["load"]["in_flight"]["realtime"] == 1
    assert status["load"]["queued"]["batch"] == 1
    assert status["load"]["oldest_wait_s"] >= 0
    assert status["load"]["batch"]["slots"] == 1
    assert len(status["load"]["batch"]["reason"]) > 10

    assert cancel(daemon, one["id"], OTHER) == 404
    assert cancel(daemon, one["id"], WATCH) == 403
    assert [found["id"] for found in under_way(daemon)] == [one["id"], two["id"]]
    assert cancel(daemon, two["id"], ADMIN) == 200
    refused = second.answer()
    assert (refused.status, json.loads(refused.read())["error"]["code"]) == (409, "cancelled")
    assert cancel(daemon, one["id"], CHAT) == 200
    ended = running.read()
    assert b"[DONE]" not in ended
    assert b'"cancelled"' in ended
    assert under_way(daemon) == []
    assert cancel(daemon, one["id"], CHAT) == 404
    wait_for(lambda: engine_running(daemon, one["launch_id"]) == 0, 1, 0.02, "the engine's slot to be free")
    for call in (first, second):
        call.connection.close()

    known = {row["request_id"]: row for row in daemon.request("GET", "/activity?model=sim", key=WATCH).json()["data"]}
    never_ran = known[two["id"]]
    assert (never_ran["status"], never_ran["code"], never_ran["launch_id"]) == (409, "cancelled", None)
    assert two["queue_ms"] <= never_ran["queue_ms"] <= never_ran["duration_ms"]
    assert (known[one["id"]]["status"], known[one["id"]]["code"]) == (200, "cancelled")


def engine_running(daemon: DaemonProcess, launch_id: str) -> float:
    text = daemon.request("GET", f"/proxy/{launch_id}/metrics").body.decode()
    found = re.search(r"^vllm:num_requests_running(?:\{.*\})? ([0-9.]+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_what_ended_is_remembered_without_its_content_over_a_kill(daemon: DaemonProcess) -> None:
    answer = daemon.request("POST", "/v1/chat/completions", {**SHORT, "max_tokens": 4}, key=CHAT)
    assert answer.status == 200
    used = answer.json()["usage"]
    assert daemon.request("POST", "/v1/chat/completions", {**SHORT, "model": "nope"}, key=CHAT).status == 404
    newest, before = daemon.request("GET", "/activity?limit=2", key=WATCH).json()["data"]
    assert (newest["status"], newest["code"], newest["owner"]) == (404, "model_not_found", "chat")
    assert newest["model"] is None
    assert (before["status"], before["model"], before["class"]) == (200, "sim", "realtime")
    assert before["request_id"] == answer.headers["x-request-id"]
    assert (before["prompt_tokens"], before["completion_tokens"]) == (used["prompt_tokens"], used["completion_tokens"])
    assert before["duration_ms"] > 0

    count = len(daemon.request("GET", "/activity").json()["data"])
    daemon.restart()
    assert len(daemon.request("GET", "/activity").json()["data"]) == count
    totals = {row["owner"]: row for row in daemon.request("GET", "/usage").json()["data"] if row["class"] == "realtime"}
    assert totals["chat"]["completion_tokens"] >= used["completion_tokens"]
    kept = b"".join(Path(path).read_bytes() for path in daemon.state_dir.glob("activity.db*"))
    assert SECRET.encode() not in kept
    assert CHAT.encode() not in kept


def test_it_was_counted(daemon: DaemonProcess) -> None:
    daemon.wait_state(daemon.request("GET", "/launches").json()["data"][0]["launch_id"], "ready")
    answer = daemon.request("POST", "/v1/chat/completions", {**SHORT, "stream": True, "max_tokens": 5}, key=CHAT)
    assert answer.status == 200
    text = daemon.request("GET", "/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name in (
        'admit_total{class="realtime",outcome="admitted"}',
        'ttft_seconds_count{class="realtime"}',
        'inter_token_seconds_count{class="realtime"}',
        'tokens_total{class="realtime",kind="completion",model="sim"}',
        'tokens_total{class="realtime",kind="prompt",model="sim"}',
        'proxy_requests_total{class="realtime",code="200"}',
    ):
        assert float(values[f"vllm_bootstrap_{name}"]) >= 1, name
    assert 'batch_allowance_sequences{model="sim"}' in text
