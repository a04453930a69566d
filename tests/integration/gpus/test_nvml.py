from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.aio import run
from tests.support.fake_nvml import (
    DRIVER_NOT_LOADED,
    GIB,
    GPU_IS_LOST,
    NOT_SUPPORTED,
    UNKNOWN,
    FakeGpu,
    FakeNvml,
)
from vllm_bootstrap.errors import GpuUnknown
from vllm_bootstrap.gpus.inventory import make_inventory
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.nvml import NvmlInventory
from vllm_bootstrap.gpus.placement import PlacementWish, place
from vllm_bootstrap.gpus.readings import GpuProcess, GpuReading, Snapshot
from vllm_bootstrap.gpus.timed import HUNG_MAX

ALL_CALLS = [
    "nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetName",
    "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetMigMode",
    "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTemperature",
    "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses",
]  # fmt: skip
FOR_ALL = {"nvmlInit", "nvmlDeviceGetCount"}
OPTIONAL = ALL_CALLS[6:]
NAMES = {4711: ("bob", "VLLM::EngineCore"), 900: ("gdm", "Xorg")}


@pytest.fixture
def nvml() -> FakeNvml:
    return FakeNvml(FakeGpu("GPU-a"), FakeGpu("GPU-b"))


def describe(pid: int) -> tuple[str | None, str | None]:
    return NAMES.get(pid, (None, None))


@contextlib.contextmanager
def made(
    nvml: FakeNvml | Callable[[], Any], *, timeout_s: float = 10, trusted: bool = True, allowed: tuple[str, ...] = ()
) -> Iterator[NvmlInventory]:
    load = (lambda: nvml) if isinstance(nvml, FakeNvml) else nvml
    inventory = NvmlInventory(load, allowed=allowed, timeout_s=timeout_s, pids_trusted=trusted, describe=describe)
    try:
        yield inventory
    finally:
        inventory.close()


def look(inventory: NvmlInventory) -> Snapshot:
    return run(inventory.snapshot(0))


def free_to_place(snapshot: Snapshot) -> bool:
    try:
        place(PlacementWish(), snapshot, Ledger(), {}, busy_bytes=GIB)
    except GpuUnknown:
        return False
    return True


def by_uuid(snapshot: Snapshot) -> dict[str, GpuReading]:
    return {reading.gpu.uuid: reading for reading in snapshot.gpus}


# What is read


def test_everything_is_read_in_a_thread_of_its_own(nvml: FakeNvml) -> None:
    nvml.gpus[0].used = GIB
    with made(nvml) as inventory:
        snapshot = look(inventory)
        look(inventory)
    assert (snapshot.kind, snapshot.unknown, snapshot.pids_trusted) == ("cuda", None, True)
    first = snapshot.gpus[0]
    assert (first.gpu.uuid, first.gpu.index, first.gpu.name) == ("GPU-a", 0, "NVIDIA H200")
    assert (first.gpu.total_bytes, first.gpu.capability) == (80 * GIB, (9, 0))
    assert (first.used_bytes, first.utilization, first.temperature_c, first.power_w) == (GIB, 0.37, 41, 123.4)
    assert [r.unknown for r in snapshot.gpus] == [None, None]
    assert nvml.threads == {"nvml"}
    assert nvml.calls["nvmlInit"] == 1
    assert free_to_place(snapshot)


