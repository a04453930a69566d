"""Everything at once for a while: ``python -m bench.soak --minutes 20 --seed 1`` (or ``make bench-soak``).

Realtime and batch traffic with keys, streams that are left or read slowly, bad requests, dashboards that poll, and
launches that are started, stopped and killed with their shims. One model, ``steady``, is never touched: its engine must
live through everything, and its requests may only fail while the daemon itself is away. The daemon is killed too, but
only in the last third, so that its memory and files can be watched over a long life before.

About once a minute all clients pause, and nothing may be left: no request in flight or queued, no orphan, no claim, no
more open files, threads, memory or rows than before. Prints a table and each problem; ends with 1 when there is one.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import free_port, open_files, rss_mb, table
from bench.soak.traffic import STEADY, Traffic
from bench.soak.verdicts import Book
from tests.support.chaos import SETTINGS, Chaos
from tests.support.daemon import DaemonProcess

ENDED_KEPT, ACTIVITY_KEPT, LOGS_KEPT = 30, 1000, 8 << 20
# So many events of each ended launch and so many not yet removed rows of activity are normal.
MOST_ROWS = ENDED_KEPT * 40 + ACTIVITY_KEPT + 3000
KEYS: dict[str, dict[str, Any]] = {
    "admin": {"scopes": ["admin", "logs", "monitor"]},
    "realtime": {"scopes": ["realtime", "batch"]},
    "limited": {"scopes": ["realtime"], "max_parallel": 2, "requests_per_minute": 60, "tokens_per_minute": 2000},
    "batch": {"scopes": ["batch"]},
    "eyes": {"scopes": ["monitor", "logs"]},
}
QUIET_S = 20.0
# What a daemon may grow by after its first quiet moment: files by a connection or two, memory by caches that fill.
MORE_FILES, MORE_THREADS, MORE_MB, MORE_ENGINE_MB = 6, 4, 24.0, 24.0


@dataclass(frozen=True)
class Sample:
    """What is there while nothing happens."""

    life: int
    minute: float
    files: int
    threads: int
    rss: float
    engine_files: int
    engine_rss: float
    shim_rss: float
    rows: int
    log_mb: float


class Soak:
    def __init__(self, daemon: DaemonProcess, args: argparse.Namespace, keys: dict[str, str]) -> None:
        self.daemon, self.luck = daemon, random.Random(args.seed)
        self.book, self.samples, self.life = Book(), list[Sample](), 1
        self.began, self.minutes = time.monotonic(), args.minutes
        order = {"restart": {"policy": "on-failure"}, "gpu_ids": [0]}
        self.steady = daemon.ready("steady", served_model_name=STEADY, max_num_seqs=8, **order)
        self.chaos = Chaos(daemon, args.seed, frozenset({self.steady["launch_id"]}), ENDED_KEPT)
        self.traffic = Traffic(daemon.url, keys, self.steady["launch_id"], self.book, args.seed)

    @property
    def minute(self) -> float:
        return (time.monotonic() - self.began) / 60

    def run(self, told: Callable[[str], None]) -> None:
        cycle_s = min(60.0, self.minutes * 60 / 6)
        self.traffic.start()
        while self.minute < self.minutes and not self.book.problems:
            self.traffic.go()
            until = time.monotonic() + cycle_s
            while time.monotonic() < until:
                self.chaos.round(kill_daemon=False)
                self._freeze()
                time.sleep(self.luck.random() * 2)
                told(self.line())
            if self.minute > self.minutes * 2 / 3:
                self.kill_the_daemon()
            self.traffic.pause()
            self.chaos.stop_all()
            self.look()
            told(self.line())
        self.traffic.close()

    def kill_the_daemon(self) -> None:
        self.book.outage_begins()
        self.chaos.round(kill_daemon=True)
        self.daemon.wait_state(self.steady["launch_id"], "ready")
        self.book.outage_ends()
        self.life += 1
        time.sleep(self.luck.random() * 5)

    def _freeze(self) -> None:
        """Stop an engine in its tracks for a moment."""
        if self.luck.random() < 0.2:
            self.chaos.freeze(self.luck.random())

    # -- looking -----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """At a quiet moment: note what is there and what should not be."""
        problems = ["never looked"]
        deadline = time.monotonic() + QUIET_S
        while problems and time.monotonic() < deadline:
            sample = self.sample()
            problems = [*self.unrest(), *self.growth(sample)]
            if problems:
                time.sleep(0.2)
        self.samples.append(sample)
        self.book.problems += [f"minute {self.minute:.1f}, at rest: {problem}" for problem in problems]
        if self.book.begun != self.book.ended:
            self.book.problems.append(f"{self.book.begun} requests were begun and {self.book.ended} ended")

    def unrest(self) -> list[str]:
        """What is still going on although nobody asks for anything."""
        lines = self.daemon.request("GET", "/metrics").body.decode().splitlines()
        gauges = ("vllm_bootstrap_in_flight_requests", "vllm_bootstrap_queue_depth")
        found = [line for line in lines if line.startswith(gauges) and not line.endswith(" 0.0")]
        listed = self.daemon.request("GET", "/requests")
        if listed.json()["data"]:
            found.append(f"listed: {listed.body[:300]!r}")
        engine = self.daemon.request("GET", f"/proxy/{self.steady['launch_id']}/metrics").body.decode().splitlines()
        counts = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        found += [line for line in engine if line.startswith(counts) and not line.endswith((" 0.0", " 0"))]
        now = self.daemon.status(self.steady["launch_id"])
        if (now["state"], now["pid"], now["attempt"]) != ("ready", self.steady["pid"], 1):
            found.append(f"the steady launch is {now['state']}, pid {now['pid']}, attempt {now['attempt']}")
        return found

    def sample(self) -> Sample:
        pid, engine, shim = self.daemon.pid, self.steady["pid"], self.steady["shim_pid"]
        rows = sum(count_rows(path) for path in self.daemon.state_dir.glob("*.db"))
        logs = sum(path.stat().st_size for path in (self.daemon.state_dir / "logs").rglob("*") if path.is_file())
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        return Sample(
            self.life, self.minute, open_files(pid), threads, rss_mb(pid), open_files(engine), rss_mb(engine),
            rss_mb(shim), rows, logs / (1 << 20),
        )  # fmt: skip

    def growth(self, now: Sample) -> list[str]:
        """What has become more since the first quiet moment of this daemon's life."""
        found = []
        first = next((one for one in self.samples if one.life == now.life), now)
        oldest = self.samples[0] if self.samples else now
        for name, was, is_now, more in (
            ("open files", first.files, now.files, MORE_FILES),
            ("threads", first.threads, now.threads, MORE_THREADS),
            ("MB", first.rss, now.rss, MORE_MB),
            ("open files of the steady engine", oldest.engine_files, now.engine_files, MORE_FILES),
            ("MB of the steady engine", oldest.engine_rss, now.engine_rss, MORE_ENGINE_MB),
            ("MB of its shim", oldest.shim_rss, now.shim_rss, 4),
        ):
            if is_now > was + more:
                found.append(f"{is_now:.0f} {name}, {was:.0f} at first")
        kept = len(self.daemon.request("GET", "/launches?all=true&limit=1000").json()["data"])
        if kept > ENDED_KEPT + 1:
            found.append(f"{kept} launches are kept")
        if now.rows > MOST_ROWS:
            found.append(f"{now.rows} rows are kept")
        if now.log_mb > 2 * LOGS_KEPT / (1 << 20):
            found.append(f"{now.log_mb:.0f} MB of logs are kept")
        return found

    # -- telling -----------------------------------------------------------------------------------------------------

    def line(self) -> str:
        faults = sum(self.chaos.figures.faults.values())
        last = f", {self.samples[-1].rss:.0f} MB, {self.samples[-1].files} files" if self.samples else ""
        return (
            f"{self.minute:.1f} of {self.minutes:g} min: {self.book.ended} requests, {faults} faults, "
            f"{len(self.book.problems)} problems{last}"
        )

    def report(self) -> str:
        by_kind: dict[str, Counter[str]] = {}
        for (kind, name), count in sorted(self.book.ends.items()):
            by_kind.setdefault(kind, Counter())[name] += count
        rows = [
            [kind, str(ends.total()), ", ".join(f"{name}: {count}" for name, count in ends.most_common())]
            for kind, ends in by_kind.items()
        ]
        first, last = self.samples[0], self.samples[-1]
        figures = [
            [name, f"{getattr(first, key):.0f}", f"{max(getattr(s, key) for s in self.samples):.0f}",
             f"{getattr(last, key):.0f}"]
            for name, key in (
                ("daemon: open files", "files"), ("daemon: threads", "threads"), ("daemon: RSS, MB", "rss"),
                ("steady engine: open files", "engine_files"), ("steady engine: RSS, MB", "engine_rss"),
                ("its shim: RSS, MB", "shim_rss"), ("rows in the databases", "rows"), ("engine logs, MB", "log_mb"),
            )
        ]  # fmt: skip
        return "\n\n".join(
            [
                self.line(),
                table(["at rest", "first", "most", "last"], figures),
                table(["request", "number", "ends"], rows),
                "\n".join(self.chaos.figures.lines()[2:]),
            ]
        )


