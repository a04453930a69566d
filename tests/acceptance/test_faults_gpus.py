"""GPUs that misbehave, seen through the daemon: others' use, NVML that fails, indices that change, late memory."""

import json
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

GIB = 1024**3
ASKED = {"model": "sim", "prompt": "a", "max_tokens": 1}


class Devices:
    """What the mock GPUs are to look like; the file is replaced as a whole, so that no half of it is ever read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.are()

    def are(self, **state) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(state))
        fresh.rename(self.path)


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    return Devices(tmp_path_factory.mktemp("gpus") / "gpus.json")


@pytest.fixture(scope="module")
def running(devices):
    with DaemonProcess(mock_gpu_file=devices.path, gpu_settle_timeout_s="1") as daemon:
        yield daemon


@pytest.fixture
def daemon(running, devices):
    devices.are()
    yield running
    devices.are()
    for launch in running.request("GET", "/launches").json()["data"]:
        running.stop_launch(launch["launch_id"], force="true")
    running.assert_no_leftovers()


def gpu(daemon: DaemonProcess, uuid: str) -> dict:
    return next(g for g in daemon.request("GET", "/gpus").json()["data"] if g["uuid"] == uuid)


def try_launch(daemon: DaemonProcess, **fields):
    return daemon.request("POST", "/launch", {"model": "sim", "engine": "simulator", **fields})


def devices_given_to(status: dict) -> str:
    entries = Path(f"/proc/{status['pid']}/environ").read_bytes().split(b"\0")
    return next(e.split(b"=", 1)[1].decode() for e in entries if e.startswith(b"CUDA_VISIBLE_DEVICES="))


@pytest.mark.parametrize("trusted", [True, False])
def test_others_use_is_named_as_far_as_visible_refused_and_left_alone(daemon, devices, trusted):
    # Nobody may act on a pid that the driver reports: this one would be init.
    process = {"uuid": "GPU-mock-0", "pid": 1, "user": "eve", "name": "train.py", "used_bytes": 5 * GIB}
    devices.are(used={"GPU-mock-0": 5 * GIB}, processes=[process], pids_trusted=trusted)
    shown = gpu(daemon, "GPU-mock-0")
    assert shown["state"] == "busy"
    assert [other["pid"] for other in shown["others"]] == ([1] if trusted else [])
    for wish in ({"gpu_ids": [0]}, {"gpu_count": 2}, {}):
        answer = try_launch(daemon, **wish)
        assert (answer.status, answer.error["code"]) == (409, "gpu_conflict")
        assert answer.headers["x-should-retry"] == "false"
        assert "5.0 GiB" in answer.error["message"]
        assert all(word in answer.error["message"] for word in ("pid 1", "train.py", "eve")) is trusted
    status = daemon.ready(gpu_count=1)  # the other GPU
    assert [g["uuid"] for g in status["gpus"]] == ["GPU-mock-1"]


def test_a_little_use_by_others_is_no_obstacle(daemon, devices):
    devices.are(used={"GPU-mock-0": GIB // 2})
    assert daemon.stop_launch(daemon.ready(gpu_ids=[0])["launch_id"]).json()["unsettled_gpus"] == []


@pytest.mark.parametrize("call", ["init", "handle", "memory", "one"])
def test_nvml_that_fails_shows_nothing_free_and_harms_nothing_that_runs(daemon, devices, call):
    launch_id = daemon.ready(gpu_ids=[0])["launch_id"]
    devices.are(fail=call if call != "one" else {"call": "memory", "uuids": ["GPU-mock-1"]})
    listing = daemon.request("GET", "/gpus").json()["data"]
    assert len(listing) == 2
    assert "free" not in {g["state"] for g in listing}
    assert gpu(daemon, "GPU-mock-1")["state"] == "unknown"
    assert gpu(daemon, "GPU-mock-1")["reason"]
    answer = try_launch(daemon, gpu_ids=[1])
    assert (answer.status, answer.error["code"]) == (503, "gpu_unknown")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert daemon.request("POST", f"/proxy/{launch_id}/v1/completions", ASKED).status == 200
    assert daemon.status(launch_id)["state"] == "ready"
    devices.are()
    assert gpu(daemon, "GPU-mock-1")["state"] == "free"
    assert daemon.stop_launch(daemon.ready(gpu_ids=[1])["launch_id"]).json()["state"] == "stopped"


def test_a_launch_that_ends_while_nvml_fails_ends_and_its_gpu_is_not_given_out_blindly(daemon, devices):
    launch_id = daemon.ready(gpu_ids=[0])["launch_id"]
    devices.are(fail="memory")
    stopped = daemon.stop_launch(launch_id).json()
    assert stopped["state"] == "stopped"
    assert stopped["unsettled_gpus"] == ["GPU-mock-0"]
    assert try_launch(daemon, gpu_ids=[0]).status == 503
    devices.are()
    wait_for(lambda: gpu(daemon, "GPU-mock-0")["state"] == "free", 10)


def test_memory_that_stays_makes_a_gpu_unsettled_also_over_a_restart_until_it_is_back(daemon, devices):
    launch_id = daemon.ready(gpu_ids=[0])["launch_id"]
    devices.are(used={"GPU-mock-0": 5 * GIB})
    assert daemon.stop_launch(launch_id).json()["unsettled_gpus"] == ["GPU-mock-0"]
    shown = gpu(daemon, "GPU-mock-0")
    assert shown["state"] == "unsettled"
    assert launch_id in shown["reason"]
    answer = try_launch(daemon, gpu_ids=[0])
    assert (answer.status, answer.error["code"]) == (409, "gpu_conflict")
    assert "unsettled" in answer.error["message"]
    daemon.restart()
    assert gpu(daemon, "GPU-mock-0")["state"] == "unsettled"
    devices.are()
    wait_for(lambda: gpu(daemon, "GPU-mock-0")["state"] == "free", 10)
    daemon.ready(gpu_ids=[0])


def test_permuted_indices_change_no_owner_and_new_launches_get_the_right_device(daemon, devices):
    status = daemon.ready(gpu_ids=[1])
    launch_id = status["launch_id"]
    assert devices_given_to(status) == "GPU-mock-1"
    daemon.kill()
    devices.are(order=["GPU-mock-1", "GPU-mock-0"])
    daemon.start()
    assert daemon.wait_state(launch_id, "ready")["gpus"][0] == {
        "uuid": "GPU-mock-1", "index": 0, "name": "Mock GPU", "share": 1.0,
    }  # fmt: skip
    answer = try_launch(daemon, gpu_ids=[0])
    assert answer.status == 409
    assert answer.error["gpus"][0]["owners"] == [launch_id]
    other = daemon.ready(gpu_ids=[1])
    assert devices_given_to(other) == "GPU-mock-0"
    assert devices_given_to(daemon.status(launch_id)) == "GPU-mock-1"


def test_starts_on_one_shared_gpu_come_one_after_the_other(daemon):
    order = {"gpu_ids": [0], "gpu_share": 0.3, "knobs": {"boot-delay": 0.5}}
    ids = [daemon.launch(**order) for _ in range(3)]
    waiting = daemon.status(ids[2])
    assert (waiting["progress"]["phase"], waiting["pid"]) == ("waiting_for_gpu", None)
    assert daemon.wait_state(ids[2], "ready")["state"] == "ready"
    spans = []
    for launch_id in ids:
        status = daemon.status(launch_id)
        assert status["gpus"][0]["share"] == 0.3
        argv = Path(f"/proc/{status['pid']}/cmdline").read_bytes() + daemon.engine_log(launch_id).encode()
        assert b"gpu_memory_utilization" in argv
        events = daemon.request("GET", f"/status/{launch_id}/events").json()["data"]
        ready = next(e for e in events if e["event"] == "became_ready")
        spans.append((ready["detail"]["seconds"], status["transitions"]["ready"]))
    readies = [when for _, when in spans]
    assert readies == sorted(readies)
    assert all(0.5 <= seconds < 3 for seconds, _ in spans)  # the waiting does not count as starting
    refused = try_launch(daemon, gpu_ids=[0], gpu_share=0.3)
    assert refused.status == 409
    assert {owner for g in refused.error["gpus"] for owner in g["owners"]} == set(ids)
