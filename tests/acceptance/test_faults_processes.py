"""What happens to the processes of a launch, seen through the daemon: deaths of each kind, hangs, late starts."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support import orphans
from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for
from vllm_bootstrap.engines.simulator.deaths import DEATHS

KEYS = {"keys": [
    {"name": "root", "token": "k-admin", "scopes": ["admin", "logs"]},
    {"name": "eyes", "token": "k-monitor", "scopes": ["monitor"]},
    {"name": "reader", "token": "k-logs", "scopes": ["monitor", "logs"]},
]}  # fmt: skip
TREE_GONE_S = 10.0


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(devices="mock:4", stop_grace_s="1.5", restart_backoff_s="0.1") as running:
        yield running


def child_of(pid: int, level: int = 1) -> int:
    """The first child (level 1) or grandchild (2) of an engine's main process."""
    for _ in range(level):
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return pid


VICTIMS = {
    "server": lambda status: status["pid"],
    "engine core": lambda status: child_of(status["pid"]),
    "worker": lambda status: child_of(status["pid"], 2),
    "shim": lambda status: status["shim_pid"],
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_kill_minus_nine_of_any_process_takes_all_of_them_and_frees_the_gpus(daemon, victim):
    status = daemon.ready(gpu_ids=[0, 1], tensor_parallel_size=2, knobs={"fork-setsid-child": True})
    tree = orphans.marked(daemon.state_id)
    # shim, server, engine core, two workers, the daemonised child
    assert len(tree) == 6
    began = time.monotonic()
    os.kill(VICTIMS[victim](status), signal.SIGKILL)
    wait_for(lambda: not orphans.marked(daemon.state_id), TREE_GONE_S)
    ended = daemon.wait_state(status["launch_id"], "failed", timeout_s=TREE_GONE_S)
    assert time.monotonic() - began < TREE_GONE_S
    assert ended["failure"]["class"] in {
        "server": {"killed_by_signal"}, "shim": {"shim_lost"},
        "engine core": {"engine_died"}, "worker": {"engine_died"},
    }[victim]  # fmt: skip
    assert all(not gpu["claims"] for gpu in daemon.request("GET", "/gpus").json()["data"])
    daemon.assert_no_leftovers()


def test_an_exit_with_zero_that_nobody_asked_for_is_a_crash_and_restarted(daemon):
    # The answer that shows it ready counts as well.
    status = daemon.ready(
        knobs={"exit-zero-after": 2}, restart={"policy": "on-failure", "max_attempts": 2, "backoff_s": 0.1}
    )
    launch_id = status["launch_id"]
    asked = {"model": "sim", "prompt": "a", "max_tokens": 1}
    assert daemon.request("POST", f"/proxy/{launch_id}/v1/completions", asked).status == 200
    wait_for(lambda: daemon.status(launch_id)["attempt"] == 2 and daemon.status(launch_id)["state"] == "ready", 15)
    assert daemon.request("POST", f"/proxy/{launch_id}/v1/completions", asked).status == 200
    failure = daemon.wait_state(launch_id, "failed")["failure"]
    assert (failure["class"], failure["exit_code"]) == ("engine_died", 0)
    assert failure["hint"]
    events = daemon.request("GET", f"/status/{launch_id}/events").json()["data"]
    assert [e["to_state"] for e in events if e["event"] == "released"] == ["bootstrapping", "failed"]
    daemon.assert_no_leftovers()


def test_an_ignored_sigterm_is_reported_as_forced_within_the_grace_and_an_obeyed_one_is_not(daemon):
    stubborn = daemon.ready(knobs={"ignore-sigterm": True, "fork-setsid-child": True})
    obedient = daemon.ready()
    began = time.monotonic()
    assert daemon.stop_launch(stubborn["launch_id"]).json()["forced"] is True
    assert 1.0 < time.monotonic() - began < 1.5 + 3
    assert daemon.stop_launch(obedient["launch_id"]).json()["forced"] is False
    daemon.assert_no_leftovers()


def test_every_death_at_start_is_named_with_a_hint_and_only_passing_ones_are_tried_again(tmp_path):
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps(KEYS))
    with DaemonProcess(devices="mock:16", auth_keys_file=keys, key="k-admin", restart_backoff_s="0.1") as daemon:
        policy = {"policy": "on-failure", "max_attempts": 2}
        launched = {name: daemon.launch(knobs={"die-at-boot": name}, restart=policy) for name in DEATHS}
        for name, launch_id in launched.items():
            found = daemon.wait_state(launch_id, "failed", timeout_s=40)
            failure = found["failure"]
            assert failure["class"] == DEATHS[name].failure_class, name
            assert failure["hint"], name
            assert failure["message"], name
            assert found["attempt"] == (1 if failure["permanent"] else 2), name
            if DEATHS[name].signal is None:
                assert failure["exit_code"] == DEATHS[name].exit_code, name
                assert failure["lines"], name
        permanent = {name for name, key in launched.items() if daemon.status(key)["failure"]["permanent"]}
        assert {"bad_flag", "model_not_found", "gated_repository"} <= permanent
        assert not {"engine_died", "killed_by_signal", "address_in_use"} & permanent
        for path in (f"/status/{launched['bad_flag']}", "/launches?all=true"):
            seen = {key: daemon.request("GET", path, key=key).json() for key in ("k-monitor", "k-logs")}
            rows = {key: body.get("data", [body]) for key, body in seen.items()}
            assert all(row["failure"]["lines"] is None for row in rows["k-monitor"])
            assert all(row["failure"]["lines"] is not None for row in rows["k-logs"])
        daemon.assert_no_leftovers()


