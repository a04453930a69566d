"""The few system calls that Python has no name for. Standard library only."""

from __future__ import annotations

import ctypes
import os

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
CGROUP2_MAGIC = 0x63677270

# Loaded at import: after a fork, or with the library replaced on disk, it is too late to look anything up.
_libc = ctypes.CDLL(None, use_errno=True)
_prctl, _statfs = _libc.prctl, _libc.statfs


def prctl(option: int, value: int | bytes) -> None:
    """Set one attribute of this process. Raises ``OSError``."""
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if _prctl(ctypes.c_int(option), argument, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def filesystem_magic(path: str) -> int | None:
    """The kernel's number for the kind of file system, None when it cannot be told."""
    buffer = (ctypes.c_long * 64)()  # struct statfs begins with f_type, a long on every 64-bit Linux
    if _statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        return None
    return int(buffer[0])
