"""What the catalogue costs and what it brings: ``python -m bench.models`` (or ``make bench-models``).

* ``names``: routing by a model's name against ``/proxy/{id}``
* ``idle``: the keeper while nothing happens, with long catalogues
* ``first-token``: from a request to its first byte, cold, asleep and warm
* ``collate``: three models, room for one, requests for them in turns: ours against first come, first served
* ``prefetch``: loading from disk against loading from memory

A real vLLM takes part in the last but one and the last where ``VLLM_ENGINE_ENV`` (``.engine``) holds one.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.cosched.engines import ENGINE_ENV, short_home
from bench.models import collate, first_token, idle, names, prefetch

PARTS = ("names", "idle", "first-token", "collate", "prefetch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=4, help="of names")
    parser.add_argument("--requests", type=int, default=5000, help="of names, in each round")
    parser.add_argument("--idle-s", type=float, default=20, help="how long idle daemons are watched")
    parser.add_argument("--no-vllm", action="store_true", help="the simulator only")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on a disk, for prefetch")
    args = parser.parse_args()
    if wrong := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(wrong))}")
    python = None if args.no_vllm else ENGINE_ENV / "bin" / "python"
    if python is not None and not python.exists():
        raise SystemExit(f"There is no {python}: make it with `make test-vllm`, or leave vLLM out with --no-vllm.")
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "names": lambda: names.run(args.rounds, args.requests),
        "idle": lambda: idle.run(args.idle_s),
        "first-token": lambda: _first_token(with_vllm=python is not None),
        "collate": collate.run,
        "prefetch": lambda: prefetch.run(5, python, 1, args.folder),
    }
    began = time.monotonic()
    for name in args.parts or PARTS:
        print(f"\n[{time.monotonic() - began:.0f} s] {name}\n", flush=True)
        for line in parts[name]():
            print(line, flush=True)
    print(f"\n[{time.monotonic() - began:.0f} s] done", flush=True)


def _first_token(*, with_vllm: bool) -> Iterator[str]:
    yield from first_token.run_simulator(10)
    if with_vllm:
        home = short_home()
        try:
            yield from first_token.run_vllm(1, home)
        finally:
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
