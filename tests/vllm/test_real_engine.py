"""The main job on a real vLLM: launch, watch, ask, tail, survive every kind of kill -9, stop.

A start costs half a minute on two cores, so one launch with a restart policy lives through the whole file, and the
tests are in the order of its life. Later ones need the earlier ones.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path

import openai
import psutil
import pytest

from tests.support.waiting import wait_for
from tests.vllm.box import SERVED, Box, engine_core_of, processes_of, wait_until_gone
from vllm_bootstrap.engines.vllm_command import CPU_KV_CACHE_GIB
from vllm_bootstrap.gateway.chunks import KNOWN, framed
from vllm_bootstrap.gateway.usage import USAGE_MARK
from vllm_bootstrap.models.fit import GIB, Wish, cache_of, cache_tokens
from vllm_bootstrap.models.shape import read_shape

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

RESTART = {"policy": "on-failure", "max_attempts": 10, "backoff_s": 0.5}
MESSAGES = [{"role": "user", "content": "Tell me something."}]


@pytest.fixture(scope="module")
def launch_id(box: Box, tiny_model: Path) -> str:
    return box.launch(tiny_model, restart=RESTART)


def base_of(way: str, launch_id: str) -> str:
    return "/v1" if way == "v1" else f"/proxy/{launch_id}/v1"


# -- start ------------------------------------------------------------------------------------------------------------


def test_it_gets_ready_and_shows_its_phases(box: Box, launch_id: str) -> None:
    status = box.wait_for(launch_id, "ready")
    assert len(box.phases) >= 3, box.phases
    assert status["pid"]
    assert status["shim_pid"]
    assert set(status["transitions"]) == {"bootstrapping", "ready"}
    assert status["load"]["capacity"] == 32
    names = [event["event"] for event in box.get(f"/status/{launch_id}/events")["data"]]
    assert names[-1] == "became_ready"


def test_its_cache_holds_as_many_tokens_as_reckoned(box: Box, launch_id: str, tiny_model: Path) -> None:
    said = re.search(r"KV cache size: ([\d,]+) tokens", box.log_tail(launch_id, lines=1000))
    assert said is not None
    cache = cache_of(read_shape(json.loads((tiny_model / "config.json").read_text())), Wish(dtype="float32"))
    assert cache is not None
    assert int(said[1].replace(",", "")) == cache_tokens(cache, CPU_KV_CACHE_GIB * GIB, 1024, 0)


def test_its_processes_show_no_secret(box: Box, launch_id: str) -> None:
    processes = processes_of(launch_id)
    assert len(processes) >= 3  # shim, API server, EngineCore
    for process in processes:
        assert "hf_secret" not in " ".join(process.cmdline())
    shim = psutil.Process(box.status(launch_id)["shim_pid"])
    assert "hf_secret" not in " ".join(shim.environ().values())
    assert "hf_secret" not in json.dumps([box.status(launch_id), box.get(f"/logs/{launch_id}")])


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["v1", "proxy"])
def test_chat(box: Box, launch_id: str, way: str) -> None:
    with box.openai(base_of(way, launch_id)) as client:
        answer = client.chat.completions.create(model=SERVED, messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize("way", ["v1", "proxy"])
def test_chat_streamed_says_the_same(box: Box, launch_id: str, way: str) -> None:
    with box.openai(base_of(way, launch_id)) as client:
        whole = client.chat.completions.create(model=SERVED, messages=MESSAGES, max_tokens=8, temperature=0)
        stream = client.chat.completions.create(
            model=SERVED, messages=MESSAGES, max_tokens=8, temperature=0, stream=True
        )
        events = list(stream)
    assert len(events) > 2
    assert all(event.usage is None for event in events)  # not asked for, so not seen
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content


@pytest.mark.parametrize("way", ["v1", "proxy"])
def test_completion_streamed_and_not(box: Box, launch_id: str, way: str) -> None:
    with box.openai(base_of(way, launch_id)) as client:
        whole = client.completions.create(model=SERVED, prompt="Hello", max_tokens=8, temperature=0)
        stream = client.completions.create(model=SERVED, prompt="Hello", max_tokens=8, temperature=0, stream=True)
        text = "".join(event.choices[0].text for event in stream if event.choices)
    assert text == whole.choices[0].text


def test_usage_is_streamed_to_those_who_ask(box: Box, launch_id: str) -> None:
    with box.openai() as client:
        stream = client.completions.create(
            model=SERVED, prompt="Hello", max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
        usages = [event.usage for event in stream if event.usage is not None]
    assert usages[-1].completion_tokens == 4


def test_its_events_are_chunks_that_may_pass_the_parser_by(box: Box, launch_id: str) -> None:
    body = {"model": SERVED, "prompt": "Hello", "max_tokens": 20, "stream": True, "ignore_eos": True}
    asked = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()  # as the gateway asks for it
    lines = [b"POST /v1/completions HTTP/1.1", b"host: engine", b"content-type: application/json", b"connection: close"]
    (path,) = box.daemon.runtime_dir.glob("**/engine.sock")
    with socket.socket(socket.AF_UNIX) as direct:
        direct.settimeout(60)
        direct.connect(str(path))
        direct.sendall(b"\r\n".join([*lines, b"content-length: %d\r\n\r\n" % len(asked)]) + asked)
        raw = b"".join(iter(lambda: direct.recv(65536), b""))
    chunks = raw.partition(b"\r\n\r\n")[2]
    events = re.findall(rb"data: .*?\n\n", chunks, re.DOTALL)
    assert chunks == b"".join(map(framed, events)) + b"0\r\n\r\n"
    usual = [event for event in events if USAGE_MARK not in event and len(framed(event)) < KNOWN]
    assert len(usual) >= 20


@pytest.mark.parametrize("way", ["v1", "proxy"])
def test_embeddings_are_refused_cleanly_by_a_model_that_has_none(box: Box, launch_id: str, way: str) -> None:
    with box.openai(base_of(way, launch_id)) as client, pytest.raises(openai.NotFoundError) as refused:
        client.embeddings.create(model=SERVED, input="Hello")
    assert refused.value.response.json() == {"detail": "Not Found"}  # vLLM's own words, passed on
    assert_serves(box)


def test_the_engines_own_errors_pass_unwrapped(box: Box, launch_id: str) -> None:
    with box.openai() as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=SERVED, prompt="Hello", max_tokens=100_000)
    assert "src" not in refused.value.response.json()


def test_models_lists_it(box: Box, launch_id: str) -> None:
    with box.openai() as client:
        assert SERVED in [model.id for model in client.models.list()]


# -- logs -------------------------------------------------------------------------------------------------------------


def test_the_log_can_be_read_by_offset(box: Box, launch_id: str) -> None:
    offset, pieces = 0, []
    while True:
        page = box.get(f"/logs/{launch_id}", offset=offset, limit=1000)
        assert page["offset"] == offset
        pieces.append(page["content"])
        offset = page["next_offset"]
        if offset >= page["size"]:
            break
    text = "".join(pieces)
    assert len(pieces) > 3
    assert len(text.encode()) == offset
    assert "Application startup complete" in text
    assert box.log_tail(launch_id, 1) in text
    assert box.get(f"/logs/{launch_id}", offset=offset)["content"] == ""
    assert box.daemon.request("GET", f"/logs/{launch_id}?offset={offset + 10**9}").status == 416


def test_a_client_that_goes_away_frees_the_engine(box: Box, launch_id: str) -> None:
    with box.openai() as client:
        stream = client.completions.create(
            model=SERVED, prompt="Hello", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        stream.close()
    wait_for(lambda: sum(box.status(launch_id)["load"]["in_flight"].values()) == 0, timeout_s=1)
    metrics = f"/proxy/{launch_id}/metrics"
    wait_for(lambda: running(box.daemon.request("GET", metrics).body.decode()) == 0, timeout_s=1)


def running(metrics: str) -> float:
    (line,) = re.findall(r"(?m)^vllm:num_requests_running\{.*\} (\S+)$", metrics)
    return float(line)


# -- deaths -----------------------------------------------------------------------------------------------------------


def attempt_pids(box: Box, launch_id: str) -> set[int]:
    return {process.pid for process in processes_of(launch_id)} | {box.status(launch_id)["pid"]}


def last_death(box: Box, launch_id: str) -> dict[str, object]:
    events = box.get(f"/status/{launch_id}/events", limit=1000)["data"]
    detail: dict[str, object] = [event for event in events if event["event"] == "released"][-1]["detail"]
    return detail


def assert_serves(box: Box) -> None:
    with box.openai() as client:
        assert client.completions.create(model=SERVED, prompt="Hello", max_tokens=1).choices


def test_kill_9_of_the_api_server_leaves_nothing_and_is_restarted(box: Box, launch_id: str) -> None:
    before = attempt_pids(box, launch_id)
    psutil.Process(box.status(launch_id)["pid"]).send_signal(signal.SIGKILL)
    wait_until_all_dead(before, 10)
    box.wait_for(launch_id, "ready", attempt=2)
    assert last_death(box, launch_id)["class"] == "killed_by_signal"
    assert_serves(box)


def test_kill_9_of_the_engine_core_counts_as_a_death_although_the_server_exits_0(box: Box, launch_id: str) -> None:
    before = attempt_pids(box, launch_id)
    engine_core_of(box.status(launch_id)["pid"]).send_signal(signal.SIGKILL)
    wait_until_all_dead(before, 30)
    failure = box.wait_for(launch_id, "bootstrapping", "ready", attempt=3)["failure"]
    if failure is not None:  # shown until the next attempt is ready
        assert failure["class"] == "engine_died"
    box.wait_for(launch_id, "ready", attempt=3)
    assert last_death(box, launch_id)["class"] == "engine_died"
    assert_serves(box)


def test_kill_9_of_the_shim_takes_the_engine_with_it(box: Box, launch_id: str) -> None:
    before = attempt_pids(box, launch_id)
    psutil.Process(box.status(launch_id)["shim_pid"]).send_signal(signal.SIGKILL)
    wait_until_all_dead(before, 10)
    box.wait_for(launch_id, "bootstrapping", attempt=4)
    assert last_death(box, launch_id)["class"] == "shim_lost"


def test_kill_9_of_the_daemon_during_a_start_lets_the_start_go_on(box: Box, launch_id: str) -> None:
    before = wait_for(lambda: status if (status := box.status(launch_id))["pid"] else None)
    assert before is not None
    restart_daemon(box, before["pid"])
    after = box.wait_for(launch_id, "ready", attempt=4)
    assert (after["pid"], after["attempt"]) == (before["pid"], 4)
    assert_serves(box)


def test_kill_9_of_the_daemon_costs_nothing_but_its_connections(box: Box, launch_id: str) -> None:
    before = box.status(launch_id)
    size = box.get(f"/logs/{launch_id}")["size"]
    restart_daemon(box, before["pid"])
    after = box.wait_for(launch_id, "ready", attempt=4, timeout_s=5)
    for fact in ("pid", "shim_pid", "attempt", "created_at"):
        assert after[fact] == before[fact]
    assert_serves(box)
    assert box.get(f"/logs/{launch_id}", offset=size)["offset"] == size


def restart_daemon(box: Box, engine: int) -> None:
    box.daemon.kill()
    assert psutil.Process(engine).is_running()
    box.daemon.start()


def wait_until_all_dead(pids: set[int], timeout_s: float) -> None:
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=timeout_s)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


# -- stop -------------------------------------------------------------------------------------------------------------


def test_stop_returns_when_nothing_is_left(box: Box, launch_id: str) -> None:
    pids = attempt_pids(box, launch_id)
    answer = box.daemon.stop_launch(launch_id)
    wait_until_gone(launch_id, pids, timeout_s=0)
    assert answer.status == 200
    assert (answer.json()["state"], answer.json()["forced"]) == ("stopped", False)
    ended = box.daemon.request("POST", f"/proxy/{launch_id}/v1/completions", {"model": SERVED})
    assert ended.status == 409
    assert box.get(f"/logs/{launch_id}", tail=1)["eof"] is True
    assert [gpu["state"] for gpu in box.get("/gpus")["data"]] == ["free"]
    box.daemon.assert_no_leftovers(timeout_s=0)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"model": "/nowhere/at/all"}, "model_not_found"),
        ({"kv_cache_dtype": "nonsense"}, "bad_flag"),
        ({"max_model_len": 100_000}, "bad_flag"),
    ],
    ids=["bad model path", "bad flag", "wrong max_model_len"],
)
def test_a_start_that_cannot_work_is_explained(
    box: Box, tiny_model: Path, change: dict[str, object], wanted: str
) -> None:
    fields = {"model": tiny_model, "restart": RESTART, **change}
    launch_id = box.launch(**fields)  # type: ignore[arg-type]
    status = box.wait_for(launch_id, "failed")
    failure = status["failure"]
    assert failure["class"] == wanted, box.log_tail(launch_id)
    assert failure["permanent"] is True
    assert status["attempt"] == 1  # not tried again
    assert failure["exit_code"]
    assert failure["hint"]
    assert failure["lines"]
    wait_until_gone(launch_id, set(), timeout_s=0)