def test_a_start_without_progress_is_given_up_and_a_slow_one_with_progress_is_not():
    with DaemonProcess(start_timeout_s="2.5", start_stall_timeout_s="2.5", stop_grace_s="1") as daemon:
        slow = daemon.launch("org/slow", knobs={"download-seconds": 4.5})
        stuck = daemon.launch("org/stuck", knobs={"never-ready": True})
        wait_for(lambda: (daemon.status(slow)["progress"] or {}).get("downloaded_bytes"), 5)
        ended = daemon.wait_state(stuck, "failed", timeout_s=10)
        assert ended["failure"]["class"] == "start_timeout"
        found = daemon.wait_state(slow, "ready", timeout_s=15)
        began, ready = (found["transitions"][state] for state in ("bootstrapping", "ready"))
        assert ready > began
        events = daemon.request("GET", f"/status/{slow}/events").json()["data"]
        assert next(e["detail"]["seconds"] for e in events if e["event"] == "became_ready") > 4
        daemon.stop_launch(slow)
        daemon.assert_no_leftovers()


class Stream(threading.Thread):
    """A streamed completion that runs beside the test; how many pieces have come, and whether it ended well."""

    def __init__(self, daemon: DaemonProcess, launch_id: str, tokens: int) -> None:
        super().__init__()
        self._daemon, self._path, self._tokens = daemon, f"/proxy/{launch_id}/v1/completions", tokens
        self.pieces, self.tail = 0, b""
        self.start()

    def run(self) -> None:
        connection = self._daemon.connection(60)
        body = {"model": "sim", "prompt": "a", "max_tokens": self._tokens, "stream": True, "ignore_eos": True}
        connection.request("POST", self._path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        while piece := answer.readline():
            self.pieces += piece.startswith(b"data: ")
            self.tail = piece if piece.strip() else self.tail
        connection.close()


@pytest.mark.parametrize("frozen", ["engine core", "server"])
def test_a_frozen_engine_gets_no_requests_until_it_moves_again(frozen):
    times = {"unresponsive_after_s": "1", "unhealthy_after_s": "60", "probe_timeout_s": "0.5"}
    with DaemonProcess(devices="mock:1", **times) as daemon:
        status = daemon.ready(knobs={"tokens-per-second": 20})
        launch_id = status["launch_id"]
        stream = Stream(daemon, launch_id, 30)
        wait_for(lambda: stream.pieces > 3)
        victim = VICTIMS[frozen](status)
        os.kill(victim, signal.SIGSTOP)
        try:
            began = time.monotonic()
            wait_for(lambda: daemon.status(launch_id)["unresponsive"], 6)
            assert time.monotonic() - began < 5
            assert daemon.status(launch_id)["state"] == "ready"
            asked = {"model": "sim", "prompt": "a", "max_tokens": 1}
            by_model = daemon.request("POST", "/v1/completions", asked)
            by_id = daemon.request("POST", f"/proxy/{launch_id}/v1/completions", asked)
            assert by_model.status == 503
            assert 1 <= int(by_model.headers["retry-after"]) <= 60
            assert by_id.status in {409, 503}
            assert 1 <= int(by_id.headers["retry-after"]) <= 60
        finally:
            os.kill(victim, signal.SIGCONT)
        wait_for(lambda: not daemon.status(launch_id)["unresponsive"], 6)
        assert daemon.request("POST", "/v1/completions", asked).status == 200
        stream.join(20)
        assert stream.tail == b"data: [DONE]\n"
        events = [e["event"] for e in daemon.request("GET", f"/status/{launch_id}/events").json()["data"]]
        assert events[-2:] == ["unresponsive", "responsive"]
