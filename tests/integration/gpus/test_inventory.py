from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.aio import run
from vllm_bootstrap.gpus.cpu import CpuInventory
from vllm_bootstrap.gpus.inventory import make_inventory, nvidia_traces
from vllm_bootstrap.gpus.mock import TOTAL_BYTES, MockInventory
from vllm_bootstrap.gpus.nvml import NvmlInventory
from vllm_bootstrap.gpus.processes import INITIAL_NAMESPACE, describe_process, pids_trusted
from vllm_bootstrap.gpus.readings import GpuProcess, Snapshot

GIB = 1024**3


# Which inventory


def test_a_host_without_a_trace_of_nvidia_has_one_cpu_device(tmp_path: Path) -> None:
    inventory = make_inventory(0, cpu_slots=3, root=tmp_path)
    snapshot = run(inventory.snapshot())
    inventory.close()
    assert (snapshot.kind, snapshot.unknown, snapshot.cpu_slots) == ("cpu", None, 3)
    (device,) = snapshot.gpus
    assert (device.gpu.uuid, device.gpu.index, device.used_bytes, device.unknown) == ("cpu", 0, None, None)
    assert device.gpu.total_bytes > GIB // 8
    assert device.gpu.name


@pytest.mark.parametrize("trace", ["dev/nvidia0", "dev/nvidiactl", "proc/driver/nvidia/version", "etc/ld.so.cache"])
def test_any_trace_of_nvidia_means_that_nvml_must_answer(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).parent.mkdir(parents=True)
    (tmp_path / trace).write_bytes(b"\0libnvidia-ml.so.1\0")
    assert len(nvidia_traces(tmp_path)) == 1
    inventory = make_inventory(0, root=tmp_path)
    assert isinstance(inventory, NvmlInventory)
    inventory.close()


def test_a_library_cache_without_nvml_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.cache").write_bytes(b"libc.so.6")
    assert nvidia_traces(tmp_path) == []


