"""How far the simulator is from an engine: ``python -m bench.simfit COMMAND``.

``sweep`` measures a real vLLM, ``fit`` makes a profile of it; ``loads`` drives the same trace at 20, 60 and 95 % of
the engine's capacity against the real engine or the simulator, ``compare`` prints their difference as a table;
``speed`` says whether the simulator itself is fast enough. Engines are started and pinned here (``engines``), or,
with ``--uds`` and ``--pid``, are there already. Results are JSON files, so that each step can be repeated alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.common import percentile, table
from bench.simfit import engines, fit, measure, speed, trace, virtual
from bench.simfit.client import Client
from vllm_bootstrap.engines.simulator.stepcost import profile_of

DEFAULT_PYTHON = engines.ROOT / ".engine" / "bin" / "python"
SOURCE = (
    "vLLM 0.32.0, CPU build, EngineCore on one core, Llama of 2.4 M parameters in float32 with the tests' tokenizer"
)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    os.sched_setaffinity(0, {engines.LOAD_CORE})
    args.command(args)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.simfit", description=__doc__)
    commands = made.add_subparsers(required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.set_defaults(command=run)
        return added

    for name, run, text in (
        ("sweep", run_sweep, "measure steps and capacity of a real vLLM"),
        ("loads", run_loads, "drive the trace at three loads"),
    ):
        added = command(name, run, text)
        added.add_argument("--out", type=Path, required=True)
        added.add_argument("--uds", help="an engine that runs already")
        added.add_argument("--pid", type=int, default=0, help="its API server")
        added.add_argument("--python", type=Path, default=DEFAULT_PYTHON, help="interpreter with vLLM")
        added.add_argument("--flags", default="", help="further flags of the engine, separated by spaces")
    added.add_argument("--capacity", type=float, required=True, help="requests a second, as sweep found them")
    added.add_argument("--seconds", type=float, default=measure.LOAD_SECONDS, help="length of each load")
    added.add_argument("--profile", help="the simulator with this profile instead of a real vLLM")
    added = command("fit", run_fit, "make a profile from a sweep")
    added.add_argument("sweep", type=Path)
    added.add_argument("--name", default="vllm-cpu-tiny")
    added.add_argument("--source", default=SOURCE)
    added.add_argument("--budget", type=int, default=2048, help="max_num_batched_tokens of the engine")
    added = command("compare", run_compare, "the error table from two results of loads")
    added.add_argument("real", type=Path)
    added.add_argument("simulated", type=Path)
    added = command("speed", speed.run, "512 streams on one core")
    added.add_argument("--streams", type=int, default=512)
    added.add_argument("--seconds", type=float, default=3.0)
    added = command("trace", run_trace, "write a Poisson trace")
    added.add_argument("--rate", type=float, required=True)
    added.add_argument("--seconds", type=float, required=True)
    added.add_argument("--seed", type=int, default=measure.SEED)
    added.add_argument("--out", type=Path, required=True)
    added = command("replay", run_replay, "drive a trace file against an engine")
    added.add_argument("trace", type=Path)
    added.add_argument("--uds", required=True)
    return made


@contextlib.contextmanager
def engine(args: argparse.Namespace, profile: str | None = None) -> Iterator[engines.Running]:
    if args.uds:
        yield engines.Running(args.uds, args.pid, "given")
    else:
        flags = args.flags.split()
        with engines.simulator(profile, flags) if profile else engines.vllm(args.python, flags) as running:
            yield running


def run_sweep(args: argparse.Namespace) -> None:
    with engine(args) as running:
        swept = asyncio.run(measure.sweep(running))
        swept["busy"] = asyncio.run(measure.busy(running))
    swept["capacity"] = swept["busy"][0]["requests_per_s"]
    args.out.write_text(json.dumps(swept, indent=1))
    print(f"capacity: {swept['capacity']:.1f} requests/s")


def run_loads(args: argparse.Namespace) -> None:
    rates = [args.capacity * load for load in measure.LOADS]
    with engine(args, args.profile) as running:
        found = asyncio.run(measure.loads(running, rates, args.seconds))
    args.out.write_text(json.dumps(found))


def run_fit(args: argparse.Namespace) -> None:
    swept = json.loads(args.sweep.read_text())
    made = fit.profile(swept, name=args.name, source=args.source, budget=args.budget)
    print(json.dumps(made, indent=2))
    found = fit.coefficients(swept)
    rows = [
        (
            row.text,
            f"{row.seconds * 1e3:.2f}",
            f"{row.said(found) * 1e3:.2f}",
            f"{row.said(found) / row.seconds - 1:+.0%}",
        )
        for row in fit.rows(swept)
    ]
    print(f"\n{table(['sample', 'measured, ms', 'profile, ms', 'error'], rows)}")
    for run in swept["busy"]:
        requests = trace.poisson(run["requests"], 2.0, seed=measure.SEED)[: run["requests"]]
        said = virtual.capacity(profile_of(json.dumps(made)), requests, run["streams"])
        print(f"{run['streams']} streams: {run['requests_per_s']:.1f} requests/s measured, {said:.1f} simulated")


def run_compare(args: argparse.Namespace) -> None:
    print(comparison(json.loads(args.real.read_text()), json.loads(args.simulated.read_text())))


def comparison(real: Sequence[dict[str, Any]], simulated: Sequence[dict[str, Any]]) -> str:
    """The error table in Markdown: one row for each load and figure."""
    rows = []
    for one, other, load in zip(real, simulated, measure.LOADS, strict=True):
        for name, figure in FIGURES.items():
            true, said = figure(one), figure(other)
            row = (f"{load:.0%}", name, f"{true:,.1f}", f"{said:,.1f}", f"{said / true - 1:+.0%}")
            rows.append(row)
    return table(["load", "figure", "vLLM", "simulator", "error"], rows)


FIGURES = {
    "TTFT p50, ms": lambda run: percentile(run["ttft_s"], 50) * 1e3,
    "TTFT p99, ms": lambda run: percentile(run["ttft_s"], 99) * 1e3,
    "time between tokens p50, ms": lambda run: percentile(run["token_gap_s"], 50) * 1e3,
    "time between tokens p99, ms": lambda run: percentile(run["token_gap_s"], 99) * 1e3,
    "tokens/s": lambda run: run["tokens_per_s"],
}


def run_trace(args: argparse.Namespace) -> None:
    trace.write(trace.poisson(args.rate, args.seconds, seed=args.seed), args.out)


def run_replay(args: argparse.Namespace) -> None:
    async def replay() -> dict[str, Any]:
        client = Client(args.uds, engines.MODEL)
        try:
            return measure.summary(await client.replay(trace.read(args.trace)))
        finally:
            client.close()

    found = asyncio.run(replay())
    for name, figure in FIGURES.items():
        print(f"{name}: {figure(found):,.1f}")
    print(f"requests: {found['requests']}, failed: {found['failed']}")


if __name__ == "__main__":
    main()
