"""The process and the server around the daemon: uvicorn as it is run here, and limits that hold for the whole process.

Invariant: what is set here is set once, at start. Must not know: settings, requests, launches.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Generator

import uvicorn

from vllm_bootstrap.pulse import until_pulse

log = logging.getLogger("vllm_bootstrap")

DATE_S = 1.0
PR_SET_DUMPABLE = 4
SWITCH_S = 0.0005


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the daemon decides when to stop. ``up``: it accepts."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up, self._leaving = asyncio.Event(), asyncio.Event()

    def leave(self) -> None:
        """Stop serving. Idempotent."""
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        # Only the date changes with time. uvicorn's own loop wakes ten times a second, for 1 % of a core.
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), until_pulse(DATE_S, time.monotonic()))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def rest_the_garbage_collector() -> None:
    # What start has made lives as long as the process: it need not be looked through for garbage ever again. What
    # requests leave is small and freed at once but for a few cycles each, so that looking less often costs a few MB.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)


def prepare_process(connections: int) -> None:
    """What must be set before anything else is done. ``connections``: how many clients may connect at once."""
    _forbid_core_dumps()
    _allow_many_files(connections)
    # While a thread runs Python (histories are written by some), the event loop, and with it every request, waits as
    # long as this before it may go on. Python's own 5 ms is more than a request costs altogether.
    sys.setswitchinterval(SWITCH_S)


def _allow_many_files(connections: int) -> None:
    # Each client connection may need one to an engine as well; the rest is for logs, database and pipes.
    wanted = 2 * connections + 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _forbid_core_dumps() -> None:
    # Keys live in this process: no core dumps, no ptrace and no /proc/PID/environ for other processes of this user.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("PR_SET_DUMPABLE could not be cleared: %s", os.strerror(ctypes.get_errno()))
