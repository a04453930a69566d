"""Tells when one process is gone, be it our child or not. asyncio.

Invariant: the process is named by pid and start time, so a later process with the same pid never counts as it. A zombie
is gone (and reaped, when it is ours).
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from vllm_bootstrap.launches.shim import procfs

POLL_S = 0.25


class ExitWatch:
    """``gone`` is set once the process has ended. Waits on a pidfd; where kernel or sandbox has none, looks four times
    a second. ``close`` gives the descriptor back; until then it is held."""

    def __init__(self, pid: int, start_ticks: int) -> None:
        self.gone = asyncio.Event()
        self._pid, self._start_ticks = pid, start_ticks
        self._pidfd: int | None = None
        self._polling: asyncio.Task[None] | None = None
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = procfs.open_pidfd(pid)
        # Looked at after the pidfd was opened: from here on both speak of the same process.
        if not procfs.is_alive(pid, start_ticks):
            self._ended()
        elif self._pidfd is not None:
            asyncio.get_running_loop().add_reader(self._pidfd, self._ended)
        else:
            self._polling = asyncio.create_task(self._poll())

    def close(self) -> None:
        """Stop watching. Idempotent; changes nothing for the process."""
        if self._polling is not None:
            self._polling.cancel()
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    async def _poll(self) -> None:
        while procfs.is_alive(self._pid, self._start_ticks):  # noqa: ASYNC110 - nothing here could set an event
            await asyncio.sleep(POLL_S)
        self._ended()

    def _ended(self) -> None:
        found = procfs.stat(self._pid)
        if found is not None and found.start_ticks == self._start_ticks:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, os.WNOHANG)
        self.gone.set()
        self.close()
