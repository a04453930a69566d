"""The daemon goes and comes back: killed, told to leave, told to stop, told twice."""

import contextlib
import http.client
import json
import os
import signal
import sqlite3
import subprocess
import threading
import time

import pytest

from tests.support import orphans
from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

BACK_WITHIN_S = 5.0
ASKED = {"model": "sim", "prompt": "a", "max_tokens": 1}


def chat(daemon: DaemonProcess, launch_id: str) -> int:
    return daemon.request("POST", f"/proxy/{launch_id}/v1/completions", ASKED).status


class Events:
    """An event stream read in a thread: the ids and data that came, and whether it ended."""

    def __init__(self, daemon: DaemonProcess, path: str, **headers: str) -> None:
        self.events: list[tuple[str, dict]] = []
        self._connection = daemon.connection(30)
        self._connection.request("GET", path, headers={"accept": "text/event-stream", **headers})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        self.over = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        event_id = ""
        with contextlib.suppress(OSError, http.client.HTTPException):
            while line := self._answer.readline().decode():
                if line.startswith("id: "):
                    event_id = line[4:].strip()
                elif line.startswith("data: "):
                    self.events.append((event_id, json.loads(line[6:])))
        self.over.set()
        self._connection.close()


def test_a_killed_daemon_is_back_within_five_seconds_and_everything_goes_on():
    """Three launches: one serves while streams are open, one is loading, one is stopping."""
    with DaemonProcess(devices="mock:3", stop_grace_s="6") as daemon:
        serving = daemon.ready(gpu_ids=[0], knobs={"log-bytes-per-second": 20_000, "fork-setsid-child": True})
        loading = daemon.launch(gpu_ids=[1], knobs={"boot-delay": 3.0})
        stopping = daemon.ready(gpu_ids=[2], knobs={"slow-stop": 1.5})["launch_id"]
        serving_id = serving["launch_id"]
        logs = Events(daemon, f"/logs/{serving_id}?offset=0&follow=true")
        history = Events(daemon, f"/status/{loading}/events")
        daemon.stop_launch(stopping, wait="false")
        wait_for(lambda: daemon.status(loading)["pid"] and logs.events)
        loading_pid = daemon.status(loading)["pid"]
        wait_for(lambda: daemon.status(stopping)["state"] == "stopping")
        daemon.kill()
        assert logs.over.wait(5)
        assert history.over.wait(5)

        began = time.monotonic()
        daemon.start()
        assert chat(daemon, serving_id) == 200
        assert time.monotonic() - began < BACK_WITHIN_S
        again = daemon.status(serving_id)
        for what in ("pid", "shim_pid", "attempt", "created_at", "gpus"):
            assert again[what] == serving[what]
        assert again["attempt"] == 1

        seen = daemon.status(loading)
        assert (seen["pid"], seen["attempt"]) == (loading_pid, 1)
        assert daemon.wait_state(loading, "ready")["pid"] == loading_pid
        assert daemon.wait_state(stopping, "stopped")["failure"] is None

        last_id, last = logs.events[-1]
        resumed = Events(daemon, f"/logs/{serving_id}", **{"last-event-id": last_id})
        wait_for(lambda: resumed.events)
        assert resumed.events[0][1]["offset"] == last["next_offset"] == int(last_id)
        assert chat(daemon, loading) == 200
        for launch_id in (serving_id, loading):
            assert daemon.stop_launch(launch_id).json()["state"] == "stopped"
        daemon.assert_no_leftovers()


def test_ends_that_nobody_watched_are_known_afterwards():
    with DaemonProcess(devices="mock:3") as daemon:
        crashed, killed, shimless = (daemon.ready(gpu_ids=[gpu], knobs={"fork-setsid-child": True}) for gpu in range(3))
        daemon.kill()
        os.kill(crashed["pid"], signal.SIGTERM)
        os.kill(killed["pid"], signal.SIGKILL)
        os.kill(shimless["shim_pid"], signal.SIGKILL)
        daemon.start()
        failures = [daemon.wait_state(s["launch_id"], "failed")["failure"] for s in (crashed, killed, shimless)]
        assert (failures[0]["class"], failures[0]["exit_code"]) == ("engine_died", 0)
        assert (failures[1]["class"], failures[1]["signal"]) == ("killed_by_signal", signal.SIGKILL)
        assert failures[2]["class"] == "shim_lost"
        assert all(failure["hint"] for failure in failures)
        assert all(not gpu["claims"] for gpu in daemon.request("GET", "/gpus").json()["data"])
        daemon.assert_no_leftovers()


def test_a_pid_that_belongs_to_somebody_else_by_now_is_never_signalled():
    """The stored number of shim and engine is a stranger's when the daemon comes back."""
    with DaemonProcess(devices="mock:1") as daemon, subprocess.Popen(["sleep", "60"], cwd="/") as stranger:
        try:
            status = daemon.ready()
            daemon.kill()
            os.kill(status["shim_pid"], signal.SIGKILL)
            wait_for(lambda: status["pid"] not in orphans.marked(daemon.state_id))
            with contextlib.closing(sqlite3.connect(daemon.state_dir / "state.db")) as db, db:
                handle, engine = db.execute("SELECT handle, engine FROM attempts").fetchone()
                handle, engine = json.loads(handle), json.loads(engine)
                handle["identity"]["pid"] = engine["pid"] = stranger.pid
                db.execute("UPDATE attempts SET handle = ?, engine = ?", (json.dumps(handle), json.dumps(engine)))
            daemon.start()
            failure = daemon.wait_state(status["launch_id"], "failed")["failure"]
            assert failure["class"] == "shim_lost"
            assert daemon.stop() == 0
            assert stranger.poll() is None
            daemon.assert_no_leftovers()
        finally:
            stranger.kill()


