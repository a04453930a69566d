"""The simulator as a process: its tree, its start, its ends, and the failures that knobs ask for."""

import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.simulator import MODULE, Simulator, UdsConnection
from tests.support.waiting import wait_for
from vllm_bootstrap.engines.base import ExitFacts, FailureClass
from vllm_bootstrap.engines.phases import PHASES, parse_progress
from vllm_bootstrap.engines.simulator.deaths import DEATHS
from vllm_bootstrap.engines.simulator.knobs import KNOBS
from vllm_bootstrap.engines.simulator_engine import SimulatorEngine

CORE, DAEMONISED = "VLLM::EngineCore", "VLLM::Daemonised"
WORKERS = ("VLLM::Worker_TP0", "VLLM::Worker_TP1")


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def running(simulator):
    return simulator.metric("num_requests_running")


def open_stream(simulator, *, tokens=1000, prompt="a b c"):
    """A streamed completion whose first bytes have come."""
    connection = simulator.connect()
    body = {"prompt": prompt, "stream": True, "ignore_eos": True, "max_tokens": tokens}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    return connection, answer


# -- the tree ------------------------------------------------------------------------------------------------------


def test_the_tree_looks_like_vllms_and_ends_with_it():
    with Simulator(tensor_parallel_size=2) as simulator:
        tree = simulator.wait_tree("main", CORE, *WORKERS)
        assert Path(f"/proc/{tree[CORE]}/comm").read_text() == "VLLM::EngineCor\n"
        assert simulator.stop() == 0
        assert simulator.tree() == {}
        assert "[shutdown] API server: shutdown triggered" in simulator.log


def test_names_follow_the_prefix_and_the_stages():
    with Simulator(tensor_parallel_size=1, pipeline_parallel_size=2, env={"VLLM_PROCESS_NAME_PREFIX": "VBS-x"}) as s:
        s.wait_tree("main", "VBS-x::EngineCore", "VBS-x::Worker_PP0_TP0", "VBS-x::Worker_PP1_TP0")


def test_children_outlive_a_killed_server_and_hold_no_socket():
    with Simulator(tensor_parallel_size=2) as simulator:
        simulator.wait_tree("main", CORE, *WORKERS)
        kill(simulator.process.pid)
        simulator.process.wait(5)
        left = simulator.tree()
        assert left.keys() == {CORE, *WORKERS}
        with pytest.raises(ConnectionRefusedError):
            UdsConnection(simulator.uds).connect()
        for pid in left.values():
            assert not [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if int(fd.name) > 2]


@pytest.mark.parametrize("victim", [CORE, WORKERS[1]])
def test_the_engines_death_ends_the_server_with_exit_0(victim):
    with Simulator(tensor_parallel_size=2) as simulator:
        tree = simulator.wait_tree("main", CORE, *WORKERS)
        connection, answer = open_stream(simulator)
        kill(tree[victim])
        rest = answer.read().decode()
        assert '"code":500' in rest
        assert rest.endswith("data: [DONE]\n\n")
        connection.close()
        assert simulator.process.wait(5) == 0
        assert "died unexpectedly" in simulator.log


def test_after_the_engines_death_health_is_503_and_work_is_refused():
    with Simulator() as simulator:
        connection = simulator.connect()
        connection.connect()
        kill(simulator.tree()[CORE])
        wait_for(lambda: "died unexpectedly" in simulator.log)
        body = json.dumps({"prompt": "a"})
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (503, b"")
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        assert connection.getresponse().status == 500
        connection.close()
        assert simulator.process.wait(5) == 0


def test_the_engines_death_fails_what_waits_without_a_stream_too():
    with Simulator(prefill_tokens_per_second=0.1, max_num_seqs=1) as simulator:

        def ask(path, body):
            reply = simulator.request("POST", path, body)
            return reply.status, reply.json()["error"]["code"]

        with ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(ask, "/v1/completions", {"prompt": "a", "n": 2}),
                pool.submit(ask, "/v1/embeddings", {"input": ["a", "b"]}),
            ]
            wait_for(lambda: simulator.metric("num_requests_waiting") == 3)
            kill(simulator.tree()[CORE])
            assert [one.result(5) for one in asked] == [(500, 500), (500, 500)]


