from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from vllm_bootstrap.engines.base import Gpu
from vllm_bootstrap.launches.resting import (
    GIB,
    GpuLook,
    SleepFacts,
    facts_in,
    not_asleep,
    too_little_host_memory,
    weights_bytes,
)

LARGE = Gpu("GPU-a", 3, "H200", 140 * GIB)
SMALL = Gpu("GPU-b", 0, "L4", 16 * GIB)


def look(before: float, after: float, gpu: Gpu = LARGE, *, baseline: float = 0) -> GpuLook:
    return GpuLook(gpu, int(baseline * GIB), int(before * GIB), int(after * GIB))


def test_near_nothing_left_is_asleep() -> None:
    assert not_asleep(look(126, 1.5)) is None
    assert not_asleep(look(0, 0)) is None


def test_what_was_there_before_the_launch_does_not_count() -> None:
    assert not_asleep(look(100, 61, baseline=60)) is None


@pytest.mark.parametrize(
    ("gpu", "before", "after", "says"),
    [
        (LARGE, 126, 14, None),
        (LARGE, 126, 14.1, "14.1 GiB of GPU 3 are still in use, more than 14.0 GiB"),
        (SMALL, 14, 2, None),
        (SMALL, 14, 2.1, "2.1 GiB of GPU 0 are still in use, more than 2.0 GiB"),
        (SMALL, 3, 1.5, None),
        (SMALL, 3, 1.6, "only 1.4 of 3.0 GiB of GPU 0 became free"),
        (SMALL, 1, 1.5, "only -0.5 of 1.0 GiB of GPU 0 became free"),
    ],
)
def test_too_much_left_is_no_sleep(gpu: Gpu, before: float, after: float, says: str | None) -> None:
    assert not_asleep(look(before, after, gpu)) == says


def test_neighbours_may_use_their_shares_and_residues() -> None:
    shared = replace(look(80, 71), others_milli=500)
    assert not_asleep(shared) is None
    assert shared.used(71 * GIB) == GIB
    assert replace(look(40, 6), others_bytes=5 * GIB).used(6 * GIB) == GIB


@pytest.mark.parametrize("missing", ["before", "after", "baseline"])
def test_what_cannot_be_read_proves_no_sleep(missing: str) -> None:
    assert not_asleep(replace(look(80, 1), **{missing: None})) == "the memory of GPU 3 cannot be read"


def test_the_host_keeps_the_reserve() -> None:
    assert too_little_host_memory(1, 16 * GIB, 24 * GIB, 8 * GIB) is None
    assert too_little_host_memory(1, 17 * GIB, 24 * GIB, 8 * GIB) == (
        "the host has 24.0 GiB of memory left and 17.0 GiB would be taken, "
        "which leaves less than the reserve of 8.0 GiB"
    )
    assert too_little_host_memory(2, 17 * GIB, 24 * GIB, 8 * GIB) is None


def test_weights_are_as_large_as_their_files_where_these_are_known() -> None:
    assert weights_bytes(2 * GIB, 70 * GIB) == 2 * GIB
    assert weights_bytes(200 * GIB, 70 * GIB) == 70 * GIB
    assert weights_bytes(None, 70 * GIB) == 70 * GIB
    assert weights_bytes(0, 70 * GIB) == 70 * GIB


def test_facts_are_read_back_as_they_were_stored() -> None:
    facts = SleepFacts(2, {"GPU-a": 5}, {"GPU-a": 1}, " Paris")
    assert facts_in(asdict(facts)) == facts
    assert facts_in(None) is None
