"""How much of the machine a measurement had, so that a table can say it: what others took, and how fast its cores were.

What others took is by the kernel's counts only; what starts and ends in between and is nobody's child here counts as
foreign. It does not show who else uses the machine below a virtual one: for that a fixed piece of work is timed.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from bench.common import cpu_s
from bench.cosched.engines import descendants

# Iterations: some 50 ms.
WORK = 3_000_000


def fixed_work_ms() -> float:
    """CPU milliseconds that a fixed piece of work takes, the mean of all cores. Blocks for as long on each."""
    cores = os.sched_getaffinity(0)
    try:
        return sum(_work_ms(core) for core in cores) / len(cores)
    finally:
        os.sched_setaffinity(0, cores)


def _work_ms(core: int) -> float:
    os.sched_setaffinity(0, {core})
    start = time.thread_time()
    for _ in range(WORK):
        pass
    return (time.thread_time() - start) * 1000


class Foreign:
    """``share``: the part of the machine that others took while this was entered. Not others: this process, ``roots``,
    and all below them. ``shared_core``: the part of the time in which core 0 was busy with anything, on which the
    engine's API server, the daemon and the load run (``engines``)."""

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = roots
        self.share = self.shared_core = 0.0

    def __enter__(self) -> Self:
        self._before, self._core_before = self._look(), _counts("cpu0")
        return self

    def __exit__(self, *_: object) -> None:
        every, busy, own = (now - before for now, before in zip(self._look(), self._before, strict=True))
        self.share = max(0.0, busy - own) / every
        every, busy = (now - before for now, before in zip(_counts("cpu0"), self._core_before, strict=True))
        self.shared_core = busy / every

    def _look(self) -> tuple[float, float, float]:
        """CPU seconds that there were, that anybody used, and that this process and those below it did."""
        every, busy = _counts("cpu")
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        roots = [os.getpid(), *self._roots]
        own = sum(cpu_s(one) for one in {*roots, *(below for root in roots for below in descendants(root))})
        return every, busy, own + ended.ru_utime + ended.ru_stime


def _counts(row: str) -> tuple[float, float]:
    """CPU seconds that there were so far, and that anybody used: of all cores (``cpu``) or one (``cpu0``)."""
    line = next(one for one in Path("/proc/stat").read_text().split("\n") if one.startswith(f"{row} "))
    user, nice, system, idle, wait, *rest = (int(one) / os.sysconf("SC_CLK_TCK") for one in line.split()[1:])
    busy = user + nice + system + sum(rest)
    return busy + idle + wait, busy
