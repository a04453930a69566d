from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.gpus import GIB, box, process, reading
from vllm_bootstrap.gpus.condition import Condition, GpuState, assess, describe
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.readings import GpuProcess, GpuReading, Snapshot

ENGINE = process(4711, 23.1, user="bob", name="VLLM::EngineCore")
DESKTOP = process(900, 3, graphics=True, user="gdm", name="Xorg")


def judge(
    seen: GpuReading,
    *,
    claims: dict[str, int] | None = None,
    unsettled: dict[str, str] | None = None,
    own_pids: frozenset[int] | None = None,
    snapshot: Snapshot | None = None,
) -> Condition:
    ledger = Ledger()
    for owner, milli in (claims or {}).items():
        ledger.claim(owner, [seen.gpu.uuid], milli, milli < 1000)
    snapshot = snapshot or box(seen)
    return assess(seen, snapshot, ledger, unsettled or {}, busy_bytes=GIB, own_pids=own_pids)


def test_an_idle_gpu_is_free() -> None:
    assert judge(reading(0)) == Condition(GpuState.FREE, None)


def test_little_use_by_others_leaves_it_free() -> None:
    condition = judge(reading(0, 1, process(7, 1)))
    assert condition.state is GpuState.FREE
    assert condition.others_bytes == GIB


def test_others_make_it_busy_and_are_named() -> None:
    condition = judge(reading(1, 23.2, ENGINE))
    assert condition.state is GpuState.BUSY
    assert condition.reason == "has 23.2 GiB held by pid 4711 VLLM::EngineCore of bob with 23654 MiB (not ours)"
    assert condition.others == (ENGINE,)


def test_what_only_draws_is_ignored() -> None:
    assert judge(reading(0, 3.5, DESKTOP)).state is GpuState.FREE
    condition = judge(reading(0, 26.2, DESKTOP, ENGINE))
    assert condition.state is GpuState.BUSY
    assert condition.others == (ENGINE,)


def test_a_drawing_process_of_unknown_size_excuses_nothing() -> None:
    assert judge(reading(0, 3, process(900, None, graphics=True))).state is GpuState.BUSY


def test_use_by_nobody_visible_is_busy_all_the_same() -> None:
    assert judge(reading(0, 5)).reason == "has 5.0 GiB held by processes that cannot be seen from here"


def test_inside_a_pid_namespace_nobody_is_named() -> None:
    seen = reading(0, 23.2, ENGINE)
    condition = judge(seen, snapshot=box(seen, pids_trusted=False))
    assert condition.others == ()
    assert condition.reason == (
        "has 23.2 GiB held by others; who they are cannot be seen from inside this pid namespace (memory in use)"
    )


def test_a_claimed_gpu_names_its_owner() -> None:
    condition = judge(reading(0, 70), claims={"l1": 1000})
    assert condition == Condition(GpuState.CLAIMED, "is owned by launch l1", ("l1",))


def test_beside_our_own_claims_others_are_what_is_left_of_the_memory() -> None:
    claims = {"l1": 250, "l2": 250}
    assert not judge(reading(0, 40.5, ENGINE), claims=claims).is_busy
    condition = judge(reading(0, 45, ENGINE), claims=claims)
    assert (condition.state, condition.is_busy, condition.others) == (GpuState.CLAIMED, True, ())
    assert condition.reason == (
        "is owned by launch l1, l2 and has 5.0 GiB held by others (memory in use minus our own claims)"
    )


def test_beside_our_own_claims_in_a_pid_namespace_it_says_how_it_was_judged() -> None:
    seen = reading(0, 45, ENGINE)
    condition = judge(seen, claims={"l1": 500}, own_pids=frozenset({1}), snapshot=box(seen, pids_trusted=False))
    assert str(condition.reason).endswith(
        "cannot be seen from inside this pid namespace (memory in use minus our own claims)"
    )


