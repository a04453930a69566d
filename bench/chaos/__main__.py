"""Random starts, stops and kills of everything, at length: ``python -m bench.chaos --rounds 200 --seed 1``.

The same rounds as in ``tests/acceptance/test_chaos.py``, only more of them. Ends with 1 and the reason at the first
thing that does not hold; the daemon's log is printed then.
"""

from __future__ import annotations

import argparse
import random
import sys

from tests.support.chaos import SETTINGS, Chaos
from tests.support.daemon import DaemonProcess


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--verbose", action="store_true", help="a line for each round")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with DaemonProcess(**SETTINGS) as daemon:
        chaos = Chaos(daemon, args.seed)
        try:
            chaos.run(args.rounds, told=_tell if args.verbose else lambda *_: None)
        except AssertionError as exc:
            print(f"round {chaos.figures.rounds}: {exc}\n--- log of the daemon ---\n{daemon.log[-20000:]}")
            return 1
        finally:
            print("\n".join(chaos.figures.lines()))
    return 0


def _tell(number: int, fault: str) -> None:
    print(number, fault, flush=True)


if __name__ == "__main__":
    sys.exit(main())
