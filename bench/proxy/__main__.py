"""What a proxied request and a streamed chunk cost: ``python -m bench.proxy`` (or ``make bench-proxy``).

Contenders in one run: direct, nginx (when installed) and ours with a key, admission, limits, metrics and the access
log on, all to the same backend over TCP. The proxy is pinned to one core, backend and load to another; figures are CPU
time of the proxy's processes divided by the work, medians over interleaved rounds, because on a shared machine CPU
time is steadier than throughput. Added latency is the median over rounds of the difference to direct.
"""

from __future__ import annotations

import argparse
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
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

KEY = "bench-key-0123456789abcdef"
CONNECTIONS = 64
NGINX_CONF = """
daemon off; worker_processes 1; pid {home}/nginx.pid; error_log {home}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log {home}/access.log;
  client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c;
  uwsgi_temp_path {home}/d; scgi_temp_path {home}/e;
  upstream engine {{ server 127.0.0.1:{backend}; keepalive 1024; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_request_buffering off;
    }}
  }}
}}
"""


@dataclass
class Contender:
    """One way to the backend. ``pids``: the processes whose CPU time counts."""

    name: str
    port: int
    pids: Callable[[], list[int]]
    request_us: list[float] = field(default_factory=list)
    chunk_us: dict[int, list[float]] = field(default_factory=dict)
    first_byte: list[tuple[float, float]] = field(default_factory=list)
    rate: dict[int, list[float]] = field(default_factory=dict)
    rss_mb: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000, help="requests of each round")
    parser.add_argument("--streams", type=int, nargs="*", default=[64, 512])
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="vbproxy", dir="/tmp"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        contenders = start_all(home, started)
        for _ in range(args.rounds):
            for contender in contenders:
                measure_requests(contender, args.requests)
                for streams in args.streams:
                    measure_streams(contender, streams)
        print_table(contenders, args.streams)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)
        shutil.rmtree(home, ignore_errors=True)


# -- contenders --------------------------------------------------------------------------------------------------------


def start_all(home: Path, started: list[subprocess.Popen[bytes]]) -> list[Contender]:
    backend = free_port()
    started.append(spawn([sys.executable, "-m", "bench.proxy.backend", str(backend)], core=1))
    wait_for(backend)
    contenders = [Contender("direct", backend, list)]
    nginx = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if nginx:
        contenders.append(start_nginx(nginx, home, backend, started))
    contenders.append(start_ours(home, backend, started))
    return contenders


def start_nginx(nginx: str, home: Path, backend: int, started: list[subprocess.Popen[bytes]]) -> Contender:
    port = free_port()
    conf = home / "nginx.conf"
    conf.write_text(NGINX_CONF.format(home=home, backend=backend, port=port))
    process = spawn([nginx, "-c", str(conf), "-e", str(home / "error.log")], core=0)
    started.append(process)
    wait_for(port)
    return Contender("nginx", port, lambda: [process.pid, *children(process.pid)])


def start_ours(home: Path, backend: int, started: list[subprocess.Popen[bytes]]) -> Contender:
    port = free_port()
    engine = {"kind": "external", "url": f"http://127.0.0.1:{backend}", "served_names": ["bench"], "slots": 1024}
    (home / "engines.json").write_text(json.dumps({"engines": {"bench": engine}}))
    entry = {"name": "bench", "token": KEY, "scopes": ["admin", "realtime"], "models": ["*"], "max_parallel": 1024}
    (home / "keys.json").write_text(json.dumps({"keys": [entry]}))
    env = {
        "PATH": os.environ["PATH"], "HOME": str(home), "VLLM_BOOTSTRAP_PORT": str(port), "AUTH_KEYS_FILE":
        str(home / "keys.json"), "VLLM_BOOTSTRAP_ENGINES_FILE": str(home / "engines.json"),
        "VLLM_BOOTSTRAP_STATE_DIR": str(home / "s"), "VLLM_BOOTSTRAP_RUNTIME_DIR": str(home / "r"),
        "VLLM_BOOTSTRAP_LOCK_DIR": str(home / "l"), "VLLM_BOOTSTRAP_LOG_FILE": str(home / "ours.log"),
        "VLLM_BOOTSTRAP_DEVICES": "cpu", "MAX_IN_FLIGHT_REQUESTS": "1024",
    }  # fmt: skip
    process = spawn([sys.executable, "-m", "vllm_bootstrap", "serve"], core=0, env=env)
    started.append(process)
    wait_for(port)
    call(port, "/launch", {"model": "bench", "engine": "bench"})
    while call(port, "/launches")["data"][0]["state"] != "ready":
        time.sleep(0.05)
    return Contender("vllm-bootstrap", port, lambda: [process.pid])


