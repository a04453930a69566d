"""Random starts, stops and kills of everything; after each round nothing is orphaned, stuck, leaked or left behind.

A few rounds here; ``CHAOS_ROUNDS=200 CHAOS_SEED=7 make test`` or ``python -m bench.chaos`` for more.
"""

import os

import pytest

from tests.support.chaos import SETTINGS, Chaos
from tests.support.daemon import DaemonProcess

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "25"))
SEED = int(os.environ.get("CHAOS_SEED", "20"))
WITHIN_S = 25.0
FEWEST = 8


@pytest.mark.timeout(max(240, ROUNDS * 4))
def test_whatever_is_killed_whenever_nothing_is_left_stuck_or_owned_twice():
    with DaemonProcess(**SETTINGS) as daemon:
        chaos = Chaos(daemon, SEED)
        chaos.run(ROUNDS, fewest=FEWEST if ROUNDS <= 25 else None, within_s=WITHIN_S)
        print("\n".join(chaos.figures.lines()))
        assert chaos.figures.rounds >= min(ROUNDS, FEWEST)
