"""kill -9 of daemon, engine and shim while a batch runs: one record of each line, no finished one run again.

``BATCH_KILLS=50`` tries as many seeds, as ``python -m tests.support.batch_kills`` does.
"""

from __future__ import annotations

import os

import pytest

from tests.support.batch_kills import Night

SEEDS = int(os.environ.get("BATCH_KILLS", "2"))


@pytest.mark.parametrize("seed", range(1, SEEDS + 1))
def test_whatever_is_killed_each_line_has_one_record_in_the_morning(seed: int) -> None:
    Night(seed).run()