def test_beside_our_own_processes_others_are_told_apart() -> None:
    ours = process(1, 30)
    claims = {"l1": 500}
    condition = judge(reading(0, 54, ours, ENGINE), claims=claims, own_pids=frozenset({1}))
    assert condition.others == (ENGINE,)
    assert condition.is_busy
    # A launch that takes more than its share is still ours.
    assert not judge(reading(0, 54, process(1, 54)), claims=claims, own_pids=frozenset({1})).is_busy


def test_where_no_process_is_seen_the_memory_counts() -> None:
    assert judge(reading(0, 54), claims={"l1": 500}, own_pids=frozenset({1})).is_busy


def test_a_process_of_unknown_size_leads_back_to_the_memory() -> None:
    seen = reading(0, 39, process(1, 30), process(2, None))
    condition = judge(seen, claims={"l1": 500}, own_pids=frozenset({1}))
    assert condition.others == ()
    assert not condition.is_busy


@pytest.mark.parametrize("claims", [{}, {"l1": 1000}])
def test_unknown_comes_first(claims: dict[str, int]) -> None:
    seen = reading(0, None, unknown="nvmlDeviceGetMemoryInfo: GPU is lost")
    condition = judge(seen, claims=claims, unsettled={"GPU-0": "memory left"})
    assert condition.state is GpuState.UNKNOWN
    assert condition.reason == "cannot be judged: nvmlDeviceGetMemoryInfo: GPU is lost"
    assert condition.owners == tuple(claims)


def test_when_all_are_unknown_each_is() -> None:
    seen = reading(0, 0)
    assert judge(seen, snapshot=box(seen, unknown="nvmlInit: Driver Not Loaded")).state is GpuState.UNKNOWN


def test_unsettled_gives_its_reason() -> None:
    condition = judge(reading(0, 9, ENGINE), unsettled={"GPU-0": "memory of launch l9 is not back"})
    assert condition.state is GpuState.UNSETTLED
    assert condition.reason == "is unsettled: memory of launch l9 is not back"


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        (GpuProcess(None), "an unnamed process"),
        (GpuProcess(5), "pid 5"),
        (GpuProcess(5, "bob"), "pid 5 of bob"),
        (GpuProcess(5, None, "python", 3 * 1024**2), "pid 5 python with 3 MiB"),
    ],
)
def test_processes_are_described_as_far_as_visible(seen: GpuProcess, text: str) -> None:
    assert describe(seen) == text


def sleeper(seen: GpuReading, residue_gib: float, **how: object) -> Condition:
    """The GPU of a launch of ours that sleeps there with so much memory."""
    ledger = Ledger()
    ledger.claim("l-sleeper", [seen.gpu.uuid])
    ledger.park("l-sleeper", {seen.gpu.uuid: int(residue_gib * GIB)})
    pids = how.pop("own_pids", None)
    return assess(seen, box(seen, **how), ledger, {}, busy_bytes=GIB, own_pids=pids)  # type: ignore[arg-type]


def test_a_launch_that_sleeps_leaves_its_gpu_free() -> None:
    assert sleeper(reading(0, 1.5), 1.5).state is GpuState.FREE
    assert sleeper(reading(0, 1.5, process(4711, 1.5)), 0, own_pids=frozenset({4711})).state is GpuState.FREE
    assert sleeper(reading(0, 1.5, process(4711, 1.5)), 1.5, pids_trusted=False).state is GpuState.FREE


def test_others_beside_a_sleeper_make_its_gpu_busy() -> None:
    busy = sleeper(reading(0, 24.6, process(4711, 1.5), ENGINE), 1.5, own_pids=frozenset({1}))
    assert busy.state is GpuState.BUSY
    seen = reading(0, 24.6, replace(ENGINE, pid=9), process(4711, 1.5))
    named = sleeper(seen, 1.5, own_pids=frozenset({4711}))
    assert [each.pid for each in named.others] == [9]
    hidden = sleeper(reading(0, 24.6), 1.5, pids_trusted=False)
    assert hidden.is_busy
    assert hidden.reason is not None
    assert "23.1 GiB held by others" in hidden.reason
