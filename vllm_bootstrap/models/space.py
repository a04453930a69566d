"""Room on disks: how much there is, and which errors mean that there is none. Asks the kernel's counters only."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def free_bytes(folder: Path) -> int:
    """Bytes that may be written to the disk that ``folder`` is, or will be, on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def is_lack_of_room(exc: OSError) -> bool:
    return exc.errno in _FULL