def test_it_goes_on_when_nobody_reads_its_log_any_more():
    read, write = os.pipe()
    with Simulator(stdout=write, ready=False, log_bytes_per_second=100_000) as simulator:
        os.close(write)
        text = b""
        while b"Application startup complete" not in text:
            text += os.read(read, 65536)
        os.close(read)
        assert simulator.complete("a").status == 200
        assert simulator.stop() == 0


def test_a_stopped_engine_stands_still_with_health_200_and_goes_on():
    with Simulator(tokens_per_second=50) as simulator:
        core = simulator.tree()[CORE]
        connection, _ = open_stream(simulator)
        os.kill(core, signal.SIGSTOP)
        seen = [simulator.metric("generation_tokens_total"), -1.0]

        def still():
            seen.append(simulator.metric("generation_tokens_total"))
            return seen[-1] == seen[-2]

        wait_for(still)
        before = simulator.metric("generation_tokens_total")
        assert simulator.request("GET", "/health").status == 200
        assert running(simulator) == 1
        os.kill(core, signal.SIGCONT)
        wait_for(lambda: simulator.metric("generation_tokens_total") > before)
        connection.close()


# -- starting and stopping -----------------------------------------------------------------------------------------


def test_it_starts_in_well_under_half_a_second_of_cpu():
    with Simulator() as simulator:
        fields = Path(f"/proc/{simulator.process.pid}/stat").read_text().rpartition(")")[2].split()
        assert (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") < 0.5


def test_the_socket_refuses_until_ready_and_the_log_tells_the_phases():
    with Simulator(boot_delay=0.6, ready=False) as simulator:
        wait_for(lambda: Path(simulator.uds).exists())
        with pytest.raises(ConnectionRefusedError):
            UdsConnection(simulator.uds).connect()
        simulator.wait_ready()
        lines = simulator.log
        order = [
            "vLLM server version", "non-default args", "Initializing a V1 LLM engine", "Starting to load model tiny",
            "25% Completed | 1/4", "100% Completed | 4/4", "Loading weights took", "Model loading took",
            "torch.compile took", "Available KV cache memory", "GPU KV cache size", "Capturing CUDA graphs",
            "Graph capturing finished", "init engine (profile", "Starting vLLM server on unix:",
            "Application startup complete.",
        ]  # fmt: skip
        places = [lines.index(text) for text in order]
        assert places == sorted(places)
        seen = [progress.phase for line in lines.splitlines() if (progress := parse_progress(line))]
        assert list(dict.fromkeys(seen)) == list(PHASES)


def test_a_stale_socket_file_is_in_the_way():
    with Simulator() as simulator:
        simulator.stop()
        assert Path(simulator.uds).exists()
        again = subprocess.run(
            [sys.executable, "-m", MODULE, "--model=m", f"--uds={simulator.uds}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert again.returncode == 1
        assert "OSError: [Errno 98] Address already in use" in again.stdout


def test_a_socket_path_that_is_too_long_ends_it_with_1():
    done = subprocess.run(
        [sys.executable, "-m", MODULE, "--model=m", f"--uds=/tmp/{'x' * 200}"], capture_output=True, check=False
    )
    assert done.returncode == 1


def test_it_serves_by_itself_on_a_port_and_says_where():
    argv = [sys.executable, "-m", MODULE, "--model=m", "--port=0"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stdout if "Starting vLLM server on " in line)
        port = int(line.rsplit(":", 1)[1])
        next(line for line in process.stdout if "startup complete" in line)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/version")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def test_stopped_at_any_moment_of_the_start_it_leaves_nothing():
    chance = random.Random(7)

    def one(delay):
        with Simulator(boot_delay=0.2, tensor_parallel_size=2, ready=False) as simulator:
            time.sleep(delay)  # the moment is the subject of the test
            code = simulator.stop()
            left = simulator.tree()
            # Before Python runs our code the signal simply kills.
            return left or code not in (0, 130, -signal.SIGTERM)

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(one, [chance.uniform(0, 0.6) for _ in range(16)]))


def test_running_requests_may_finish_within_the_shutdown_timeout():
    with Simulator(shutdown_timeout=5, tokens_per_second=50) as simulator:
        connection, answer = open_stream(simulator, tokens=20)
        idle = simulator.connect()
        idle.request("GET", "/health")
        idle.getresponse().read()
        simulator.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "shutdown triggered" in simulator.log)
        idle.request("POST", "/v1/completions", json.dumps({"prompt": "a"}), {"content-type": "application/json"})
        assert idle.getresponse().status == 503
        assert answer.read().endswith(b"data: [DONE]\n\n")
        assert simulator.process.wait(5) == 0
        connection.close()
        idle.close()


def test_without_a_timeout_they_are_cut_off():
    with Simulator() as simulator:
        connection, answer = open_stream(simulator)
        assert simulator.stop() == 0
        rest = answer.fp.read()
        assert b"[DONE]" not in rest
        connection.close()


# -- failures on purpose -------------------------------------------------------------------------------------------


def test_it_dies_at_boot_as_each_class_does():
    def one(name):
        with Simulator(die_at_boot=name, ready=False) as simulator:
            code = simulator.process.wait(15)
            return name, code, simulator.log, simulator.tree()

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(one, DEATHS))
    for name, code, log, left in results:
        death = DEATHS[name]
        if death.signal is None:
            assert code == death.exit_code, name
            assert left == {}, name
        else:
            assert code == -death.signal
            assert left.keys() == {CORE}
        assert all(line in log for line in death.text.splitlines()), name
        assert (death.last_line or "") in log
        assert "startup complete" not in log


