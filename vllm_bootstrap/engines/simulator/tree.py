"""The process tree: an engine process below the server, workers below that, as in vLLM. They only wait.

Invariant: children live on when the server is killed, as vLLM's do; a stop takes them along. A worker's death ends
the engine process, and that ends the server. Nobody here watches a parent.
It must not import asyncio: children are forked before any event loop exists, and run nothing but this file.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from vllm_bootstrap.engines.simulator.log import Log, write

WORKER_GRACE_S = 2.0
NOISE_TICK_S = 0.05
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def set_title(title: str) -> None:
    """Show ``title`` in ps: over the memory of the command line, and as the short name. Best effort."""
    with suppress(OSError, ValueError, IndexError):
        Path("/proc/self/comm").write_bytes(title.encode()[:15])
        # Fields 48 and 49 of stat: where the argument strings lie. The environment behind them stays readable.
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        data = title.encode()[: end - start - 1]
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(data.ljust(end - start, b"\0"))


def children_of(pid: int) -> list[int]:
    """Direct children of a process, as far as the kernel tells."""
    with suppress(OSError):
        return [int(part) for part in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class EngineProcess:
    """The engine process and its workers, seen from the server. All methods must run in the process that started it."""

    def __init__(self, *, workers: tuple[str, ...], ignore_sigterm: bool, noise_bytes_per_second: int) -> None:
        self._workers = workers
        self._ignore_sigterm = ignore_sigterm
        self._noise = noise_bytes_per_second
        self.pid: int | None = None

    def start(self) -> int:
        """Fork the engine process; it forks its workers. Call before threads and event loops exist."""
        gc.freeze()
        # A signal handler that raises between the fork and the assignment would lose the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            pid = os.fork()
            if pid == 0:
                self._run()
            self.pid = pid
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid

    def changes(self) -> Iterator[str]:
        """What happened to the engine process since the last call: ``stopped``, ``continued``, ``exited``."""
        while self.pid is not None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                yield "stopped"
            elif os.WIFCONTINUED(status):
                yield "continued"
            else:
                self.pid = None
                yield "exited"

    def kill(self) -> None:
        """SIGKILL the engine process and its workers."""
        if self.pid is not None:
            for pid in (*children_of(self.pid), self.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def stop(self, grace_s: float) -> None:
        """SIGTERM, wait at most ``grace_s``, SIGKILL the rest. Blocks. Idempotent."""
        if self.pid is None:
            return
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        if not _exits_within(self.pid, grace_s):
            self.kill()
        os.waitpid(self.pid, 0)
        self.pid = None

    def _run(self) -> NoReturn:
        code = 1
        try:
            _become_child("EngineCore", self._ignore_sigterm)
            code = self._watch_workers([_fork_worker(title, self._ignore_sigterm) for title in self._workers])
        finally:
            os._exit(code)

    def _watch_workers(self, workers: list[int]) -> int:
        """Wait for a signal or for a worker's death, making noise meanwhile. Returns the exit code."""
        noise = Noise(self._noise) if self._noise else None
        while True:
            if noise is None:
                received = signal.sigwait(_HANDLED)
            else:
                info = signal.sigtimedwait(_HANDLED, NOISE_TICK_S)
                noise.make()
                received = signal.Signals(info.si_signo) if info else signal.SIGCHLD
            if received != signal.SIGCHLD and not self._ignore_sigterm:
                _end_all(workers)
                return 0
            dead = _reap(workers)
            if dead is not None:
                Log("EngineCore", os.getpid()).fail(
                    "multiproc_executor.py:316",
                    f"Worker proc VllmWorker-{dead} died unexpectedly, shutting down executor.",
                )
                _end_all(workers)
                return 1


def _exits_within(pid: int, seconds: float) -> bool:
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(handle)


def _become_child(name: str, ignore_sigterm: bool) -> None:
    # vLLM spawns its children afresh: they hold none of the server's sockets and handle signals by default.
    os.closerange(3, 1 << 20)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if ignore_sigterm else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    set_title(f"{os.environ.get('VLLM_PROCESS_NAME_PREFIX') or 'VLLM'}::{name}")


def _fork_worker(name: str, ignore_sigterm: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        _become_child(name, ignore_sigterm)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        while True:
            signal.pause()
    finally:
        os._exit(0)


def _reap(workers: list[int]) -> int | None:
    """Collect dead workers; the rank of the first one found."""
    for rank, pid in enumerate(workers):
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0]:
                workers.remove(pid)
                return rank
    return None


def _end_all(workers: list[int]) -> None:
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + WORKER_GRACE_S
    for pid in workers:
        if not _exits_within(pid, max(0.0, deadline - time.monotonic())):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def worker_titles(tensor_parallel: int, pipeline_parallel: int) -> tuple[str, ...]:
    """Names of the workers. A single one lives inside the engine process, so there is none."""
    if tensor_parallel * pipeline_parallel == 1:
        return ()
    return tuple(
        (f"Worker_PP{stage}_TP{rank}" if pipeline_parallel > 1 else f"Worker_TP{rank}")
        for stage in range(pipeline_parallel)
        for rank in range(tensor_parallel)
    )


def start_daemonised_child() -> None:
    """A process that left group, session and parent: only its environment tells where it came from."""
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            _become_child("Daemonised", ignore_sigterm=True)
            os.chdir("/")
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            while True:
                signal.pause()
    finally:
        os._exit(0)


class Noise:
    """Log lines at a rate in bytes per second."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second
        self._log_line = f"(EngineCore pid={os.getpid()}) DEBUG noise {'.' * 160}\n"
        self._due = 0.0
        self._last = time.monotonic()

    def make(self) -> None:
        """Write what is due since the last call."""
        now = time.monotonic()
        self._due = min(self._due + (now - self._last) * self._rate, float(self._rate))
        self._last = now
        lines = int(self._due / len(self._log_line))
        if lines:
            self._due -= lines * len(self._log_line)
            write(self._log_line * lines)