def test_an_old_driver_counts_what_it_reserves_as_used(nvml: FakeNvml) -> None:
    nvml.has_v2 = False
    with made(nvml) as inventory:
        assert [r.used_bytes for r in look(inventory).gpus] == [GIB // 2] * 2


def test_processes_are_named_and_drawing_is_told_from_computing(nvml: FakeNvml) -> None:
    nvml.gpus[0].computing = [(4711, 9 * GIB), (5, None)]
    nvml.gpus[0].drawing = [(900, GIB), (4711, 9 * GIB)]
    with made(nvml) as inventory:
        assert look(inventory).gpus[0].processes == (
            GpuProcess(4711, "bob", "VLLM::EngineCore", 9 * GIB),
            GpuProcess(5, None, None, None),
            GpuProcess(900, "gdm", "Xorg", GIB, graphics=True),
        )


def test_in_a_pid_namespace_nobody_is_named(nvml: FakeNvml) -> None:
    nvml.gpus[0].computing = [(4711, 9 * GIB)]
    with made(nvml, trusted=False) as inventory:
        snapshot = look(inventory)
    assert not snapshot.pids_trusted
    assert snapshot.gpus[0].processes == (GpuProcess(None, used_bytes=9 * GIB),)


def test_only_allowed_gpus_are_seen(nvml: FakeNvml) -> None:
    with made(nvml, allowed=("GPU-b",)) as inventory:
        assert list(by_uuid(look(inventory))) == ["GPU-b"]
    with made(nvml, allowed=("5",)) as inventory:
        assert "VLLM_BOOTSTRAP_GPUS allows 5" in str(look(inventory).unknown)


def test_permuted_indices_follow_the_uuids(nvml: FakeNvml) -> None:
    nvml.gpus[0].used = 3 * GIB
    with made(nvml) as inventory:
        look(inventory)
        nvml.gpus.reverse()
        after = by_uuid(look(inventory))
    assert (after["GPU-a"].gpu.index, after["GPU-a"].used_bytes) == (1, 3 * GIB)
    assert (after["GPU-b"].gpu.index, after["GPU-b"].used_bytes) == (0, 0)


def test_mig_is_said_to_be_unsupported(nvml: FakeNvml) -> None:
    nvml.gpus[0].mig, nvml.gpus[1].mig = 1, 0
    with made(nvml) as inventory:
        first, second = look(inventory).gpus
        look(inventory)
    assert "MIG devices are not supported" in str(first.unknown)
    assert "VLLM_BOOTSTRAP_GPUS" in str(first.unknown)
    assert second.unknown is None
    assert nvml.calls["nvmlInit"] == 1  # nothing is broken, nothing is begun anew


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_a_gpu_does_not_have_is_no_failure(nvml: FakeNvml, name: str) -> None:
    nvml.fail[name] = NOT_SUPPORTED
    with made(nvml) as inventory:
        assert [r.unknown for r in look(inventory).gpus] == [None, None]


# Failures


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.parametrize("name", ALL_CALLS)
def test_a_call_that_fails_makes_nothing_free_and_recovers(nvml: FakeNvml, name: str, seen_before: bool) -> None:
    with made(nvml) as inventory:
        if seen_before:
            look(inventory)
        nvml.fail[name] = UNKNOWN
        if name == "nvmlInit" and seen_before:
            nvml.fail["nvmlDeviceGetCount"] = DRIVER_NOT_LOADED  # what makes it necessary to begin anew
            look(inventory)
            del nvml.fail["nvmlDeviceGetCount"]
        for _ in range(3):
            snapshot = look(inventory)
            assert not free_to_place(snapshot)
            if name in FOR_ALL:
                assert str(snapshot.unknown).startswith(name)
            else:
                assert snapshot.unknown is None
            assert all(str(r.unknown).startswith(name) for r in snapshot.gpus)
            if seen_before:
                assert list(by_uuid(snapshot)) == ["GPU-a", "GPU-b"]
        nvml.fail.clear()
        after = look(inventory)
        assert [r.unknown for r in after.gpus] == [None, None]
        assert free_to_place(after)
        assert nvml.initialised == 1


@pytest.mark.parametrize("name", ALL_CALLS[2:])
def test_one_gpu_that_fails_leaves_the_other_usable(nvml: FakeNvml, name: str) -> None:
    nvml.fail[name] = lambda uuid: GPU_IS_LOST if uuid == "GPU-a" else None
    with made(nvml) as inventory:
        first, second = look(inventory).gpus
        assert first.unknown == f"{name}: GPU is lost"
        assert (second.gpu.uuid, second.unknown) == ("GPU-b", None)


def test_a_lost_gpu_keeps_its_name_once_it_was_known(nvml: FakeNvml) -> None:
    with made(nvml) as inventory:
        look(inventory)
        nvml.fail["nvmlDeviceGetHandleByIndex"] = lambda uuid: GPU_IS_LOST if uuid == "GPU-a" else None
        lost = look(inventory).gpus[0]
    assert (lost.gpu.uuid, lost.gpu.name) == ("GPU-a", "NVIDIA H200")
    assert lost.unknown == "nvmlDeviceGetHandleByIndex: GPU is lost"


def test_a_lost_gpu_that_was_never_known_is_shown_by_its_index(nvml: FakeNvml) -> None:
    nvml.fail["nvmlDeviceGetHandleByIndex"] = lambda uuid: GPU_IS_LOST if uuid == "GPU-a" else None
    with made(nvml) as inventory:
        assert list(by_uuid(look(inventory))) == ["unknown-0", "GPU-b"]


def test_a_gpu_that_is_listed_no_more_is_unknown_and_not_forgotten(nvml: FakeNvml) -> None:
    with made(nvml) as inventory:
        look(inventory)
        gone = nvml.gpus.pop(0)
        after = by_uuid(look(inventory))
        assert "not listed any more" in str(after["GPU-a"].unknown)
        assert after["GPU-b"].unknown is None
        nvml.gpus.append(gone)
        assert by_uuid(look(inventory))["GPU-a"].unknown is None


def test_a_broken_python_package_is_a_failure_too() -> None:
    def load() -> Any:
        raise ImportError("no module named pynvml")

    with made(load) as inventory:
        assert "no module named pynvml" in str(look(inventory).unknown)


def test_what_nobody_expected_is_a_failure_too(nvml: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    nvml.nvmlDeviceGetCount = lambda: "two"  # type: ignore[assignment,method-assign,return-value]
    with made(nvml) as inventory:
        assert "TypeError" in str(look(inventory).unknown)
    assert "unexpected" in caplog.text


def test_a_shutdown_that_fails_does_no_harm(nvml: FakeNvml) -> None:
    nvml.fail["nvmlShutdown"] = UNKNOWN
    nvml.fail["nvmlDeviceGetCount"] = UNKNOWN
    with made(nvml) as inventory:
        look(inventory)
        nvml.fail.clear()
        assert look(inventory).unknown is None


def test_changes_are_logged_once(nvml: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with made(nvml) as inventory:
        look(inventory)
        assert caplog.messages == []
        nvml.fail["nvmlDeviceGetMemoryInfo"] = lambda uuid: GPU_IS_LOST if uuid == "GPU-b" else None
        look(inventory)
        look(inventory)
        assert caplog.messages == ["GPU 1 (GPU-b) cannot be judged: nvmlDeviceGetMemoryInfo: GPU is lost"]
        nvml.fail.clear()
        look(inventory)
        assert caplog.messages[1:] == ["GPU 1 (GPU-b) can be judged again"]
        nvml.fail["nvmlDeviceGetCount"] = DRIVER_NOT_LOADED
        look(inventory)
        assert caplog.messages[2:] == ["the GPUs cannot be judged: nvmlDeviceGetCount: Driver Not Loaded"]


def test_the_real_library_gives_gpus_or_says_what_is_missing() -> None:
    inventory = make_inventory(0, "cuda")
    snapshot = run(inventory.snapshot(0))
    inventory.close()
    assert snapshot.kind == "cuda"
    if snapshot.unknown is None:
        assert all(reading.gpu.uuid for reading in snapshot.gpus)
    else:
        assert "NVML Shared Library Not Found" in snapshot.unknown or "nvml" in snapshot.unknown


# Hanging


@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetCount", *ALL_CALLS[5:6], *ALL_CALLS[-2:]])
def test_a_call_that_hangs_is_given_up_and_replaced(nvml: FakeNvml, name: str) -> None:
    nvml.hang[name] = released = threading.Event()
    with made(nvml, timeout_s=0.3) as inventory:
        begun = time.monotonic()
        snapshot = look(inventory)
        assert time.monotonic() - begun < 5
        assert snapshot.unknown == f"{name} did not come back within 0.3 s"
        assert not free_to_place(snapshot)
        del nvml.hang[name]
        assert look(inventory).unknown is None  # in a new thread, while the old one still hangs
        released.set()


def test_not_more_than_a_few_threads_ever_hang(nvml: FakeNvml) -> None:
    nvml.hang["nvmlDeviceGetCount"] = released = threading.Event()
    with made(nvml, timeout_s=0.02) as inventory:
        for _ in range(HUNG_MAX):
            assert "did not come back" in str(look(inventory).unknown)
        before = threading.active_count()
        for _ in range(5):
            assert "nvmlDeviceGetCount is hanging" in str(look(inventory).unknown)
        assert threading.active_count() == before
        del nvml.hang["nvmlDeviceGetCount"]
        released.set()
        assert _eventually_known(inventory)


def _eventually_known(inventory: NvmlInventory) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if look(inventory).unknown is None:
            return True
    return False


def test_each_call_has_its_own_limit(nvml: FakeNvml) -> None:
    """Many slow calls in a row are no hanging call."""
    pace = threading.Event()  # never set
    for name in ALL_CALLS:
        nvml.hang[name] = _SlowEvent(pace)
    with made(nvml, timeout_s=0.5) as inventory:
        begun = time.monotonic()
        assert look(inventory).unknown is None
        assert time.monotonic() - begun > 0.5


class _SlowEvent(threading.Event):
    def __init__(self, pace: threading.Event) -> None:
        super().__init__()
        self._pace = pace

    def wait(self, timeout: float | None = None) -> bool:
        return self._pace.wait(0.03)


# Age


def test_a_recent_reading_is_shared_and_an_old_one_is_not(nvml: FakeNvml) -> None:
    async def main() -> None:
        with made(nvml) as inventory:
            first = await inventory.snapshot()
            assert await inventory.snapshot(max_age_s=60) is first
            assert nvml.calls["nvmlDeviceGetCount"] == 1
            assert await inventory.snapshot(max_age_s=0) is not first

    run(main())


def test_many_who_ask_at_once_cause_few_readings(nvml: FakeNvml) -> None:
    async def main() -> None:
        with made(nvml) as inventory:
            await asyncio.gather(*(inventory.snapshot(max_age_s=0) for _ in range(50)))
            assert nvml.calls["nvmlDeviceGetCount"] <= 2

    run(main())


def test_a_caller_who_goes_away_harms_nobody(nvml: FakeNvml) -> None:
    async def main() -> None:
        nvml.hang["nvmlDeviceGetCount"] = released = threading.Event()
        with made(nvml) as inventory:
            asking = asyncio.create_task(inventory.snapshot(0))
            while not nvml.calls["nvmlDeviceGetCount"]:
                await asyncio.sleep(0.001)
            asking.cancel()
            await asyncio.wait({asking})
            del nvml.hang["nvmlDeviceGetCount"]
            released.set()
            assert (await inventory.snapshot(0)).unknown is None

    run(main())


def test_close_is_idempotent_and_ends_the_thread(nvml: FakeNvml) -> None:
    with made(nvml) as inventory:
        look(inventory)
        inventory.close()
        assert "nvml" not in {thread.name for thread in threading.enumerate()}
        inventory.close()
