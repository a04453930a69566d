"""A program of its own: reads files so that they are in the page cache when an engine loads them.

``python -m vllm_bootstrap.models.warming`` reads a ``Task`` as JSON from standard input and tells the bytes that it has
been over in JSON lines. It has the lowest priority for processor and disk, may be killed at any moment, and dies with
the daemon. The kernel is asked for one window ahead of what is being read, so that the disk always has something to do
and memory is never promised for more than that.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_bootstrap.launches.shim import syscalls
from vllm_bootstrap.models.residency import cached_bytes

NICENESS = 15
WINDOW_BYTES = 32 * 1024**2
TELL_EVERY_S = 0.5
_READ_BYTES = 1024**2
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_IDLE = 3 << 13

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Task:
    """``vmtouch``: the program of that name, used instead of reading when it is there. ``parent``: the process to die
    with."""

    files: list[str]
    vmtouch: str | None = None
    parent: int | None = None


def warm(task: Task, tell: Tell) -> None:
    """Raises ``OSError`` for a file that cannot be read."""
    if task.vmtouch is not None:
        _touch(task, task.vmtouch, tell)
        return
    done, told_at, buffer = 0, time.monotonic(), bytearray(_READ_BYTES)
    for name in task.files:
        with Path(name).open("rb", buffering=0) as file:
            done_before, size = done, os.fstat(file.fileno()).st_size
            asked = 0
            while (position := done - done_before) < size:
                if asked < size and asked <= position + WINDOW_BYTES:
                    os.posix_fadvise(file.fileno(), asked, WINDOW_BYTES, os.POSIX_FADV_WILLNEED)
                    asked += WINDOW_BYTES
                read = file.readinto(buffer)
                if not read:
                    break  # it became shorter
                done += read
                if (now := time.monotonic()) - told_at >= TELL_EVERY_S:
                    told_at = now
                    tell({"bytes": done})
    tell({"bytes": done, "done": True})


def _touch(task: Task, program: str, tell: Tell) -> None:
    """Let vmtouch do it and look at the page cache meanwhile."""
    parent = os.getpid()
    with subprocess.Popen(
        [program, "-t", "-q", *task.files],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509 - this program has one thread
    ) as running:
        while True:
            with suppress(subprocess.TimeoutExpired):
                status = running.wait(TELL_EVERY_S)
                break
            tell({"bytes": sum(cached_bytes(Path(name)) or 0 for name in task.files)})
    if status != 0:
        raise OSError(f"{program} ended with status {status}")
    tell({"bytes": sum(Path(name).stat().st_size for name in task.files), "done": True})


def _die_with(parent: int) -> None:
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _be_modest() -> None:
    os.nice(NICENESS)
    if (number := _IOPRIO_SET.get(platform.machine())) is not None:  # where it is not, the niceness counts
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_IDLE)


def _print(said: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def main() -> int:
    task = Task(**json.load(sys.stdin))
    if task.parent is not None:
        _die_with(task.parent)
    _be_modest()
    try:
        warm(task, _print)
    except OSError as exc:
        _print({"failure": str(exc)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
