"""Several engines under one name: launched together, used together, dying apart, stopped together."""

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import openai
import pytest

from tests.support import orphans
from tests.support.daemon import ENDED, DaemonProcess
from tests.support.waiting import wait_for
from vllm_bootstrap.client import Client

PROMPT = {"model": "sim", "prompt": "one two three", "max_tokens": 3}


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(devices="mock:4", stop_grace_s="2") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left_running(daemon):
    """What a failed test leaves must not fail the next one."""
    yield
    for launch in daemon.request("GET", "/launches").json()["data"]:
        daemon.stop_launch(launch["launch_id"], force="true")


def launch_group(daemon: DaemonProcess, replicas, *, knobs=None, headers=None, **fields):
    """The answer to a launch of replicas."""
    wish = {"model": "sim", "engine": "simulator", "replicas": replicas, "extra_args": knobs or {}, **fields}
    return daemon.request("POST", "/launch", wish, headers, timeout_s=60)


def ready_group(daemon: DaemonProcess, replicas, **fields) -> dict:
    """Launch replicas and wait until all are ready; the group's status."""
    answer = launch_group(daemon, replicas, **fields)
    assert answer.status == 201, answer.body
    group = answer.json()
    for launch in group["replicas"]:
        daemon.wait_state(launch["launch_id"], "ready", timeout_s=40)
    return daemon.status(group["group_id"])


def ids_of(group: dict) -> list[str]:
    return [launch["launch_id"] for launch in group["replicas"]]


def free_gpus(daemon: DaemonProcess) -> list[str]:
    return [gpu["uuid"] for gpu in daemon.request("GET", "/gpus").json()["data"] if gpu["state"] == "free"]


def ask(daemon: DaemonProcess, path: str = "/v1/completions", **fields):
    return daemon.request("POST", path, {**PROMPT, **fields}, timeout_s=60)


def ask_many(daemon: DaemonProcess, count: int, path: str = "/v1/completions") -> Counter:
    """Who answered, with ``count`` requests at a time of which none ends at once."""
    with ThreadPoolExecutor(count) as clients:
        answers = list(clients.map(lambda _: ask(daemon, path, prompt="a " * 20, max_tokens=20), range(count)))
    assert {answer.status for answer in answers} == {200}
    return Counter(answer.headers["x-launch-id"] for answer in answers)


def stop(daemon: DaemonProcess, group_id: str, **query: str):
    return daemon.stop_launch(group_id, **query)


# -- launching ---------------------------------------------------------------------------------------------------------


def test_one_engine_on_each_gpu_and_traffic_spreads_over_them(daemon):
    group = ready_group(daemon, "per_gpu")
    ids, group_id = ids_of(group), group["group_id"]
    assert (group["object"], group["state"], group["ready"]) == ("group", "ready", 4)
    assert sorted(gpu["uuid"] for gpu in group["gpus"]) == [f"GPU-mock-{n}" for n in range(4)]
    assert [len(launch["gpus"]) for launch in group["replicas"]] == [1, 1, 1, 1]
    assert all((launch["group_id"], launch["group_size"]) == (group_id, 4) for launch in group["replicas"])
    assert ids == sorted(ids)
    for path in ("/v1/completions", f"/proxy/{group_id}/v1/completions"):
        assert ask_many(daemon, 16, path) == dict.fromkeys(ids, 4)
    one = ids[2]
    assert ask_many(daemon, 4, f"/proxy/{one}/v1/completions") == {one: 4}
    loaded = daemon.status(group_id)["load"]
    assert loaded["capacity"] == sum(launch["load"]["capacity"] for launch in group["replicas"])
    (model,) = daemon.request("GET", "/v1/models").json()["data"]
    assert sorted(model["launch_ids"]) == ids
    assert stop(daemon, group_id).json()["state"] == "stopped"
    daemon.assert_no_leftovers()


def test_gpus_are_divided_evenly_and_shares_are_spread(daemon):
    group = ready_group(daemon, 2)
    assert [[gpu["index"] for gpu in launch["gpus"]] for launch in group["replicas"]] == [[0, 1], [2, 3]]
    stop(daemon, group["group_id"])
    group = ready_group(daemon, 4, gpu_ids=[1, 3], gpu_share=0.5)
    assert [[gpu["index"] for gpu in launch["gpus"]] for launch in group["replicas"]] == [[1], [3], [1], [3]]
    assert free_gpus(daemon) == ["GPU-mock-0", "GPU-mock-2"]
    stop(daemon, group["group_id"])
    assert len(free_gpus(daemon)) == 4


