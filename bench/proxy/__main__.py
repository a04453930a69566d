"""What a proxied request and a streamed chunk cost: ``python -m bench.proxy`` (or ``make bench-proxy``).

Contenders in one run: direct, nginx, sglang-router, a FastAPI route with httpx, a splice in Python that does nothing
but pass on, and ours with a key, admission, limits of requests and tokens, metrics and the access log on, compiled and
interpreted, all in front of the same backend over TCP; nginx and ours behind a Unix socket as well, where engines
really listen. The backend tells what an answer used, in a stream only if it is asked, as engines do. The proxy is
pinned to one core, backend and load to another; figures are CPU time of the proxy's processes divided by the work,
medians over interleaved rounds, because on a shared machine CPU time is steadier than throughput. Latencies are those
of paced requests on an otherwise idle proxy, as the median over rounds of the difference to direct in the same round.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import common
from bench.proxy.contenders import KEY, Contender, Starter, pin, say

CONNECTIONS = 64
PACED = 1280  # requests, 20 for each connection
IDLE = 1000
# Events of each stream and milliseconds between two: few streams are long, so that their beginning does not count for
# much, and what 512 streams bring is a busy GPU's rate.
SHAPES = {1: (1500, 1), 8: (800, 2), 64: (100, 20), 512: (100, 20)}
IDLE_S = 2.0
SLOW_SHARE = 10
"""The naive route gets one part in so many of the requests, and its streams in the first round only."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000, help="requests of each round")
    parser.add_argument("--streams", type=int, nargs="*", default=list(SHAPES))
    parser.add_argument("--only", nargs="*", default=[], help="contenders whose name starts with one of these")
    args = parser.parse_args()
    allow_many_files()
    home = Path(tempfile.mkdtemp(prefix="vbproxy", dir="/tmp"))
    starter = Starter(home)
    try:
        contenders = starter.all(starter.backend(), tuple(args.only))
        for number in range(args.rounds):
            for contender in contenders:
                say(f"round {number + 1} of {args.rounds}: {contender.name}")
                measure_round(contender, args.requests, args.streams, first=number == 0)
        print(tables(contenders, args.streams))
    finally:
        starter.stop()
        shutil.rmtree(home, ignore_errors=True)


def allow_many_files() -> None:
    """For everybody started from here."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure_round(contender: Contender, requests: int, streams: list[int], *, first: bool) -> None:
    slow = contender.slow
    if slow and not first:
        return
    measure_idle(contender)
    measure_requests(contender, requests // SLOW_SHARE if slow else requests)
    measure_latency(contender)
    for count in streams:
        measure_streams(contender, count)
    if first and not slow and contender.process is not None:
        measure_memory(contender)


def measure_idle(contender: Contender) -> None:
    """What it spends while nothing is asked of it. That is no request's and no chunk's: ``load`` takes it off."""
    before = cpu_s(contender)
    time.sleep(IDLE_S)
    contender.idle_ms.append((cpu_s(contender) - before) / IDLE_S * 1000)


def measure_requests(contender: Contender, total: int) -> None:
    """The same request again and again, as a client's library sends it; then each with a trace of its own."""
    for about, found in (("", contender.request_us), (" /v1/completions bench numbered", contender.numbered_us)):
        _, spent = load(contender, f"requests {CONNECTIONS} {total}{about}")
        found.append(spent / total * 1e6)


def measure_latency(contender: Contender) -> None:
    result, _ = load(contender, f"paced {CONNECTIONS} {PACED}")
    first = result["first_byte_ms"]
    contender.first_byte_ms.append((common.percentile(first, 50), common.percentile(first, 99)))


def measure_streams(contender: Contender, streams: int) -> None:
    events, interval_ms = SHAPES.get(streams, SHAPES[512])
    result, spent = load(contender, f"streams {streams} {events} {interval_ms} 0")
    if result["events"] != streams * events:
        raise SystemExit(f"{contender.name}: {result['events']} of {streams * events} events")
    contender.chunk_us.setdefault(streams, []).append(spent / result["events"] * 1e6)
    contender.rate.setdefault(streams, []).append(result["events"] / result["seconds"])


def measure_memory(contender: Contender) -> None:
    """With idle connections, and with streams beside them, while both are there."""
    argv = command(contender, f"streams 512 50 20 {IDLE}")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        contender.idle_rss_mb = rss_mb(contender)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            contender.busy_rss_mb = max(contender.busy_rss_mb, rss_mb(contender))
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue


def load(contender: Contender, work: str) -> tuple[dict[str, float | list[float]], float]:
    """One run of the load and the CPU seconds the contender spent on it."""
    before, began = cpu_s(contender), time.monotonic()
    output = subprocess.run(command(contender, work), check=True, capture_output=True, text=True)
    spent = cpu_s(contender) - before - contender.idle_ms[-1] / 1000 * (time.monotonic() - began)
    result = json.loads(output.stdout)
    if result["failed"]:
        raise SystemExit(f"{contender.name}: {work}: {result['failed']} failed, {result['done']} done")
    return result, spent


def command(contender: Contender, work: str) -> list[str]:
    return [*pin(1), sys.executable, "-m", "bench.proxy.load", str(contender.port), KEY, *work.split()]


def cpu_s(contender: Contender) -> float:
    """CPU time of all its threads, from the scheduler's own count: the one in ``stat`` knows hundredths only."""
    total = 0.0
    for pid in contender.pids():
        tasks = list(Path(f"/proc/{pid}/task").glob("*/schedstat"))
        total += sum(int(task.read_text().split()[0]) for task in tasks) / 1e9 if tasks else common.cpu_s(pid)
    return total


def rss_mb(contender: Contender) -> float:
    return sum(common.rss_mb(pid) for pid in contender.pids())


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(contenders: list[Contender], streams: list[int]) -> str:
    heads = [
        "idle, ms of CPU a second",
        "µs of CPU a request",
        "no head twice",
        *(f"a chunk, {n} stream{'s' * (n > 1)}" for n in streams),
    ]
    cost = [
        [
            one.name,
            *(shown([values]) for values in (one.idle_ms, one.request_us, one.numbered_us)),
            *(shown([one.chunk_us[n]]) for n in streams),
        ]
        for one in contenders[1:]
    ]
    most = max(streams)
    rest = [
        [
            one.name,
            *(added(one, contenders[0], at) for at in (0, 1)),
            f"{common.median(one.rate[most]):,.0f}",
            *(f"{mb:.0f}" if mb else "" for mb in (one.idle_rss_mb, one.busy_rss_mb)),
        ]
        for one in contenders
    ]
    memory = [f"RSS with {IDLE:,} idle connections, MB", "and 512 streams, MB"]
    latency = [f"time to first byte at {CONNECTIONS} connections, p50, ms", "p99, ms"]
    return "\n\n".join((
        common.table(["", *heads], cost),
        common.table(["", *latency, f"chunks/s at {most} streams", *memory], rest),
    ))  # fmt: skip


def shown(rounds: list[list[float]]) -> str:
    return " ".join(f"{common.median(values):.1f}" for values in rounds)


def added(one: Contender, direct: Contender, at: int) -> str:
    if one is direct:
        return f"{common.median([pair[at] for pair in one.first_byte_ms]):.2f}"
    pairs = zip(one.first_byte_ms, direct.first_byte_ms, strict=False)  # the naive one has one round only
    return f"{statistics.median(mine[at] - base[at] for mine, base in pairs):+.2f}"


if __name__ == "__main__":
    main()
