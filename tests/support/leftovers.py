"""Finds what a test run left behind, from the kernel's view only: processes that still refer to its temp folder.

Invariant: it trusts no list of the product. Everything a test run starts lives under one temp folder of its own, so a
process whose command line, environment, working directory or open files name that folder belongs to the run. Other
runs on the same machine are not seen.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Leftover:
    pid: int
    command: str
    because: str


def processes_referring_to(folder: Path) -> list[Leftover]:
    """Living processes, other than this one and its ancestors, that name ``folder``. Empty where there is no /proc."""
    needle = os.fsencode(folder)
    spared = _self_and_ancestors()
    found = []
    for entry in PROC.glob("[0-9]*"):
        pid = int(entry.name)
        if pid not in spared:
            with contextlib.suppress(OSError):
                because = _reference(entry, needle)
                if because and not _is_dead(entry):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
                    found.append(Leftover(pid, command, because))
    return found


def wait_until_none(folder: Path, timeout_s: float) -> list[Leftover]:
    """What still refers to ``folder`` once nothing does or the time is over."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        found = processes_referring_to(folder)
        if not found or time.monotonic() > deadline:
            return found
        pause.wait(0.1)


def kill(found: list[Leftover]) -> None:
    for leftover in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(leftover.pid, signal.SIGKILL)


def _self_and_ancestors() -> set[int]:
    spared, pid = set(), os.getpid()
    while pid > 0 and pid not in spared:
        spared.add(pid)
        try:
            pid = int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return spared


def _is_dead(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}


def _reference(entry: Path, needle: bytes) -> str | None:
    for name in ("cmdline", "environ"):
        if needle in (entry / name).read_bytes():
            return name
    if os.fsencode((entry / "cwd").readlink()).startswith(needle):
        return "cwd"
    for descriptor in (entry / "fd").iterdir():
        with contextlib.suppress(OSError):
            if os.fsencode(descriptor.readlink()).startswith(needle):
                return "open file"
    return None