def test_what_does_not_fit_is_refused_whole(daemon):
    taken = daemon.ready(gpu_ids=[1])["launch_id"]
    for wish, fits in (({"replicas": 4, "gpu_count": 1}, 3), ({"replicas": 2}, 1)):
        answer = launch_group(daemon, **wish)
        assert (answer.status, answer.error["code"]) == (409, "gpu_conflict")
        assert answer.error["replicas_that_fit"] == fits
        assert taken in answer.error["message"]
        assert answer.headers["x-should-retry"] == "false"
    for wish in ({"replicas": 5, "gpu_count": 1}, {"replicas": 3}, {"replicas": 65}, {"replicas": 0}):
        answer = launch_group(daemon, **wish)
        assert (answer.status, answer.error["param"]) == (400, "replicas"), answer.body
    assert len(free_gpus(daemon)) == 3
    group = ready_group(daemon, "per_gpu")  # every GPU that is free
    assert sorted(gpu["index"] for gpu in group["gpus"]) == [0, 2, 3]
    answer = launch_group(daemon, "per_gpu")
    assert (answer.status, answer.error["replicas_that_fit"]) == (409, 0)
    stop(daemon, group["group_id"])


def test_the_same_request_again_gives_the_same_group(daemon):
    headers = {"idempotency-key": "group-1"}
    with ThreadPoolExecutor(6) as clients:
        sent = [clients.submit(launch_group, daemon, 2, gpu_count=1, headers=headers) for _ in range(6)]
        answers = [future.result() for future in sent]
    assert {answer.status for answer in answers} == {201}
    (group_id,) = {answer.json()["group_id"] for answer in answers}
    (ids,) = {tuple(ids_of(answer.json())) for answer in answers}
    other = launch_group(daemon, 3, gpu_count=1, headers=headers)
    assert (other.status, other.error["code"]) == (409, "conflict")
    stop(daemon, group_id, force="true")
    daemon.request("DELETE", f"/launches/{ids[0]}")  # what is left of the group still answers for it
    assert ids_of(launch_group(daemon, 2, gpu_count=1, headers=headers).json()) == [ids[1]]
    assert daemon.request("DELETE", f"/launches/{group_id}").status == 200


def test_of_groups_that_want_the_same_gpus_exactly_one_wins_whole(daemon):
    def wish(number: int):
        return launch_group(daemon, 4, gpu_count=1) if number % 2 else launch_group(daemon, 3, gpu_count=1)

    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(wish, range(12)))
    winners = [answer.json() for answer in answers if answer.status == 201]
    losers = [answer for answer in answers if answer.status != 201]
    assert len(winners) == 1
    assert {answer.status for answer in losers} == {409}
    (group,) = winners
    for answer in losers:
        named = {owner for gpu in answer.error["gpus"] for owner in gpu["owners"]}
        assert named
        assert named <= set(ids_of(group))
    active = daemon.request("GET", "/launches").json()["data"]
    assert sorted(launch["launch_id"] for launch in active) == ids_of(group)
    for launch in active:
        daemon.wait_state(launch["launch_id"], "ready", timeout_s=40)
    assert len(free_gpus(daemon)) == 4 - len(active)
    stop(daemon, group["group_id"])
    daemon.assert_no_leftovers()


# -- looking -----------------------------------------------------------------------------------------------------------


def test_a_group_has_one_status_one_history_and_a_log_for_each_replica(daemon):
    group = ready_group(daemon, 2, gpu_count=1)
    group_id, ids = group["group_id"], ids_of(group)
    alone = daemon.ready(gpu_count=1)
    assert (alone["group_id"], alone["group_size"]) == (alone["launch_id"], 1)
    found = daemon.request("GET", f"/launches?group={group_id}").json()["data"]
    assert sorted(launch["launch_id"] for launch in found) == ids
    rows = daemon.request("GET", f"/status/{group_id}/events").json()["data"]
    assert [row["seq"] for row in rows] == sorted(row["seq"] for row in rows)
    assert Counter((row["launch_id"], row["event"]) for row in rows) == {
        (launch_id, event): 1 for launch_id in ids for event in ("created", "became_ready")
    }
    answer = daemon.request("GET", f"/logs/{group_id}")
    assert (answer.status, answer.error["param"], answer.error["replicas"]) == (400, "launch_id", ids)
    assert daemon.engine_log(ids[0])
    assert daemon.request("DELETE", f"/launches/{group_id}").status == 409
    assert stop(daemon, ids[0]).json()["replicas"] == []
    half = daemon.status(group_id)
    assert (half["state"], half["ready"]) == ("ready", 1)
    assert daemon.request("DELETE", f"/launches/{group_id}").status == 409
    stop(daemon, group_id)
    gone = ask(daemon, f"/proxy/{group_id}/v1/completions")
    assert (gone.status, gone.error["code"]) == (409, "launch_not_ready")
    assert gone.headers["x-should-retry"] == "false"
    assert daemon.request("DELETE", f"/launches/{group_id}").status == 200
    for path in (f"/status/{group_id}", f"/status/{ids[1]}", f"/logs/{ids[1]}"):
        assert daemon.request("GET", path).status == 404
    assert ask(daemon, f"/proxy/{group_id}/v1/completions").status == 404