def test_a_cache_too_small_for_one_request_ends_the_start_as_vllms_does():
    with Simulator(profile="vllm-cpu-tiny", num_gpu_blocks_override=8, max_model_len=2000, ready=False) as simulator:
        assert simulator.process.wait(15) == 1
        log = simulator.log
        assert "max seq len (2000)" in log
        assert simulator.tree() == {}
    failure = SimulatorEngine().explain(ExitFacts(1, None, was_ready=False), log.splitlines())
    assert failure.failure_class == FailureClass.KV_CACHE_TOO_SMALL


@pytest.mark.parametrize(("threshold", "whole"), [(0, 1), (8, 0)])
def test_a_long_prompt_is_cut_beside_others_as_vllms_flag_does(threshold, whole):
    with Simulator(profile="vllm-cpu-tiny", max_model_len=2000, long_prefill_token_threshold=threshold) as simulator:
        connection, _ = open_stream(simulator)
        assert simulator.complete(" ".join(f"w{number}" for number in range(40)), max_tokens=1).status == 200
        connection.close()
        wait_for(lambda: running(simulator) == 0)
        steps = simulator.metric("iteration_tokens_total_count")
        assert steps - simulator.metric("iteration_tokens_total_bucket", le="20.0") == whole


def test_never_ready_stays_in_loading_and_can_be_stopped():
    with Simulator(never_ready=True, ready=False) as simulator:
        wait_for(lambda: "Starting to load model" in simulator.log)
        assert simulator.stop() == 130
        assert simulator.tree() == {}
        assert "Completed" not in simulator.log


def test_crash_after_requests_leaves_the_children():
    with Simulator(crash_after_requests=2) as simulator:
        assert simulator.complete().status == 200
        assert simulator.complete().status == 200
        assert simulator.process.wait(5) == 1
        assert simulator.tree().keys() == {CORE}


def test_exit_zero_after_requests():
    with Simulator(exit_zero_after=1) as simulator:
        assert simulator.complete().status == 200
        assert simulator.process.wait(5) == 0
        assert simulator.tree() == {}


def test_poison_kills_the_engine_process():
    with Simulator(poison="nightshade") as simulator:
        assert simulator.complete().status == 200
        with contextlib.suppress(OSError, http.client.HTTPException):  # it dies while it answers, or before
            simulator.request("POST", "/v1/completions", {"prompt": "a nightshade", "max_tokens": 100})
        assert simulator.process.wait(5) == 0
        assert simulator.tree() == {}


