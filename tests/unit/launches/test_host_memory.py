from __future__ import annotations

from pathlib import Path

from vllm_bootstrap.launches.host_memory import available_bytes

KIB, MIB = 1024, 1024**2


def host(root: Path, **files: str) -> Path:
    """A root with these files; ``__`` stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_max", ".max").replace("_now", ".current").replace(
            "_st", ".stat"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_kernels_estimate_counts(tmp_path: Path) -> None:
    assert available_bytes(host(tmp_path, proc__meminfo="MemTotal: 9 kB\nMemAvailable:    512 kB\n")) == 512 * KIB


def test_where_the_kernel_says_nothing_nothing_is_known(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    assert available_bytes(host(tmp_path, proc__meminfo="MemTotal: 9 kB\n")) is None


def test_a_container_has_what_its_group_leaves_it(tmp_path: Path) -> None:
    group = {
        "sys__fs__cgroup__memory_max": str(10 * MIB), "sys__fs__cgroup__memory_now": str(9 * MIB),
        "sys__fs__cgroup__memory_st": f"anon 5\nfile {3 * MIB}\n",
    }  # fmt: skip
    assert available_bytes(host(tmp_path, proc__meminfo="MemAvailable: 99999 kB\n", **group)) == 4 * MIB
    assert available_bytes(host(tmp_path, proc__meminfo="MemAvailable: 1 kB\n")) == KIB
    assert (
        available_bytes(host(tmp_path, sys__fs__cgroup__memory_max="max", proc__meminfo="MemAvailable: 8 kB"))
        == 8 * KIB
    )


def test_this_host_has_some() -> None:
    assert (available_bytes() or 0) > MIB
