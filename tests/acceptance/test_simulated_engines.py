"""The simulator as the daemon's engine, and the helper that runs daemons: from launch to nothing left."""

import json

import pytest

from tests.support.daemon import DaemonProcess


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(hf_token="hf_0123456789abcdef") as running:
        yield running


def test_a_launch_answers_by_model_and_by_id_and_leaves_nothing(daemon):
    status = daemon.ready(model="org/sim", served_model_name="sim", tensor_parallel_size=2, gpu_count=2)
    launch_id = status["launch_id"]
    asked = {"model": "sim", "messages": [{"role": "user", "content": "one two"}]}
    for path in ("/v1/chat/completions", f"/proxy/{launch_id}/v1/chat/completions"):
        answer = daemon.request("POST", path, asked)
        assert answer.json()["choices"][0]["message"]["content"] == "one two"
        assert answer.headers["x-launch-id"] == launch_id
    streamed = daemon.request("POST", "/v1/chat/completions", {**asked, "stream": True}).body
    assert streamed.endswith(b"data: [DONE]\n\n")
    for path in ("collective_rpc", "sleep", "invocations", "debug/last_request"):
        assert daemon.request("POST", f"/proxy/{launch_id}/{path}", {}).status == 404
    assert daemon.stop_launch(launch_id).json()["state"] == "stopped"
    daemon.assert_no_leftovers()


@pytest.mark.parametrize("tasks", ["embed", "score", "transcription"])
def test_engines_that_do_not_generate_become_ready_too(daemon, tasks):
    status = daemon.ready(knobs={"tasks": tasks})
    assert daemon.stop_launch(status["launch_id"]).json()["state"] == "stopped"


@pytest.mark.parametrize("name", ["gpu_memory_taken", "incompatible_library", "killed_by_signal"])
def test_a_death_while_starting_is_explained(daemon, name):
    status = daemon.wait_state(daemon.launch(knobs={"die-at-boot": name}), "failed")
    wanted = {"gpu_memory_taken": "gpu_out_of_memory"}.get(name, name)
    assert status["failure"]["class"] == wanted
    daemon.assert_no_leftovers()


def test_a_child_that_left_the_tree_is_found(daemon):
    status = daemon.ready(knobs={"fork-setsid-child": True})
    daemon.stop_launch(status["launch_id"])
    daemon.assert_no_leftovers()


def test_secrets_that_an_engine_prints_are_masked(daemon):
    status = daemon.ready(knobs={"log-secret": True})
    log = daemon.engine_log(status["launch_id"])
    assert "HF_TOKEN is ***" in log
    assert "hf_0123456789abcdef" not in log
    daemon.stop_launch(status["launch_id"])


def test_mock_memory_shows_and_comes_back(tmp_path):
    file = tmp_path / "gpus.json"
    file.write_text("{}")
    with DaemonProcess(mock_gpu_file=file) as daemon:
        status = daemon.ready(knobs={"mock-memory-bytes": 5 * 1024**3}, gpu_ids=[1])
        gpu = daemon.request("GET", "/gpus").json()["data"][1]
        assert (gpu["memory_used_bytes"], gpu["state"]) == (5 * 1024**3, "claimed")
        assert daemon.stop_launch(status["launch_id"]).json()["unsettled_gpus"] == []
        assert json.loads(file.read_text())["used"] == {gpu["uuid"]: 0}


PRIVATE = [
    ("POST", "sleep"), ("POST", "sleep?level=2"), ("POST", "wake_up"), ("POST", "wake_up?tags=weights"),
    ("GET", "is_sleeping"), ("POST", "collective_rpc"), ("POST", "release_kv_cache_memory"), ("POST", "pause"),
    ("POST", "resume"), ("POST", "update_weights"), ("GET", "server_info"), ("POST", "reset_prefix_cache"),
    ("POST", "v1/../sleep"), ("POST", "/sleep"), ("POST", "%73leep"), ("POST", "SLEEP"), ("POST", "sleep/"),
    ("POST", "v1/sleep"), ("GET", "v1/..%2fis_sleeping"),
]  # fmt: skip


def test_nobody_but_the_daemon_puts_an_engine_to_sleep():
    with DaemonProcess(access_key="k-admin") as daemon:
        launch_id = daemon.ready(sleep=1, served_model_name="sim")["launch_id"]
        for method, path in PRIVATE:
            body = {"method": "rm"} if method == "POST" else None
            answer = daemon.request(method, f"/proxy/{launch_id}/{path}", body)
            assert answer.status in (400, 403, 404, 405), (method, path)
            assert b"reached" not in answer.body
        for method, path in PRIVATE[:5]:
            assert daemon.request(method, f"/{path}", {} if method == "POST" else None).status in (404, 405)
        asked = {"model": "sim", "messages": [{"role": "user", "content": "one two"}]}
        assert daemon.request("POST", "/v1/chat/completions", asked).status == 200
        daemon.stop_launch(launch_id)


def test_a_killed_daemon_comes_back_to_its_engines_and_stops_them():
    with DaemonProcess(access_key="k-1") as daemon:
        assert daemon.request("GET", "/launches", key="").status == 401
        status = daemon.ready()
        daemon.restart()
        again = daemon.wait_state(status["launch_id"], "ready")
        assert again["pid"] == status["pid"]
        with daemon.client() as client:
            assert client.status(status["launch_id"]).state == "ready"
        assert daemon.stop() == 0
        daemon.assert_no_leftovers()