def count_rows(path: Path) -> int:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return sum(connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names)
    finally:
        connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    settings = {
        **SETTINGS, "devices": "mock:4", "port": free_port(), "ended_launches_kept": ENDED_KEPT,
        "activity_rows": ACTIVITY_KEPT,
        "engine_log_segment_bytes": 1 << 18, "engine_log_max_bytes": 1 << 20, "ended_logs_max_bytes": LOGS_KEPT,
    }  # fmt: skip
    keys = {name: f"soak-{name}-0123456789abcdef" for name in KEYS}
    daemon = DaemonProcess(key=keys["admin"], **settings)
    file = daemon.root / "keys.json"
    entries = [{"name": name, "token": keys[name], **entry} for name, entry in KEYS.items()]
    file.write_text(json.dumps({"keys": entries}))
    file.chmod(0o600)
    daemon.configure(auth_keys_file=file)
    with daemon:
        soak = Soak(daemon, args, keys)
        told = tell()
        try:
            soak.run(told)
        except AssertionError as exc:
            soak.book.problems.append(str(exc))
        print(soak.report() if soak.samples else soak.line())
        if soak.book.problems:
            print(
                "\n".join(["", "Problems:", *soak.book.problems[:50], "--- log of the daemon ---", daemon.log[-8000:]])
            )
        return 1 if soak.book.problems else 0


def tell() -> Callable[[str], None]:
    """On a terminal one line that changes, else a line a minute."""
    if sys.stderr.isatty():
        return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    last = [0.0]

    def plain(text: str) -> None:
        if time.monotonic() - last[0] >= 60:
            last[0] = time.monotonic()
            print(text, flush=True)

    return plain


if __name__ == "__main__":
    sys.exit(main())
