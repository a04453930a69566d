"""What becomes of the work when more is asked for than an engine can do: ``python -m bench.overload``.

A daemon with everything on (key, limits, metrics, access log) and the simulator as its engine. Capacity is measured
first, in a closed loop; then a load of random arrivals offers 0.5 to 5 times as much, each time for the same while.
Goodput counts the requests that were answered whole within the bound, and their tokens, from two seconds after the
start to the end of the load. Prints one Markdown table and what misses its bar; ends with 1 then.

The engine is slow on purpose (it, not this machine, is the limit); daemon, engine and load share the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

from bench.common import cpu_s, median, percentile, rss_mb, table
from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

KEY = "bench-overload-key-0123456789"
SLOTS, TOKENS, TOKENS_PER_S = 32, 32, 100
LOADS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
WARM_UP_S = 2.0
GOODPUT_BAR, REFUSAL_BAR_MS, GROWTH_BAR_MB = 0.9, 50.0, 32.0


@dataclass
class Row:
    load: float
    offered: float
    result: dict[str, Any]
    bound_s: float
    peak_mb: float
    cpu: float

    def __post_init__(self) -> None:
        good = [one for one in self.result["finished"] if one[2] <= self.bound_s * 1000 and self._counts(one)]
        self.goodput = len(good) / (self.result["seconds"] - WARM_UP_S)
        self.tokens = sum(one[3] for one in good) / (self.result["seconds"] - WARM_UP_S)
        self.first_ms = [one[1] for one in self.result["finished"] if one[1] is not None]
        self.refusal_ms = [one[0] for one in self.result["refused"]]
        self.retry_after = [one[2] for one in self.result["refused"]]
        self.others = sum(self.result["others"].values())

    def _counts(self, one: list[float]) -> bool:
        """Whether it ended while the load lasted: what the queue held at the end is no steady goodput."""
        return WARM_UP_S <= one[0] + one[2] / 1000 <= self.result["seconds"]

    def cells(self, best: float) -> list[str]:
        refused = [f"{percentile(self.refusal_ms, p):.1f}" if self.refusal_ms else "" for p in (50, 99)]
        retry = f"{median(self.retry_after):.0f}" if self.retry_after else ""
        share = f"{100 * len(self.refusal_ms) / max(1, self.result['sent']):.0f} %"
        return [
            f"{self.load:g} x", f"{self.offered:.0f}", f"{self.goodput:.1f}", f"{100 * self.goodput / best:.0f} %",
            f"{self.tokens:.0f}", ", ".join(f"{percentile(self.first_ms, p):.0f}" for p in (50, 99)), share,
            ", ".join(refused) if self.refusal_ms else "", f"{percentile(self.result['late'], 99):.1f}", retry,
            str(self.others), f"{self.peak_mb:.0f}", f"{self.cpu:.0f}",
        ]  # fmt: skip


HEADS = (
    "offered", "requests/s", "goodput, requests/s", "share of the best", "useful tokens/s",
    "first byte of streams p50, p99 (ms)", "refused", "refusal p50, p99 (ms)", "of it sent late, p99 (ms)",
    "Retry-After (s)", "other ends", "daemon RSS peak, MB", "daemon CPU, %",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="length of each load")
    parser.add_argument("--bound", type=float, default=4, help="an answer later than this is of no use")
    parser.add_argument("--loads", type=float, nargs="*", default=list(LOADS), help="in multiples of the capacity")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with DaemonProcess(devices="mock:1", access_key=KEY) as daemon:
        daemon.ready("bench", knobs={"tokens-per-second": TOKENS_PER_S}, max_num_seqs=SLOTS)
        closed = offer(daemon, 0, min(10, args.seconds), args)
        capacity = Row(0, 0, closed[0], args.bound, *closed[1:]).goodput
        rows = []
        for load in args.loads:
            result, peak, cpu = offer(daemon, load * capacity, args.seconds, args)
            rows.append(Row(load, load * capacity, result, args.bound, peak, cpu))
            progress(f"{load:g} x: {rows[-1].goodput:.1f} of {rows[-1].offered:.1f} requests/s in time")
            wait_for(lambda: at_rest(daemon), 30, 0.1, "an idle daemon")
    best = max(row.goodput for row in rows)
    print(f"Capacity {capacity:.1f} requests/s ({SLOTS} slots, {TOKENS} tokens each); bound {args.bound:g} s.\n")
    print(table(HEADS, [row.cells(best) for row in rows]))
    missed = shortfalls(rows, best)
    print("\n" + ("\n".join(missed) if missed else "All bars are met."))
    return 1 if missed else 0


def offer(
    daemon: DaemonProcess, rate: float, seconds: float, args: argparse.Namespace
) -> tuple[dict[str, Any], float, float]:
    """One run of the load: what it saw, the daemon's peak memory and its CPU use in per cent of a core."""
    port = daemon.address[1]
    argv = [sys.executable, "-m", "bench.overload.load", str(port), KEY, str(rate), str(seconds), str(args.seed)]
    before, peaks, over = cpu_s(daemon.pid), [rss_mb(daemon.pid)], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            peaks.append(rss_mb(daemon.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        output = subprocess.run([*argv, str(TOKENS)], check=True, stdout=subprocess.PIPE, text=True).stdout
    finally:
        over.set()
        watcher.join()
    result: dict[str, Any] = json.loads(output)
    return result, max(peaks), 100 * (cpu_s(daemon.pid) - before) / result["seconds"]


def at_rest(daemon: DaemonProcess) -> bool:
    """Nothing in flight and nothing queued, by the daemon's own metrics."""
    lines = daemon.request("GET", "/metrics").body.decode().splitlines()
    gauges = ("vllm_bootstrap_in_flight_requests", "vllm_bootstrap_queue_depth")
    return not sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(gauges))


def shortfalls(rows: list[Row], best: float) -> list[str]:
    """A sentence for each bar that is missed."""
    missed = []
    base = next((row.peak_mb for row in rows if row.load >= 1), rows[0].peak_mb)
    for row in rows:
        if row.load >= 1 and row.goodput < GOODPUT_BAR * best:
            missed.append(f"Missed at {row.load:g} x: goodput {row.goodput:.1f} of {best:.1f} requests/s.")
        if percentile(row.refusal_ms, 99) > REFUSAL_BAR_MS:
            missed.append(f"Missed at {row.load:g} x: refusals p99 {percentile(row.refusal_ms, 99):.0f} ms.")
        if row.peak_mb > base + GROWTH_BAR_MB:
            missed.append(f"Missed at {row.load:g} x: memory {row.peak_mb:.0f} MB after {base:.0f} MB.")
        if row.others or not all(1 <= seconds <= 60 for seconds in row.retry_after):
            missed.append(f"Missed at {row.load:g} x: ends other than an answer or a refusal: {row.result['others']}.")
    return missed


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