def test_stopping_a_group_stops_all_of_it_and_says_how(daemon):
    group = ready_group(daemon, "per_gpu", knobs={"slow-stop": 0.5})
    group_id, ids = group["group_id"], ids_of(group)
    accepted = stop(daemon, group_id, wait="false")
    assert accepted.status == 202
    ended = stop(daemon, group_id).json()
    steps = [launch["transitions"] for launch in daemon.status(group_id)["replicas"]]
    begun, over = ([datetime.fromisoformat(step[name]) for step in steps] for name in ("stopping", "stopped"))
    assert max(begun) < min(over), "they stop beside each other"
    assert (ended["launch_id"], ended["state"], ended["forced"], ended["unsettled_gpus"]) == (
        group_id, "stopped", False, [],
    )  # fmt: skip
    assert [(one["launch_id"], one["state"]) for one in ended["replicas"]] == [(one, "stopped") for one in ids]
    assert stop(daemon, group_id).json()["state"] == "stopped"
    assert len(free_gpus(daemon)) == 4
    daemon.assert_no_leftovers()


# -- dying -------------------------------------------------------------------------------------------------------------


class Users:
    """Stock clients with their usual retries, in threads, until told to stop. ``outcomes``: how each request that was
    begun after ``since`` ended."""

    def __init__(self, daemon: DaemonProcess, count: int) -> None:
        self._url, self._over = daemon.url, threading.Event()
        self.outcomes: list[tuple[float, str]] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self) -> None:
        with openai.OpenAI(base_url=f"{self._url}/v1", api_key="none", timeout=20) as client:
            while not self._over.is_set():
                began = time.monotonic()
                try:
                    client.completions.create(model="sim", prompt="a " * 10, max_tokens=10)
                    self.outcomes.append((began, "ok"))
                except openai.OpenAIError as exc:
                    self.outcomes.append((began, repr(exc)))

    def since(self, moment: float) -> Counter:
        return Counter(outcome for began, outcome in self.outcomes if began >= moment)


def stream_until_it_breaks(daemon: DaemonProcess, launch_id: str, begun: threading.Event) -> list[bytes]:
    """The lines of a stream from one replica."""
    connection = daemon.connection(30)
    body = b'{"model": "sim", "prompt": "' + b"a " * 2000 + b'", "max_tokens": 2000, "stream": true}'
    path = f"/proxy/{launch_id}/v1/completions"
    connection.request("POST", path, body, {"content-type": "application/json"})
    with contextlib.closing(connection), connection.getresponse() as answer:
        assert answer.status == 200
        lines = []
        while line := answer.readline():
            lines.append(line)
            begun.set()
    return lines


def test_a_killed_replica_is_felt_only_by_what_ran_on_it(daemon):
    """It comes back by its own restart policy, into the same group."""
    group = ready_group(daemon, "per_gpu", restart="on-failure")
    victim = group["replicas"][1]
    with Users(daemon, 8) as users, ThreadPoolExecutor(1) as streams:
        begun = threading.Event()
        streaming = streams.submit(stream_until_it_breaks, daemon, victim["launch_id"], begun)
        assert begun.wait(10)
        wait_for(lambda: users.since(0)["ok"] > 20)
        os.kill(victim["pid"], signal.SIGKILL)
        killed = time.monotonic()
        lines = streaming.result(20)
        wait_for(lambda: users.since(killed)["ok"] > 40)
        wait_for(lambda: daemon.status(victim["launch_id"])["attempt"] == 2)
        during = daemon.status(group["group_id"])
        back = daemon.wait_state(victim["launch_id"], "ready")
        again = time.monotonic()
        wait_for(lambda: users.since(again)["ok"] > 20)
    assert b"event: error\n" in lines or any(b'"error"' in line for line in lines)
    assert b"data: [DONE]\n" not in lines
    assert set(users.since(killed)) == {"ok"}
    assert during["state"] == "ready"
    assert [launch["attempt"] for launch in during["replicas"]].count(1) == 3
    assert back["group_id"] == group["group_id"]
    assert daemon.status(group["group_id"])["failure"] is None
    assert set(ask_many(daemon, 16)) == set(ids_of(group))
    stop(daemon, group["group_id"])
    daemon.assert_no_leftovers()