def test_devices_can_be_forced(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert isinstance(make_inventory(0, "cpu", root=tmp_path), CpuInventory)
    (tmp_path / "dev/nvidia0").unlink()
    assert isinstance(make_inventory(0, "cuda", root=tmp_path), NvmlInventory)
    assert isinstance(make_inventory(2, "mock:2"), MockInventory)
    with pytest.raises(ValueError, match="'tpu': it must be mock:N, cuda or cpu"):
        make_inventory(0, "tpu")


def test_the_cpu_can_be_left_out_by_mistake_and_says_so(tmp_path: Path) -> None:
    assert run(make_inventory(0, allowed=("cpu",), root=tmp_path).snapshot()).unknown is None
    snapshot = run(make_inventory(0, allowed=("1",), root=tmp_path).snapshot())
    assert "VLLM_BOOTSTRAP_GPUS allows 1" in str(snapshot.unknown)


def test_a_cpu_without_a_name_is_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Fast One\n")
    named, unnamed = (run(CpuInventory(cpuinfo=tmp_path / name).snapshot()) for name in ("cpuinfo", "absent"))
    assert (named.gpus[0].gpu.name, unnamed.gpus[0].gpu.name) == ("Fast One", "CPU")


def test_a_host_without_nvidia_does_not_load_its_library(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from vllm_bootstrap.gpus.inventory import make_inventory\n"
        f"make_inventory(0, root=Path({str(tmp_path)!r}))\n"
        "print([m for m in ('pynvml', 'vllm_bootstrap.gpus.nvml', 'ctypes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Mock


def mock(count: int = 2, **arguments: object) -> MockInventory:
    return MockInventory(count, **arguments)  # type: ignore[arg-type]


def look(inventory: MockInventory) -> Snapshot:
    return run(inventory.snapshot())


def test_mock_gpus_are_big_and_idle() -> None:
    snapshot = look(mock())
    assert [(r.gpu.uuid, r.gpu.index) for r in snapshot.gpus] == [("GPU-mock-0", 0), ("GPU-mock-1", 1)]
    assert {r.gpu.total_bytes for r in snapshot.gpus} == {TOTAL_BYTES} == {80 * GIB}
    assert {(r.used_bytes, r.processes, r.unknown) for r in snapshot.gpus} == {(0, (), None)}
    assert (snapshot.kind, snapshot.pids_trusted) == ("mock", True)


def test_mock_gpus_look_as_they_are_told() -> None:
    inventory = mock()
    inventory.set_used("GPU-mock-1", 8 * GIB)
    inventory.set_processes({"uuid": "GPU-mock-1", "pid": 7, "name": "x", "used_bytes": 8 * GIB})
    inventory.set_order("GPU-mock-1", "GPU-mock-0")
    first, second = look(inventory).gpus
    assert (first.gpu.uuid, first.gpu.index, first.used_bytes, first.utilization) == ("GPU-mock-1", 0, 8 * GIB, 0.1)
    assert first.processes == (GpuProcess(7, None, "x", 8 * GIB),)
    assert (second.gpu.uuid, second.gpu.index, second.processes) == ("GPU-mock-0", 1, ())
    inventory.close()


@pytest.mark.parametrize(
    ("fail", "unknown", "each"),
    [
        ("init", "mock init fails", ["mock init fails"] * 2),
        ("count", "mock count fails", ["mock count fails"] * 2),
        ("memory", None, ["mock memory fails"] * 2),
        ({"call": "memory", "uuids": ["GPU-mock-1"]}, None, [None, "mock memory fails"]),
    ],
)
def test_mock_calls_fail_and_recover(fail: object, unknown: str | None, each: list[str | None]) -> None:
    inventory = mock()
    inventory.set_fail(fail)  # type: ignore[arg-type]
    snapshot = look(inventory)
    assert snapshot.unknown == unknown
    assert [r.unknown for r in snapshot.gpus] == each
    inventory.set_fail(None)
    assert [r.unknown for r in look(inventory).gpus] == [None, None]


def test_a_file_tells_mock_gpus_how_to_look(tmp_path: Path) -> None:
    file = tmp_path / "mock.json"
    inventory = make_inventory(2, allowed=("GPU-mock-1",), mock_file=file)
    assert isinstance(inventory, MockInventory)
    assert look(inventory).gpus[0].used_bytes == 0
    process = {"uuid": "GPU-mock-1", "pid": 7, "user": "bob", "name": "x", "used_bytes": 5, "graphics": True}
    told = {"used": {"GPU-mock-1": 5}, "processes": [process], "order": ["GPU-mock-1", "GPU-mock-0", "GPU-x"]}
    file.write_text(json.dumps(told))
    (seen,) = look(inventory).gpus
    assert (seen.gpu.index, seen.used_bytes) == (0, 5)
    assert seen.processes == (GpuProcess(7, "bob", "x", 5, graphics=True),)
    file.write_text(json.dumps({**told, "pids_trusted": False}))
    snapshot = look(inventory)
    assert not snapshot.pids_trusted
    assert snapshot.gpus[0].processes == (GpuProcess(None, None, None, 5, graphics=True),)
    file.write_text(json.dumps({"fail": "init"}))
    assert look(inventory).unknown == "mock init fails"
    file.unlink()
    assert look(inventory).unknown is None


@pytest.mark.parametrize(
    "content",
    ["{", '{"colour": "red"}', "[1]", '{"processes": [{"uuid": "GPU-mock-0"}]}', '{"used": 5}', '{"fail": {}}'],
)
def test_a_broken_mock_file_frees_nothing(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mock.json"
    file.write_text(content)
    snapshot = look(mock(file=file))
    assert str(file) in str(snapshot.unknown)
    assert len(snapshot.gpus) == 2


# Processes


def test_process_ids_are_trusted_in_the_first_namespace_only(tmp_path: Path) -> None:
    (tmp_path / "self/ns").mkdir(parents=True)
    assert not pids_trusted(tmp_path)
    link = tmp_path / "self/ns/pid"
    link.symlink_to("pid:[4026532458]")
    assert not pids_trusted(tmp_path)
    link.unlink()
    link.symlink_to(INITIAL_NAMESPACE)
    assert pids_trusted(tmp_path)


@pytest.mark.parametrize(
    ("cmdline", "comm", "name"),
    [
        (b"VLLM::EngineCore\0\0\0", b"VLLM::EngineCor\n", "VLLM::EngineCore"),
        (b"/usr/bin/python3\0-m\0x\0--api-key\0secret\0", b"python3\n", "python3"),
        (b"/opt/app --token=secret serve\0", b"app\n", "app"),
        (b"python\0", b"python\n", "python"),
        (b"", b"kworker/0:1\n", "0:1"),
        (b"evil\x1b[31m\xff\0", b"evil\n", "evil?[31m\N{REPLACEMENT CHARACTER}"),
        (b"x" * 500 + b"\0", b"x\n", "x" * 64),
        (b"", b"", None),
    ],
)
def test_a_process_is_named_without_its_arguments(
    tmp_path: Path, cmdline: bytes, comm: bytes, name: str | None
) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cmdline").write_bytes(cmdline)
    (tmp_path / "7/comm").write_bytes(comm)
    assert describe_process(7, tmp_path)[1] == name


def test_the_user_is_named_where_known(tmp_path: Path) -> None:
    user, name = describe_process(os.getpid())
    assert user
    assert name
    if os.geteuid() == 0:
        (tmp_path / "7").mkdir()
        os.chown(tmp_path / "7", 54321, 54321)
        assert describe_process(7, tmp_path) == ("54321", None)


def test_a_process_that_is_gone_is_nobody(tmp_path: Path) -> None:
    assert describe_process(7, tmp_path) == (None, None)
