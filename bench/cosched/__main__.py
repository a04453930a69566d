"""What realtime feels of a saturating batch on the same engine, and what batch gets: ``make bench-cosched``.

Contenders take turns on one engine, over rounds, with the same realtime requests at the same times in each round:

* alone: realtime straight to the engine, without any batch
* unprotected: both straight to the engine, first come first served
* engine priority: straight to the engine, with vLLM's own priority for realtime
* ours: both through the daemon with all it does; at one load also with only some of its levers
* ours, no batch: realtime through the daemon and nothing beside it: what of the rest is the way through it

Realtime arrives at random (Poisson), at parts of the rate that the engine can just serve (measured first). The batch
keeps more requests in flight than the engine has slots. *Batch only* is a second engine with its default flags, driven
directly with as many requests at once as suit it best (searched first, then in turns with ours without realtime).

Percentiles are of all rounds' answers together, throughputs the median of the rounds; beside the p99 of all stands the
median of what each round's is by the same round's *alone*. What is far off anyway is measured in one round only. Each
table says how many answers a percentile rests on, how much of the machine processes took that have nothing to do with
the bench, how busy core 0 was (with the load, the daemon and the engine's API server), and how long a fixed piece of
work took before and after. With ``--keep FILE`` it can be done in pieces.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.common import median, percentile, table
from bench.cosched.engines import (
    BATCH_KEY,
    CORES,
    REALTIME_KEY,
    ROOT,
    SIMULATOR_SLOTS,
    Direct,
    Ours,
    default_vllm,
    short_home,
    simulator,
    tiny_model,
)
from bench.cosched.foreign import Foreign, fixed_work_ms
from bench.cosched.load import Found, Work

CONCURRENCIES = (128, 256, 320, 512)
CLIENTS = (64, 128)
OVERLOAD = 1.25
QUEUE = 4000
NOISE = 0.02
# (warm-up, measured, cool-down). Few answers a second need long; where batch answers take long, so do the ends.
IDLE = (10.0, 10.0, 10.0)
# Answers that are not complete by the end count nothing, so the ends must be as long as one takes on a full engine.
ENDS = {"tiny": 1.0, "small": 3.0}
ONCE = (6.0, 10.0, 5.0)
LOADED = ((0.1, (4.0, 22.0, 1.5)), (0.3, (4.0, 12.0, 1.5)), (1.0, (4.0, 8.0, 1.5)))
HEADS = ["realtime, part of capacity", "contender", "answers", "TTFT p50, ms", "TTFT p99, ms", "p99, times alone",
         "median of rounds", "token gap p50, ms", "token gap p99, ms", "realtime tokens/s", "batch tokens/s",
         "of batch only", "core 0 busy", "fixed work, ms"]  # fmt: skip

Times = tuple[float, float, float]


@dataclass(frozen=True)
class Contender:
    name: str
    batch: bool = True
    daemon: bool = False
    priority: bool = False
    off: tuple[str, ...] = ()


ALONE, OURS = Contender("alone", batch=False), Contender("ours", daemon=True)
NO_BATCH = Contender("ours, no batch", daemon=True, batch=False)
FAR_OFF = (Contender("unprotected"), Contender("engine priority", priority=True))
LEVERS = (
    Contender("ours, reserve only", daemon=True, off=("pacing", "cap")),
    Contender("ours, reserve and pacing", daemon=True, off=("cap",)),
)
BATCH_ONLY = Contender("batch only")


@dataclass
class Row:
    """What was seen in all rounds."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    realtime: list[float] = field(default_factory=list)
    batch: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    work_ms: list[float] = field(default_factory=list)
    shared_core: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)

    def add(self, found: Found, seconds: float) -> None:
        self.ttft += found.ttft
        self.p99.append(percentile(found.ttft, 99))
        self.gaps += found.gaps
        self.realtime.append(found.realtime_tokens / seconds)
        self.batch.append(found.batch_tokens / seconds)


@dataclass
class Engines:
    """``default``: driven directly only, if it is needed. ``direct``: how the engine of ``ours`` is reached."""

    default: Direct | None
    ours: Ours
    direct: Mapping[str, object]