def test_a_group_without_a_restart_policy_goes_on_smaller_and_fails_with_its_last(daemon):
    group = ready_group(daemon, 2, gpu_count=1)
    group_id, (first, last) = group["group_id"], group["replicas"]
    os.kill(first["pid"], signal.SIGKILL)
    daemon.wait_state(first["launch_id"], "failed")
    smaller = daemon.status(group_id)
    assert (smaller["state"], smaller["ready"], smaller["failure"]["class"]) == ("ready", 1, "killed_by_signal")
    assert ask(daemon).headers["x-launch-id"] == last["launch_id"]
    os.kill(last["pid"], signal.SIGKILL)
    wait_for(lambda: daemon.status(group_id)["state"] in ENDED)
    assert daemon.status(group_id)["state"] == "failed"
    assert stop(daemon, group_id).json()["state"] == "failed"
    assert len(free_gpus(daemon)) == 4
    daemon.assert_no_leftovers()


# -- the daemon goes and comes back ------------------------------------------------------------------------------------


def test_a_killed_daemon_finds_its_groups_again():
    with DaemonProcess(devices="mock:4", stop_grace_s="2") as daemon:
        running = ready_group(daemon, 2, gpu_count=1)
        starting = launch_group(daemon, 2, gpu_count=1, knobs={"boot-delay": 2}).json()
        daemon.kill()
        died = running["replicas"][0]
        os.kill(died["pid"], signal.SIGKILL)
        daemon.start()
        found = daemon.status(running["group_id"])
        assert ids_of(found) == ids_of(running)
        wait_for(lambda: daemon.status(died["launch_id"])["state"] == "failed")
        smaller = daemon.status(running["group_id"])
        assert (smaller["state"], smaller["ready"]) == ("ready", 1)
        assert smaller["replicas"][1]["pid"] == running["replicas"][1]["pid"]
        for launch_id in ids_of(starting):
            assert daemon.wait_state(launch_id, "ready")["group_id"] == starting["group_id"]
        assert ask(daemon, f"/proxy/{starting['group_id']}/v1/completions").status == 200
        for group_id in (running["group_id"], starting["group_id"]):
            stop(daemon, group_id)
        daemon.restart()
        assert daemon.status(starting["group_id"])["state"] == "stopped"
        assert ask(daemon, f"/proxy/{starting['group_id']}/v1/completions").status == 409
        assert len(free_gpus(daemon)) == 4
        daemon.assert_no_leftovers()


def test_a_daemon_killed_while_it_accepts_a_group_has_all_of_it_or_nothing():
    with DaemonProcess(devices="mock:2", stop_grace_s="2") as daemon:
        for pause_s in (0.0, 0.01, 0.03, 0.1):
            sent = threading.Thread(target=_send_quietly, args=(daemon,))
            sent.start()
            time.sleep(pause_s)
            daemon.kill()
            sent.join(20)
            daemon.start()
            active = daemon.request("GET", "/launches").json()["data"]
            assert len(active) in {0, 2}
            if active:
                (group_id,) = {launch["group_id"] for launch in active}
                for launch in active:
                    daemon.wait_state(launch["launch_id"], "ready", timeout_s=40)
                stop(daemon, group_id)
            assert len(free_gpus(daemon)) == 2
            assert orphans.marked(daemon.state_id) == []
        daemon.assert_no_leftovers()


def _send_quietly(daemon: DaemonProcess) -> None:
    try:
        launch_group(daemon, "per_gpu")
    except OSError:
        return


# -- client and command line -------------------------------------------------------------------------------------------


def test_the_client_launches_waits_for_and_stops_a_group(daemon):
    with Client(daemon.url) as client:
        with client.launched("sim", engine="simulator", replicas=2, gpu_count=1) as launch:
            group = client.group(launch.id)
            assert (group.ready, len(group.replicas)) == (2, 2)
            with launch.openai() as stock:
                answer = stock.completions.create(model=launch.served_model_name, prompt="one", max_tokens=1)
            assert answer.choices[0].text
        assert client.group(launch.id).state == "stopped"
        assert [event.event for event in client.events(launch.id)].count("became_ready") == 2
