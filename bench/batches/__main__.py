"""What durable batches cost: ``python -m bench.batches`` (``--only NAME`` for one part, ``--help`` for their sizes).

* throughput: lines a second through a simulator that answers at once, every record synced to disk; the daemon on one
  core, the engine on another;
* joining: the same with completions, one by one and joined;
* scale: a million lines: upload, validation, memory of the daemon beside that with ten thousand, a kill -9 in the
  middle and how long until it serves and works again;
* validation: time to first byte of a realtime stream while a gigabyte is validated, beside the same without;
* prefixes: lines that share long beginnings, in the order of the file and as they are run by default, on the simulator
  with a prefix cache that holds a part of the beginnings;
* engine: lines a second on a real vLLM (CPU build), through a batch and driven directly at the same concurrency, in
  turns; and completions joined or not.

Prints Markdown. All on this machine; rounds are medians.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.batches import real
from bench.batches.box import CHAT, COMPLETIONS, Box, chats, completions, write_input
from bench.common import median, percentile, rss_mb, table
from tests.support.waiting import wait_for


def throughput(args: argparse.Namespace, home: Path) -> None:
    path = write_input(home / "throughput.jsonl", chats(args.lines))
    rows = []
    with Box() as box:
        box.launch()
        for number in range(args.rounds):
            took = box.run(path)
            rows.append([str(number + 1), f"{took.rate:.0f}", f"{took.cpu_us:.0f}", f"{rss_mb(box.pid):.0f}"])
    print(f"\n{args.lines} chat lines, a simulator that answers at once, 256 slots\n")
    print(table(["round", "lines/s", "daemon CPU a line, µs", "daemon RSS, MB"], rows), flush=True)


def joining(args: argparse.Namespace, home: Path) -> None:
    path = write_input(home / "joining.jsonl", completions(args.lines), COMPLETIONS)
    found: dict[int, list[tuple[float, float]]] = {1: [], 8: []}
    for _ in range(args.rounds):
        for size, results in found.items():
            with Box(batch_max_size=size) as box:
                box.launch()
                took = box.run(path, COMPLETIONS)
                results.append((took.rate, took.cpu_us))
    rows = [
        [str(size), f"{median([rate for rate, _ in results]):.0f}", f"{median([cpu for _, cpu in results]):.0f}"]
        for size, results in found.items()
    ]
    print(f"\n{args.lines} completion lines on the simulator, medians of {args.rounds} rounds\n")
    print(table(["BATCH_MAX_SIZE", "lines/s", "daemon CPU a line, µs"], rows), flush=True)


def scale(args: argparse.Namespace, home: Path) -> None:
    small = write_input(home / "small.jsonl", chats(10_000))
    large = write_input(home / "large.jsonl", chats(args.million))
    rows = []
    with Box() as box:
        box.launch()
        idle = rss_mb(box.pid)
        box.run(small)
        rows.append(["memory: idle, after 10,000 lines (MB)", f"{idle:.0f}, {rss_mb(box.pid):.0f}"])
        began = time.monotonic()
        file_id = box.upload(large)
        rows.append([f"upload of {large.stat().st_size / 1e6:.0f} MB (s)", f"{time.monotonic() - began:.1f}"])
        began = time.monotonic()
        batch_id = box.submit(file_id)
        rows.append(["POST /v1/batches (ms)", f"{1000 * (time.monotonic() - began):.0f}"])
        box.until(batch_id, lambda found: found["status"] != "validating", 900)
        rows.append(["validation (s)", f"{time.monotonic() - began:.1f}"])
        box.until(batch_id, lambda found: found["request_counts"]["completed"] >= args.million // 10, 900)
        rows.append(["memory with a tenth of the lines done (MB)", f"{rss_mb(box.pid):.0f}"])
        done = box.batch(batch_id)["request_counts"]["completed"]
        box.daemon.kill()
        began = time.monotonic()
        box.daemon.start()
        wait_for(lambda: box.daemon.request("GET", "/healthz").status == 200, 60)
        serving = time.monotonic() - began
        box.pin()
        box.until(batch_id, lambda found: found["request_counts"]["completed"] > done, 60)
        rows.append(["kill -9: until it serves, until lines are done again (s)",
                     f"{serving:.1f}, {time.monotonic() - began:.1f}"])  # fmt: skip
        if args.whole:
            began = time.monotonic()
            found = box.until(batch_id, lambda found: found["status"] == "completed", 3600)
            rate = (found["request_counts"]["completed"] - done) / (time.monotonic() - began)
            rows.append(["the rest (lines/s), memory at the end (MB)", f"{rate:.0f}, {rss_mb(box.pid):.0f}"])
    print(f"\n{args.million} lines in one batch\n")
    print(table(["", ""], rows), flush=True)


def validation(args: argparse.Namespace, home: Path) -> None:
    lines = args.megabytes * 1_000_000 // 20_000
    path = write_input(home / "gigabyte.jsonl", chats(lines, model="absent", chars=19_800))
    found: dict[str, list[float]] = {"nothing else": [], "validating": []}
    with Box() as box:
        box.launch(tokens_per_second=200)
        file_id = box.upload(path)
        for _ in range(args.rounds):
            found["nothing else"] += first_bytes(box, lambda began: time.monotonic() - began > 8)
            batch_id = box.submit(file_id)
            found["validating"] += first_bytes(box, partial(is_validated, box, batch_id))
            box.daemon.request("POST", f"/v1/batches/{batch_id}/cancel")
    rows = [
        [name, str(len(times)), *(f"{1000 * percentile(times, part):.2f}" for part in (50, 90, 99))]
        for name, times in found.items()
    ]
    print(f"\nTime to first byte of realtime streams, one after the other, while {args.megabytes} MB are validated\n")
    print(table(["beside", "streams", "p50, ms", "p90, ms", "p99, ms"], rows), flush=True)


def is_validated(box: Box, batch_id: str, _began: float) -> bool:
    return bool(box.batch(batch_id)["status"] != "validating")


def first_bytes(box: Box, over: Callable[[float], bool]) -> list[float]:
    """Times to the first byte of short streams, until it is ``over`` (asked by another thread twice a second)."""
    stop, began, times = threading.Event(), time.monotonic(), []

    def look() -> None:
        while not over(began):
            time.sleep(0.5)
        stop.set()

    looking = threading.Thread(target=look)
    looking.start()
    connection = box.daemon.connection(60)
    body = b'{"model": "sim", "prompt": "a", "max_tokens": 2, "stream": true}'
    headers = {"content-type": "application/json"}
    while not stop.is_set():
        start = time.monotonic()
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        answer.read(1)
        times.append(time.monotonic() - start)
        answer.read()
        time.sleep(0.01)
    looking.join()
    connection.close()
    return times


def prefixes(args: argparse.Namespace, home: Path) -> None:
    path = write_input(home / "prefixes.jsonl", alike(48, 25))
    rows = []
    for name, order in (("as in the file", False), ("by beginnings", True)):
        with Box(batch_prefix_order=order) as box:
            # 128 tokens a block: room for what runs and some ten of the beginnings.
            box.launch(8, profile="vllm-cpu-tiny", num_gpu_blocks_override=300)
            rates = [box.run(path).rate for _ in range(args.rounds)]
            text = box.daemon.request("GET", f"/proxy/{box.launch_id}/metrics").body.decode()
            asked, hit = (metric(text, f"vllm:prefix_cache_{what}_total") for what in ("queries", "hits"))
            hits = hit / asked
        rows.append([name, f"{median(rates):.0f}", f"{100 * hits:.0f} %"])
    print("\n1,200 lines with 48 different beginnings of 2,000 words, in turns; simulator, profile vllm-cpu-tiny\n")
    print(table(["order", "lines/s", "prompt tokens found in the prefix cache"], rows), flush=True)


def alike(beginnings: int, each: int) -> Iterator[dict[str, Any]]:
    for number in range(beginnings * each):
        begin = f"instruction {number % beginnings} " * 1000
        messages = [{"role": "system", "content": begin}, {"role": "user", "content": f"question {number}"}]
        yield {"model": "sim", "messages": messages, "max_tokens": 4}


def metric(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def engine(args: argparse.Namespace, home: Path) -> None:
    real.run(home, lines=args.engine_lines, rounds=args.rounds)


PARTS = {"throughput": throughput, "joining": joining, "scale": scale, "validation": validation, "prefixes": prefixes,
         "engine": engine}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*PARTS], nargs="*", default=[*PARTS])
    parser.add_argument("--lines", type=int, default=40_000, help="of throughput and joining")
    parser.add_argument("--million", type=int, default=1_000_000, help="lines of scale")
    parser.add_argument("--whole", action="store_true", help="let the batch of scale go on to its end")
    parser.add_argument("--megabytes", type=int, default=1000, help="of validation")
    parser.add_argument("--engine-lines", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores; endpoint {CHAT} where nothing else is said")
    with tempfile.TemporaryDirectory() as made:
        for name in args.only:
            PARTS[name](args, Path(made))


if __name__ == "__main__":
    main()
