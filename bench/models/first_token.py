"""From a request to the first byte of its streamed answer: when its model is not loaded, asleep, and loaded.

A simulator without any delay of its own shows what the daemon and a new process cost; how long a real model takes to
load or wake is not in it. The real engine is vLLM with the tiny model of the tests, on a CPU. *By hand* is the
same engine started directly, asked for its health every 20 ms and then for the same answer.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.common import free_port, median, table
from bench.cosched.engines import ENGINE_ENV, MAX_MODEL_LEN, ROOT, Direct, default_vllm, tiny_model
from bench.models.box import daemon
from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

# As the daemon comes; the helper that the tests use has quicker ones.
AS_IT_COMES: dict[str, Any] = {
    "probe_interval_s": 2,
    "probe_timeout_s": 5,
    "stop_grace_s": 10,
    "cold_start_hold_s": 600,
}
HEADS = ["ms, medians", "until the launch is accepted", "until it is ready", "until the first byte", "in all", "times"]


@dataclass
class Times:
    """Milliseconds of each part, one figure a run. ``accepted`` and ``ready`` are empty where there is no launch."""

    accepted: list[float] = field(default_factory=list)
    ready: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def row(self, name: str) -> list[str]:
        parts = [f"{median(part):,.1f}" if part else "" for part in (self.accepted, self.ready, self.first, self.total)]
        return [name, *parts, str(len(self.total))]


def ask(address: tuple[str, int], model: str, key: str | None) -> tuple[float, float]:
    """One streamed request; when it was sent and when the first byte of the body came, in seconds since 1970."""
    connection = http.client.HTTPConnection(*address, timeout=600)
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 4, "stream": True})
    try:
        connection.connect()
        began = time.time()
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        first = answer.read(1)
        at = time.time()
        rest = answer.read()
        if answer.status != 200:
            raise SystemExit((first + rest).decode(errors="replace"))
        return began, at
    finally:
        connection.close()


def cold(one: DaemonProcess, model: str, times: Times) -> None:
    """Unload it, then ask."""
    answer = one.request("POST", f"/models/{model}/unload", timeout_s=60)
    if answer.status != 200:
        raise SystemExit(answer.body.decode())
    began, first = ask(one.address, model, one.key)
    launch = one.status(one.request("GET", f"/models/{model}").json()["launches"][0]["launch_id"])
    accepted, ready = _unix(launch["created_at"]), _unix(launch["transitions"]["ready"])
    times.accepted.append((accepted - began) * 1000)
    times.ready.append((ready - accepted) * 1000)
    times.first.append((first - ready) * 1000)
    times.total.append((first - began) * 1000)


def warm(one: DaemonProcess, model: str, times: Times) -> None:
    began, first = ask(one.address, model, one.key)
    times.total.append((first - began) * 1000)


def asleep(one: DaemonProcess, model: str, times: Times) -> None:
    """Wait until nobody has asked for it for long enough, then ask."""
    wait_for(lambda: one.request("GET", f"/models/{model}").json()["state"] == "asleep", 30, what="sleep")
    warm(one, model, times)


def by_hand(engine: Direct, began: float, model: str, times: Times) -> None:
    wait_for(engine._is_up, 300, 0.02)  # noqa: SLF001
    ready = time.time()
    _, first = ask(("127.0.0.1", engine.port), model, None)
    times.ready.append((ready - began) * 1000)
    times.first.append((first - ready) * 1000)
    times.total.append((first - began) * 1000)


def run_simulator(runs: int) -> Iterator[str]:
    at_once = {"tokens-per-second": 0, "prefill-tokens-per-second": 0}
    entry: dict[str, Any] = {"source": "org/m", "gpus": {"count": 1}, "extra_args": at_once}
    catalogue = {"plain": entry, "sleeper": {**entry, "sleep": 1, "ttl": 1}}
    found = {name: Times() for name in ("cold", "asleep", "warm", "started by hand, cold")}
    with daemon(catalogue, devices="mock:2", sleep_memory_reserve_bytes=0, **AS_IT_COMES) as one:
        ask(one.address, "sleeper", one.key)
        for _ in range(runs):
            cold(one, "plain", found["cold"])
            asleep(one, "sleeper", found["asleep"])
            for _ in range(5):
                warm(one, "plain", found["warm"])
            simulator_by_hand(one.root, found["started by hand, cold"])
    yield from (f"simulator: {name}: {' '.join(f'{ms:.0f}' for ms in one.total)}" for name, one in found.items())
    yield table(HEADS, [one.row(f"simulator, {name}") for name, one in found.items()])


def simulator_by_hand(home: Path, times: Times) -> None:
    port = free_port()
    flags = ["--model=m", f"--port={port}", "--tokens-per-second=0", "--prefill-tokens-per-second=0"]
    began = time.time()
    command = [sys.executable, "-m", "vllm_bootstrap.engines.simulator", *flags]
    engine = Direct(home / "direct.log", port, command, {"PYTHONPATH": str(ROOT)}, alone=True)
    try:
        by_hand(engine, began, "m", times)
    finally:
        engine.__exit__()


def run_vllm(runs: int, home: Path) -> Iterator[str]:
    """With a real vLLM, in turns: by hand first, then through the daemon first."""
    model = tiny_model(home)
    entry = {"source": str(model), "args": {"max_model_len": MAX_MODEL_LEN, "dtype": "float32", "enforce_eager": True}}
    settings: dict[str, Any] = {**AS_IT_COMES, "engine_python": ENGINE_ENV / "bin" / "python", "start_timeout_s": 300}
    found = {name: Times() for name in ("cold", "warm", "started by hand, cold")}
    with daemon({"tiny": entry}, devices="cpu", env={"HF_HUB_OFFLINE": "1"}, **settings) as one:
        for number in range(runs):
            for by_daemon in (number % 2 == 1, number % 2 == 0):
                if by_daemon:
                    cold(one, "tiny", found["cold"])
                    for _ in range(10):
                        warm(one, "tiny", found["warm"])
                    one.request("POST", "/models/tiny/unload", timeout_s=60)
                else:
                    vllm_by_hand(home, model, found["started by hand, cold"])
            yield f"vLLM, round {number + 1} of {runs}: " + ", ".join(
                f"{name} {found[name].total[-1] / 1000:.1f} s" for name in ("cold", "started by hand, cold")
            )
    yield table(HEADS, [one.row(f"vLLM, {name}") for name, one in found.items()])


def vllm_by_hand(home: Path, model: Path, times: Times) -> None:
    began = time.time()
    engine = default_vllm(home, model)
    try:
        by_hand(engine, began, "tiny", times)
    finally:
        engine.__exit__()


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
