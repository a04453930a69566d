"""What the daemon costs by itself: ``python -m bench.daemon``. Prints one Markdown table.

Measured: start to first answer, idle memory, memory of a shim, and the latency of ``GET /status/{id}`` for 50 clients
that poll once a second while one engine writes 10 MB/s of log. Load generator, daemon and engine share this machine,
so latencies are an upper bound. Medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLIENTS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="starts to take the median of")
    parser.add_argument("--seconds", type=int, default=20, help="length of each polling run")
    args = parser.parse_args()
    starts = [measure_start() for _ in range(args.rounds)]
    rows = [
        ("start to first answer, s", statistics.median(s for s, _ in starts), 1.5),
        ("idle RSS, MB", statistics.median(r for _, r in starts), 80),
    ]
    shim_mb, runs, cpu = asyncio.run(measure_status(args.seconds, rounds=3))
    rows += [
        ("shim RSS, MB", shim_mb, 15),
        ("GET /status p50, ms", statistics.median(percentile(run, 50) for run in runs), None),
        ("GET /status p99, ms", statistics.median(percentile(run, 99) for run in runs), 5),
        ("daemon CPU during polling, % of a core", cpu, None),
    ]
    print("| figure | measured | bar |\n| --- | ---: | ---: |")
    for name, value, bar in rows:
        print(f"| {name} | {value:.2f} | {'' if bar is None else f'≤ {bar}'} |")


@contextmanager
def daemon() -> Iterator[tuple[int, int, float]]:
    """A daemon with mock GPUs in a folder of its own; yields pid, port and seconds to its first answer."""
    home = Path(tempfile.mkdtemp(prefix="vbbench", dir="/tmp"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        "PATH": os.environ["PATH"], "HOME": str(home), "VLLM_BOOTSTRAP_DEVICES": "mock:2",
        "VLLM_BOOTSTRAP_PORT": str(port), "VLLM_BOOTSTRAP_STATE_DIR": str(home / "s"),
        "VLLM_BOOTSTRAP_RUNTIME_DIR": str(home / "r"), "VLLM_BOOTSTRAP_LOCK_DIR": str(home / "l"),
        "VLLM_BOOTSTRAP_LOG_LEVEL": "WARNING",
    }  # fmt: skip
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "vllm_bootstrap", "serve"], env=env)
    try:
        while not answers(port):
            if process.poll() is not None:
                raise SystemExit(f"the daemon ended with {process.returncode}")
            time.sleep(0.005)
        yield process.pid, port, time.monotonic() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
        shutil.rmtree(home, ignore_errors=True)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=1) as reply:
            return reply.status == 200
    except OSError:
        return False


def measure_start() -> tuple[float, float]:
    with daemon() as (pid, _, seconds):
        time.sleep(3)
        return seconds, rss_mb(pid)


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"no VmRSS for {pid}")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure_status(seconds: int, rounds: int) -> tuple[float, list[list[float]], float]:
    with daemon() as (pid, port, _):
        launch = call(port, "/launch", {"model": "bench", "extra_args": {"log-bytes-per-second": 10_000_000}})
        status = f"/status/{launch['launch_id']}"
        while call(port, status)["state"] != "ready":
            time.sleep(0.1)
        shim_mb = rss_mb(call(port, status)["shim_pid"])
        before, began = cpu_s(pid), time.monotonic()
        runs = []
        for _ in range(rounds):
            latencies: list[float] = []
            await asyncio.gather(*(poll(port, status, seconds, i / CLIENTS, latencies) for i in range(CLIENTS)))
            runs.append(latencies)
        share = 100 * (cpu_s(pid) - before) / (time.monotonic() - began)
        return shim_mb, runs, share


def call(port: int, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


async def poll(port: int, path: str, seconds: int, offset: float, latencies: list[float]) -> None:
    """One client: a kept connection, one request a second, evenly staggered among the clients."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(offset)
    for _ in range(seconds):
        began = time.perf_counter()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length"))
        await reader.readexactly(length)
        spent = time.perf_counter() - began
        latencies.append(spent * 1000)
        await asyncio.sleep(max(0.0, 1 - spent))
    writer.close()


def percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


if __name__ == "__main__":
    main()