def spawn(argv: list[str], core: int, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    pin = ["taskset", "-c", str(core)] if shutil.which("taskset") and (os.cpu_count() or 1) > 1 else []
    return subprocess.Popen([*pin, *argv], env=env)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit(f"nothing listens on {port}")


def call(port: int, path: str, body: dict[str, object] | None = None) -> dict[str, list[dict[str, object]]]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers), timeout=30
        ) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as exc:
        raise SystemExit(f"{path}: {exc.code} {exc.read().decode()}") from None


# -- measuring ---------------------------------------------------------------------------------------------------------


def cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def load(contender: Contender, kind: str, connections: int, total: int) -> tuple[dict[str, object], float]:
    """One run of the load and the CPU seconds the contender spent on it."""
    before = cpu_s(contender.pids())
    argv = [str(contender.port), "/v1/completions", KEY, kind, str(connections), str(total)]
    command = ["taskset", "-c", "1", sys.executable] if shutil.which("taskset") else [sys.executable]
    output = subprocess.run([*command, "-m", "bench.proxy.load", *argv], check=True, capture_output=True, text=True)
    result = json.loads(output.stdout)
    if result["failed"] or result["done"] != total:
        raise SystemExit(f"{contender.name}: {result['failed']} of {total} failed")
    return result, cpu_s(contender.pids()) - before


def measure_requests(contender: Contender, total: int) -> None:
    _, spent = load(contender, "requests", CONNECTIONS, total)
    contender.request_us.append(spent / total * 1e6)


def measure_streams(contender: Contender, streams: int) -> None:
    result, spent = load(contender, "streams", streams, streams)
    contender.chunk_us.setdefault(streams, []).append(spent / int(str(result["events"])) * 1e6)
    contender.rate.setdefault(streams, []).append(int(str(result["events"])) / float(str(result["seconds"])))
    first = result["first_byte_ms"]
    if streams == CONNECTIONS and isinstance(first, list):
        contender.first_byte.append((first[len(first) // 2], first[len(first) * 99 // 100]))
    for pid in contender.pids():
        status = Path(f"/proc/{pid}/status").read_text()
        rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
        contender.rss_mb = max(contender.rss_mb, rss)


def print_table(contenders: list[Contender], streams: list[int]) -> None:
    chunk_heads = " | ".join(f"µs CPU a chunk, {n} streams" for n in streams)
    rate_head = f"chunks/s at {streams[-1]} streams"
    print(f"| contender | µs CPU a request | {chunk_heads} | {rate_head} | added TTFB p50, p99 (ms) | RSS, MB |")
    print("| --- |" + " ---: |" * (len(streams) + 4))
    direct = contenders[0]
    for contender in contenders:
        chunks = " | ".join(f"{statistics.median(contender.chunk_us[n]):.1f}" for n in streams)
        rate = statistics.median(contender.rate[streams[-1]])
        added = ""
        if contender is not direct and contender.first_byte:
            pairs = list(zip(contender.first_byte, direct.first_byte, strict=True))
            added = ", ".join(f"{statistics.median(ours[i] - base[i] for ours, base in pairs):.2f}" for i in (0, 1))
        costs = f"{statistics.median(contender.request_us):.1f} | {chunks}"
        print(f"| {contender.name} | {costs} | {rate:.0f} | {added} | {contender.rss_mb:.0f} |")


if __name__ == "__main__":
    main()