@pytest.mark.parametrize("signals", [1, 2])
def test_told_to_leave_it_leaves_models_running_and_finds_them_again(signals):
    """However often it is told: a second signal is no wish to end models."""
    with DaemonProcess(devices="mock:2", on_shutdown="leave") as daemon:
        serving = daemon.ready(gpu_ids=[0], knobs={"tokens-per-second": 5})
        loading = daemon.launch(gpu_ids=[1], knobs={"boot-delay": 1.5})
        wait_for(lambda: daemon.status(loading)["pid"])
        # A request that is still running keeps the daemon busy leaving, so that a second signal finds it alive.
        slow = {**ASKED, "max_tokens": 200, "ignore_eos": True, "stream": True}
        with contextlib.closing(daemon.connection(30)) as request:
            request.request("POST", "/v1/completions", json.dumps(slow), {"content-type": "application/json"})
            assert request.getresponse().status == 200
            before = orphans.marked(daemon.state_id)
            daemon.send_signal(signal.SIGTERM)
            if signals == 2:
                wait_for(lambda: "Leaving" in daemon.log)
                daemon.send_signal(signal.SIGTERM)
            assert daemon.process.wait(10) == 0
            # The one that is loading may have got children meanwhile.
            assert set(before) <= set(orphans.marked(daemon.state_id))
        daemon.start()
        assert chat(daemon, serving["launch_id"]) == 200
        assert daemon.status(serving["launch_id"])["pid"] == serving["pid"]
        assert daemon.wait_state(loading, "ready")["attempt"] == 1


def test_told_to_stop_it_says_so_to_streams_that_engines_leave_unfinished():
    """One engine goes at once, one is killed when its grace is over; neither is blamed."""
    with DaemonProcess(devices="mock:2", stop_grace_s="1") as daemon:
        meek = daemon.ready(gpu_ids=[0])["launch_id"]
        stubborn = daemon.ready(gpu_ids=[1], knobs={"ignore-sigterm": True})["launch_id"]
        with contextlib.ExitStack() as stack:
            streams = []
            for launch in (meek, stubborn):
                stream = stack.enter_context(contextlib.closing(daemon.connection()))
                body = json.dumps({**ASKED, "max_tokens": 4000, "ignore_eos": True, "stream": True})
                stream.request("POST", f"/proxy/{launch}/v1/completions", body, {"content-type": "application/json"})
                streams.append(stream.getresponse())
                assert streams[-1].readline().startswith(b"data: ")
            daemon.send_signal(signal.SIGTERM)
            for stream in streams:
                rest = stream.read()
                assert json.loads(rest.rpartition(b"data: ")[2])["error"]["code"] == "draining"
                assert b"[DONE]" not in rest
        assert daemon.process.wait(15) == 0


def test_told_to_stop_it_ends_everything_within_ten_seconds():
    """With the grace as it is by default and engines that do their worst."""
    with DaemonProcess(devices="mock:4", stop_grace_s="7") as daemon:
        stubborn = daemon.ready(gpu_ids=[0], knobs={"ignore-sigterm": True, "fork-setsid-child": True})["launch_id"]
        daemon.launch(gpu_ids=[1], knobs={"boot-delay": 30})
        daemon.launch(gpu_ids=[2], knobs={"never-ready": True})
        daemon.ready(gpu_ids=[3])
        began = time.monotonic()
        daemon.send_signal(signal.SIGTERM)
        wait_for(lambda: "(operator)" in daemon.log)
        late = daemon.request("POST", "/launch", {"model": "sim", "engine": "simulator", "gpu_ids": [3]})
        assert (late.status, late.error["code"]) == (503, "draining")
        assert daemon.process.wait(15) == 0
        assert time.monotonic() - began < 10
        assert orphans.marked(daemon.state_id) == []
        daemon.assert_no_leftovers(1)
        daemon.start()
        assert daemon.request("GET", "/launches").json()["data"] == []
        assert daemon.status(stubborn)["state"] == "stopped"


def test_a_second_signal_cuts_the_grace_short():
    with DaemonProcess(devices="mock:2", stop_grace_s="60") as daemon:
        daemon.ready(knobs={"ignore-sigterm": True})
        daemon.ready(knobs={"slow-stop": 60})
        daemon.send_signal(signal.SIGTERM)
        wait_for(lambda: daemon.log.count("(operator)") == 2)
        began = time.monotonic()
        daemon.send_signal(signal.SIGTERM)
        assert daemon.process.wait(10) == 0
        assert time.monotonic() - began < 4
        daemon.assert_no_leftovers(1)


def test_launches_that_are_being_accepted_while_it_stops_are_refused_or_stopped_too():
    with DaemonProcess(devices="mock:8", stop_grace_s="2") as daemon:
        answers: list[int] = []

        def keep_launching() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    wish = {"model": "sim", "engine": "simulator", "gpu_count": 1}
                    answers.append(daemon.request("POST", "/launch", wish).status)

        clients = [threading.Thread(target=keep_launching) for _ in range(4)]
        for client in clients:
            client.start()
        wait_for(lambda: answers)
        assert daemon.stop() == 0
        for client in clients:
            client.join(20)
        assert set(answers) <= {201, 409, 503}
        daemon.assert_no_leftovers(2)