class Bench:
    def __init__(self, args: argparse.Namespace, profile: str | None) -> None:
        self.args, self.profile = args, profile
        self.engine = f"simulator, {profile}" if profile else "vLLM, CPU build"
        self.rows: dict[tuple[float, str], Row] = {}
        self.best, self.best_at, self.capacity, self.foreign = 0.0, CONCURRENCIES[0], 0.0, 0.0
        self.work_ms = self.shared_core = 0.0
        self.roots: list[int] = []
        self.recall()
        self.began = time.monotonic()
        self.done_s, self.planned_s = 0.0, sum(sum(self.times(times)) for times, _ in self.plan())

    # -- the plan ---------------------------------------------------------------------------------------------------

    def plan(self) -> list[tuple[Times, Callable[[Engines], None]]]:
        """All measurements in their order, with what each takes."""
        args = self.args
        steps: list[tuple[Times, Callable[[Engines], None]]] = []
        if not self.best and 0 in args.loads:
            steps += [(IDLE, lambda engines, n=count: self.search(engines, n)) for count in CONCURRENCIES]  # type: ignore[misc]
        if not self.capacity:
            steps += [((2.0, 6.0, 2.0), lambda engines, n=count: self.full(engines, n)) for count in CLIENTS]  # type: ignore[misc]
        for number in range(args.rounds):
            for part in args.loads:
                turns = (BATCH_ONLY, OURS) if part == 0 else (ALONE, NO_BATCH, OURS)
                steps += [self.step(one, part, number) for one in (turns if number % 2 == 0 else turns[::-1])]
                if part and number == args.rounds // 2 and args.far_off:
                    steps += [self.step(one, part, number, ONCE) for one in FAR_OFF]
        for part in args.loads:
            if args.levers and part == args.levers:
                steps += [self.step(one, part, args.rounds // 2, ONCE) for one in LEVERS]
            if part and not args.rounds and args.far_off:
                steps += [self.step(one, part, 0, ONCE) for one in FAR_OFF]
        return steps

    def step(
        self, contender: Contender, part: float, number: int, times: Times | None = None
    ) -> tuple[Times, Callable[[Engines], None]]:
        if times is None:
            times = next(one for most, one in LOADED if part <= most) if part else IDLE
        return times, lambda engines: self.measure(engines, contender, part, number, times)

    def times(self, times: Times) -> Times:
        ends = max(1.0, sum(self.args.batch_tokens) / sum(Work.batch_tokens))
        if times is IDLE:
            ends *= ENDS[self.args.size]
        return times[0] * ends, times[1] * self.args.scale, times[2] * ends

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        home, plan = short_home(), self.plan()
        try:
            with ExitStack() as stack:
                engines = self.start(stack, home)
                self.load({**engines.direct, "batch": 64, "seconds": 2.0, "warmup_s": 3.0})  # a fresh engine is slow
                for times, step in plan:
                    step(engines)
                    self.remember()
                    self.done_s += sum(self.times(times))
        finally:
            shutil.rmtree(home, ignore_errors=True)
        print(self.report(), flush=True)

    def recall(self) -> None:
        """What earlier pieces of this run have left."""
        if self.args.keep is not None and self.args.keep.exists():
            kept = json.loads(self.args.keep.read_text()).get(self.engine)
            if kept:
                self.best, self.best_at, self.capacity = kept["best"], kept["best_at"], kept["capacity"]
                self.rows = {(part, name): Row(**row) for part, name, row in kept["rows"]}

    def remember(self) -> None:
        if self.args.keep is not None:
            every = json.loads(self.args.keep.read_text()) if self.args.keep.exists() else {}
            rows = [[part, name, asdict(row)] for (part, name), row in self.rows.items()]
            every[self.engine] = {"best": self.best, "best_at": self.best_at, "capacity": self.capacity, "rows": rows}
            self.args.keep.write_text(json.dumps(every))

    def start(self, stack: ExitStack, home: Path) -> Engines:
        default = None
        model = "sim" if self.profile else str(tiny_model(home, self.args.size))
        if self.profile:
            default = stack.enter_context(simulator(home, self.profile))
        elif 0 in self.args.loads:
            default = stack.enter_context(default_vllm(home, Path(model)))
        ours = stack.enter_context(Ours(self.profile, home, QUEUE))
        ours.launch(model, extra_args=self.args.extra_args)
        self.roots = [ours.pid]
        return Engines(default, ours, {"port": default.port} if self.profile and default else ours.direct)

    def search(self, engines: Engines, count: int) -> None:
        """How many requests at once suit batch best."""
        self.best_at, before = count, self.best_at
        rate = self.batch_rate(engines, count, 0)
        self.tell(f"batch only, {count} at once: {rate:.0f} tokens/s")
        if rate > self.best:
            self.best = rate
        else:
            self.best_at = before

    def batch_rate(self, engines: Engines, count: int, seed: int) -> float:
        assert engines.default is not None
        warmup, seconds, cooldown = self.times(IDLE)
        work = {"port": engines.default.port, "batch": count, "seed": seed, "seconds": seconds}
        ends = {"warmup_s": warmup, "cooldown_s": cooldown}
        return self.load({**work, **ends, **self.batch()}).batch_tokens / seconds

    def batch(self) -> dict[str, object]:
        return {"batch_tokens": self.args.batch_tokens, "batch_words": self.args.batch_words}

    def full(self, engines: Engines, clients: int) -> None:
        """What realtime alone can have."""
        work = {"realtime_clients": clients, "seconds": 6.0, "warmup_s": 2.0, "cooldown_s": 2.0}
        rate = self.load({**engines.direct, **work}).realtime_done / 6.0
        self.tell(f"realtime only, {clients} clients: {rate:.1f} requests/s")
        self.capacity = max(self.capacity, rate)

    def measure(self, engines: Engines, contender: Contender, part: float, number: int, times: Times) -> None:
        row = self.rows.setdefault((part, contender.name), Row())
        if contender is BATCH_ONLY:
            row.batch.append(self.batch_rate(engines, self.best_at, number + 1))
            self.note(row)
            self.tell(f"batch only, {self.best_at} at once: {row.batch[-1]:.0f} tokens/s")
            return
        ours = engines.ours
        if contender.daemon:
            ours.use(contender.off)
        where = {"port": ours.daemon.address[1]} if contender.daemon else engines.direct
        work: dict[str, object] = {**where, "realtime_rate": part * self.capacity, "seed": number + 1}
        work["warmup_s"], seconds, work["cooldown_s"] = self.times(times)
        work["seconds"], work["batch"] = seconds, int(ours.slots * OVERLOAD) if contender.batch else 0
        work["realtime_headers"], work["batch_headers"] = _headers(contender)
        found = self.load(work | self.batch())
        row.add(found, seconds)
        self.note(row)
        refused = f", refused: {found.refused}" if found.refused else ""
        unanswered = f" ({found.unanswered} not begun)" if found.unanswered else ""
        self.tell(
            f"{part:.0%} {contender.name}: TTFT p50 {percentile(found.ttft, 50) * 1000:.1f} p99 "
            f"{percentile(found.ttft, 99) * 1000:.1f} ms of {len(found.ttft)}{unanswered}, batch "
            f"{row.batch[-1]:.0f} tokens/s{refused}{self.budget(ours) if contender.daemon else ''}"
        )

    def note(self, row: Row) -> None:
        """What the machine was like meanwhile."""
        row.foreign.append(self.foreign)
        row.work_ms.append(self.work_ms)
        row.shared_core.append(self.shared_core)

    def tell(self, line: str) -> None:
        passed = time.monotonic() - self.began
        rest = f", about {self.planned_s - self.done_s:.0f} s to go" if self.planned_s > self.done_s else ""
        foreign = f" ({self.foreign:.0%} of the machine went to others)" if self.foreign > NOISE else ""
        print(f"[{passed:.0f} s{rest}, fixed work {self.work_ms:.0f} ms] {line}{foreign}", flush=True)

    def budget(self, ours: Ours) -> str:
        return f"\n    {json.dumps(ours.daemon.status(ours.launch_id).get('load'))}" if self.args.verbose else ""

    def load(self, given: Mapping[str, object]) -> Found:
        work = asdict(Work(**given))  # type: ignore[arg-type]
        pin = ["taskset", "-c", "0"] if CORES > 1 and shutil.which("taskset") else []
        command = [*shlex.split(self.args.prefix), *pin, sys.executable, "-m", "bench.cosched.load"]
        before_ms = fixed_work_ms()
        with Foreign(self.roots) as foreign:
            output = subprocess.run(
                command, input=json.dumps(work), capture_output=True, text=True, cwd=ROOT, check=False
            )
        self.foreign, self.work_ms = foreign.share, (before_ms + fixed_work_ms()) / 2
        self.shared_core = foreign.shared_core
        if output.returncode:
            raise SystemExit(output.stderr)
        found = Found(**json.loads(output.stdout))
        if found.refused and not found.ttft and not found.batch_done:
            raise SystemExit(f"nothing was answered: {found.refused}")
        return found

    # -- telling ----------------------------------------------------------------------------------------------------

    def report(self) -> str:
        idle = self.rows.get((0, BATCH_ONLY.name))
        best = median(idle.batch) if idle else self.best
        foreign = [share for row in self.rows.values() for share in row.foreign]
        lines = []
        for (part, name), row in sorted(self.rows.items(), key=lambda one: one[0][0]):
            alone = self.rows.get((part, ALONE.name))
            p99 = percentile(row.ttft, 99)
            ms = [percentile(row.ttft, 50), p99, percentile(row.gaps, 50), percentile(row.gaps, 99)]
            shown = [f"{number * 1000:.1f}" if row.ttft else "" for number in ms]
            times = f"{p99 / percentile(alone.ttft, 99):.2f}" if alone else ""
            each = [one / other for one, other in zip(row.p99, alone.p99, strict=False)] if alone else []
            batch = median(row.batch)
            share = f"{batch / best:.0%}" if best else ""
            lines.append([
                f"{part:.0%}", name, f"{len(row.ttft)}" if part else "", *shown[:2], times,
                f"{median(each):.2f}" if each else "", *shown[2:], f"{median(row.realtime):.0f}" if part else "",
                *([f"{batch:.0f}", share] if batch else ["", ""]), f"{median(row.shared_core):.0%}",
                f"{median(row.work_ms):.0f}",
            ])  # fmt: skip
        return (
            f"\nEngine: {self.engine}. Batch only: {best:.0f} tokens/s with {self.best_at} at once. Realtime capacity: "
            f"{self.capacity:.1f} requests/s. Others took {median(foreign):.1%} of the machine in the middle, "
            f"{max(foreign, default=0):.0%} at most.\n\n"
            f"{table(HEADS, lines)}"
        )


def _headers(contender: Contender) -> tuple[dict[str, str], dict[str, str]]:
    if contender.daemon:
        return {"authorization": f"Bearer {REALTIME_KEY}"}, {"authorization": f"Bearer {BATCH_KEY}"}
    if contender.priority:
        return {"x-vllm-priority": "0"}, {"x-vllm-priority": "1000"}
    return {}, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["vllm", "simulator"], default="vllm")
    parser.add_argument("--profile", action="append", choices=sorted(SIMULATOR_SLOTS), help="of the simulator")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="measure so many times as long")
    parser.add_argument(
        "--batch-tokens", type=int, nargs=2, default=Work.batch_tokens, metavar=("LEAST", "MOST"), help="of its answers"
    )
    parser.add_argument(
        "--batch-words", type=int, nargs=2, default=Work.batch_words, metavar=("LEAST", "MOST"), help="of its prompts"
    )
    parser.add_argument("--size", choices=["tiny", "small"], default="tiny", help="of the real engine's model")
    parser.add_argument("--extra-args", type=json.loads, default={}, help="of the launch of ours, as JSON")
    parser.add_argument("--loads", type=float, nargs="*", default=[0, 0.05, 0.25, 0.5], help="parts of capacity")
    parser.add_argument("--levers", type=float, default=0.25, help="the load at which single levers are shown; 0: none")
    parser.add_argument(
        "--no-far-off", dest="far_off", action="store_false", help="only alone and ours (with batch and without)"
    )
    parser.add_argument("--keep", type=Path, help="a file; what an earlier run left in it counts too")
    parser.add_argument("--prefix", default="", help="a command before that of each measurement")
    parser.add_argument("--verbose", action="store_true", help="show the budget after each measurement of ours")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    args = parser.parse_args()
    for profile in [None] if args.engine == "vllm" else args.profile or sorted(SIMULATOR_SLOTS, reverse=True):
        Bench(args, profile).run()


if __name__ == "__main__":
    main()
