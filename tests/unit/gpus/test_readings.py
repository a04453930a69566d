from __future__ import annotations

import pytest

from vllm_bootstrap.engines.base import Gpu
from vllm_bootstrap.gpus.readings import GpuReading, Snapshot, restricted

READINGS = tuple(GpuReading(Gpu(f"GPU-{name}", index, "H200", 1)) for index, name in ((2, "Cc"), (0, "Aa"), (1, "Bb")))
SNAPSHOT = Snapshot("cuda", READINGS)


def uuids(snapshot: Snapshot) -> list[str]:
    return [reading.gpu.uuid for reading in snapshot.gpus]


@pytest.mark.parametrize(
    ("allowed", "seen"),
    [
        ((), ["GPU-Aa", "GPU-Bb", "GPU-Cc"]),
        (("1",), ["GPU-Bb"]),
        (("gpu-cc", "0"), ["GPU-Aa", "GPU-Cc"]),
        (("GPU-Cc", "2"), ["GPU-Cc"]),
        (("2", "7"), ["GPU-Cc"]),
    ],
)
def test_allowed_names_indices_and_uuids(allowed: tuple[str, ...], seen: list[str]) -> None:
    snapshot = restricted(SNAPSHOT, allowed)
    assert uuids(snapshot) == seen
    assert snapshot.unknown is None


def test_a_host_without_any_of_the_allowed_gpus_says_what_it_has() -> None:
    snapshot = restricted(SNAPSHOT, ("7", "GPU-x"))
    assert snapshot.gpus == ()
    assert snapshot.unknown == (
        "VLLM_BOOTSTRAP_GPUS allows 7, GPU-x, but this host has: 0 (GPU-Aa), 1 (GPU-Bb), 2 (GPU-Cc)"
    )
    assert restricted(Snapshot("cuda"), ("7",)).unknown == "VLLM_BOOTSTRAP_GPUS allows 7, but this host has: none"


def test_a_driver_that_names_no_gpu_is_not_believed() -> None:
    assert restricted(Snapshot("cuda"), ()).unknown == "the driver answers, but names no GPU"


def test_a_known_trouble_is_kept() -> None:
    assert restricted(Snapshot("cuda", unknown="broken"), ("7",)).unknown == "broken"


def test_everything_else_is_kept() -> None:
    snapshot = restricted(Snapshot("cpu", READINGS[:1], pids_trusted=False, cpu_slots=3), ())
    assert (snapshot.kind, snapshot.pids_trusted, snapshot.cpu_slots) == ("cpu", False, 3)


def test_readings_are_found_by_uuid() -> None:
    assert SNAPSHOT.reading("GPU-Bb") is READINGS[2]
    assert SNAPSHOT.reading("GPU-x") is None
