"""Where our own cgroup v2 lies, from what the kernel writes on different machines."""

import pytest

from vllm_bootstrap.launches.shim.cgroup import own_directory

UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = (
    "31 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs ro\n"
    "32 31 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n"
)
BOUND = "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n"


@pytest.mark.parametrize(
    ("own", "mounts", "expected"),
    [
        ("0::/user.slice/a.service\n", UNIFIED, "/sys/fs/cgroup/user.slice/a.service"),
        ("0::/\n", UNIFIED, "/sys/fs/cgroup"),
        ("9:memory:/x\n0::/x\n", HYBRID, "/sys/fs/cgroup/unified/x"),
        ("0::/docker/abc\n", BOUND, "/sys/fs/cgroup"),
        ("0::/docker/abc/sub\n", BOUND, "/sys/fs/cgroup/sub"),
        ("0::/docker/abcdef\n", BOUND, None),  # another container's name begins alike
        ("0::/../other\n", BOUND, None),
        ("9:memory:/x\n", UNIFIED, None),  # version 1 only
        ("0::/x\n", "31 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs ro\n", None),
        ("", "", None),
    ],
)
def test_own_directory(own, mounts, expected):
    assert own_directory(own, mounts) == expected