def test_hang_after_requests_keeps_health_and_stands_still():
    with Simulator(hang_after=1) as simulator:
        assert simulator.complete().status == 200
        before = simulator.metric("generation_tokens_total")
        with pytest.raises(TimeoutError):
            simulator.request("POST", "/v1/completions", {"prompt": "a"}, timeout=0.3)
        hanging = simulator.connect()
        hanging.request("POST", "/v1/completions", json.dumps({"prompt": "a"}), {"content-type": "application/json"})
        wait_for(lambda: running(simulator) == 1)
        assert simulator.request("GET", "/health").status == 200
        assert simulator.metric("generation_tokens_total") == before
        hanging.close()
        wait_for(lambda: running(simulator) == 0)


def test_ignore_sigterm_holds_for_the_whole_tree():
    with Simulator(ignore_sigterm=True, tensor_parallel_size=2) as simulator:
        tree = simulator.wait_tree("main", CORE, *WORKERS)
        for pid in tree.values():
            os.kill(pid, signal.SIGTERM)
        wait_for(lambda: "signal ignored on purpose" in simulator.log)
        assert simulator.request("GET", "/health").status == 200
        assert simulator.tree().keys() == tree.keys()
        for pid in tree.values():
            kill(pid)


def test_slow_stop_takes_its_time():
    with Simulator(slow_stop=0.4) as simulator:
        began = time.monotonic()
        assert simulator.stop() == 0
        assert time.monotonic() - began >= 0.4


def test_a_second_signal_does_not_break_off_the_end():
    with Simulator(slow_stop=0.5) as simulator:
        simulator.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "shutting down FastAPI" in simulator.log)
        assert simulator.stop(signal.SIGINT) == 0
        assert simulator.tree() == {}


def test_a_daemonised_child_leaves_session_and_parent():
    with Simulator(fork_setsid_child=True) as simulator:
        tree = simulator.wait_tree("main", CORE, DAEMONISED)
        assert os.getsid(tree[DAEMONISED]) != os.getsid(simulator.process.pid)
        assert simulator.stop() == 0
        assert simulator.tree().keys() == {DAEMONISED}


def test_it_makes_noise_at_a_rate():
    with Simulator(log_bytes_per_second=200_000) as simulator:
        wait_for(lambda: len(simulator.log) > 100_000, timeout_s=5)
        began, size = time.monotonic(), len(simulator.log)
        wait_for(lambda: time.monotonic() - began > 0.5)
        rate = (len(simulator.log) - size) / (time.monotonic() - began)
        assert rate == pytest.approx(200_000, rel=0.5)
        assert simulator.stop() == 0


def test_secrets_are_in_the_log_only_when_asked_for():
    env = {"HF_TOKEN": "hf_abc", "VLLM_API_KEY": "key-123"}
    with Simulator(env=env, log_secret=True) as careless, Simulator(env=env) as careful:
        assert "hf_abc" in careless.log
        assert "key-123" in careless.log
        assert "hf_abc" not in careful.log
        assert "key-123" not in careful.log


def test_a_download_grows_in_the_hub_cache_and_is_found_again(tmp_path):
    env = {"HF_HOME": str(tmp_path)}
    knobs = {"download_seconds": 0.4, "download_bytes": 100_000, "model": "org/m"}
    with Simulator(env=env, ready=False, **knobs) as simulator:
        blobs = tmp_path / "hub" / "models--org--m" / "blobs"
        sizes = set()

        def done():
            sizes.update(file.stat().st_size for file in blobs.glob("*.incomplete"))
            return "Time spent downloading weights for org/m" in simulator.log

        try:
            wait_for(done)
        except FileNotFoundError:
            wait_for(done)
        assert len(sizes) > 2
        simulator.wait_ready()
    assert not list(blobs.glob("*.incomplete"))
    weights = next((tmp_path / "hub" / "models--org--m" / "snapshots").glob("*/model.safetensors"))
    assert weights.stat().st_size == 100_000
    with Simulator(env={"HF_HUB_CACHE": str(tmp_path / "hub")}, **knobs) as again:
        assert "Time spent downloading" not in again.log


