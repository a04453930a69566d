"""How much of files lies in the page cache, and how much memory there is for more. Blocking, reads only.

The kernel tells of a file's pages only to who may write the file or owns it; for others the answer is None, never a
guess.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

WINDOW_BYTES = 1024**3
"""Looked at in one go: a quarter of a megabyte of answer."""

_PROT_READ, _MAP_SHARED = 1, 1
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def cached_bytes(path: Path) -> int | None:
    """Bytes of a file that are in the page cache; None where that cannot be told. A page counts whole."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid() and os.geteuid() != 0 and not os.access(path, os.W_OK):
            return None
        return _resident(fd, found.st_size)
    finally:
        os.close(fd)


def _resident(fd: int, size: int) -> int | None:
    total = 0
    for start in range(0, size, WINDOW_BYTES):
        length = min(WINDOW_BYTES, size - start)
        pages = _pages(fd, start, length)
        if pages is None:
            return None
        total += pages * mmap.PAGESIZE
    return min(total, size)


def _pages(fd: int, start: int, length: int) -> int | None:
    address = _libc.mmap(None, length, _PROT_READ, _MAP_SHARED, fd, start)
    if address in {None, _MAP_FAILED}:
        return None
    try:
        answer = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        if _libc.mincore(address, length, answer) != 0:
            return None
        return sum(answer.raw.translate(_LOWEST_BIT))
    finally:
        _libc.munmap(address, length)


_LOWEST_BIT = bytes(value & 1 for value in range(256))


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that the page cache may take without pushing programs out: what the kernel says is available, or less
    where a container's limit is nearer. None where it cannot be told."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    left = _left_in_container(cgroup)
    return available if left is None else min(available, left)


def _left_in_container(cgroup: Path) -> int | None:
    """What the limit leaves, when cached pages that nobody uses are given up first. None without a limit."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return None