def test_without_a_named_cache_nothing_is_written():
    with Simulator(download_seconds=0.1) as simulator:
        assert "Time spent downloading" not in simulator.log


def test_mock_memory_is_shown_and_given_back(tmp_path):
    file = tmp_path / "gpus.json"
    file.write_text(json.dumps({"order": ["b", "a"], "used": {"a": 5}}))
    env = {"CUDA_VISIBLE_DEVICES": "a,b"}
    with Simulator(env=env, mock_memory_file=file, mock_memory_bytes=100) as simulator:
        assert json.loads(file.read_text()) == {"order": ["b", "a"], "used": {"a": 105, "b": 100}}
        simulator.stop()
        assert json.loads(file.read_text())["used"] == {"a": 5, "b": 0}


def test_it_sleeps_gives_memory_up_and_wakes(tmp_path):
    file = tmp_path / "gpus.json"
    knobs = {"mock_memory_file": file, "mock_memory_bytes": 100, "sleep_frees": 0.9}
    env = {"CUDA_VISIBLE_DEVICES": "a"}
    with Simulator(env=env, enable_sleep_mode=True, sleep_seconds=0.1, wake_seconds=0.1, **knobs) as simulator:
        used = lambda: json.loads(file.read_text())["used"]["a"]  # noqa: E731
        before = simulator.complete("one two").json()["choices"][0]["text"]
        assert simulator.request("POST", "/sleep?level=3").status == 400
        assert simulator.request("POST", "/sleep?level=2").json() == {"status": "sleeping", "level": 2}
        assert simulator.request("GET", "/is_sleeping").json() == {"is_sleeping": True}
        assert used() == 10
        assert simulator.request("GET", "/health").status == 200
        assert simulator.request("POST", "/wake_up?tags=weights").json() == {"status": "sleeping"}
        assert used() == 100
        assert simulator.request("POST", "/collective_rpc", {"method": "rm"}).status == 500
        assert simulator.request("POST", "/wake_up?tags=kv_cache").json() == {"status": "awake"}
        assert simulator.complete("one two").json()["choices"][0]["text"] != before  # its weights are garbage
        assert simulator.request("POST", "/collective_rpc", {"method": "reload_weights"}).status == 200
        assert simulator.complete("one two").json()["choices"][0]["text"] == before
        simulator.request("POST", "/sleep")
        simulator.stop()
        assert used() == 0


@pytest.mark.parametrize("wake_fails", ["error", "garbled"])
def test_it_wakes_badly_on_request(wake_fails):
    with Simulator(enable_sleep_mode=True, wake_fails=wake_fails) as simulator:
        simulator.request("POST", "/sleep?level=2")
        woken = simulator.request("POST", "/wake_up")
        if wake_fails == "error":
            assert woken.status == 500
            assert simulator.request("GET", "/is_sleeping").json() == {"is_sleeping": True}
        else:
            simulator.request("POST", "/collective_rpc", {"method": "reload_weights"})
            assert simulator.complete("one two").json()["choices"][0]["text"] != "one two"


def test_a_full_log_pipe_does_not_stop_the_server():
    """The noise comes from the engine process: only that one blocks."""
    argv = [sys.executable, "-m", MODULE, "--model=m", "--port=0", "--log-bytes-per-second=50000000"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        port, text = None, b""
        while b"startup complete" not in text:
            text += process.stdout.read1(65536)
        port = int(text.split(b"Starting vLLM server on http://127.0.0.1:")[1].split(b"\n")[0])
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            connection.close()
        drain = threading.Thread(target=process.stdout.read, daemon=True)
        process.terminate()
        drain.start()
        assert process.wait(10) == 0
        drain.join(10)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def test_every_failure_knob_has_a_test_here():
    text = Path(__file__).read_text()
    elsewhere = {"tasks", "tokens_per_second", "prefill_tokens_per_second", "embedding_size", "keep_alive_timeout"}
    elsewhere |= {"health_delay", "echo_headers"}
    assert {name for name in KNOBS if f"{name}=" not in text and f'"{name}"' not in text} <= elsewhere
