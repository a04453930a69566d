"""Shims as the daemon sees them: made, found again, asked, seen ending. asyncio, any event loop.

Invariant: everything about an engine's processes goes through its shim, or, when the shim is dead, through the sweep by
markers; a stored pid alone is never signalled. Nothing found under another boot id is touched. Launches' states, GPUs
and engines are unknown here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_bootstrap.launches import sweep
from vllm_bootstrap.launches.shim import procfs, protocol, shm
from vllm_bootstrap.launches.shim.cgroup import Leaf
from vllm_bootstrap.launches.shim_client import (
    MainExit,
    Shim,
    ShimLost,
    ShimRefused,
    adopt,
    exit_record_in,
    first_contact,
)
from vllm_bootstrap.launches.types import ExitRecord, ShimHandle

__all__ = ["Leftover", "MainExit", "ProcessHost", "Shim", "ShimLost", "ShimRefused", "ShimSpawnFailed"]

log = logging.getLogger(__name__)

SHIM_PROGRAM = Path(__file__).parent / "shim" / "__main__.py"
SHIM_FLAGS = ("-I", "-S", "-X", "utf8")
# All a shim inherits: what its interpreter may need to be found and loaded.
PASSED_ON = ("PATH", "LD_LIBRARY_PATH")
SPAWN_WAIT_S = 30.0
KILL_PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SWEEP_ROUNDS = 14
SHIM_ROUNDS = 8
EMPTY_SCANS = 3
WARN_EVERY_ROUNDS = 30


class ShimSpawnFailed(OSError):
    """No shim could be started; nothing of the attempt is running."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something of ours that no launch knew. ``gone`` False: it could not be killed yet."""

    launch_id: str
    attempt: int
    pids: tuple[int, ...]
    gone: bool

    def in_words(self) -> str:
        """One sentence for the log."""
        of = f"of launch {self.launch_id}, attempt {self.attempt}"
        pids = ", ".join(str(pid) for pid in self.pids)
        if self.gone:
            return f"Ended what was left {of}, which nothing knew any more: PID {pids}"
        return f"What is left {of}, which nothing knows any more, cannot be ended yet: PID {pids}"


class ProcessHost:
    """Makes and finds shims below ``runtime_dir`` (short, local, made 0700 and never shared with another user).

    ``state_id`` names this daemon's state folder: a short word without ``/``. ``python`` overrides the interpreter and
    its flags, ``shim`` the program, for tests. A shim that does not answer for ``answer_s`` seconds counts as lost.
    Methods that are not ``async`` block on local files.
    """

    def __init__(
        self,
        runtime_dir: Path,
        state_id: str,
        *,
        python: Sequence[str] | None = None,
        shim: Path = SHIM_PROGRAM,
        answer_s: float = 10.0,
    ) -> None:
        if not state_id or "/" in state_id:
            raise ValueError(f"a state id is a word without slashes, not {state_id!r}")
        self._runtime_dir, self._state_id, self._answer_s = runtime_dir, state_id, answer_s
        self._command = [*(python or (sys.executable, *SHIM_FLAGS)), str(shim)]

    def run_dir(self, launch_id: str, attempt: int) -> Path:
        """Where an attempt's control socket and identity lie, and its TMPDIR may."""
        return self._runtime_dir / f"{launch_id}.{attempt}"

    async def spawn(self, launch_id: str, attempt: int) -> Shim:
        """Start a shim. On return its identity is known and written down, and its engine is not started.

        Until ``go`` the shim ends by itself when this process does. Raises ``ShimSpawnFailed``.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                run_dir = await asyncio.to_thread(self._make_run_dir, launch_id, attempt)
                pid = await asyncio.to_thread(self._start_shim, theirs, run_dir, launch_id, attempt)
            except OSError as exc:
                ours.close()
                raise ShimSpawnFailed(f"No supervising process could be started: {exc}") from exc
            except BaseException:
                ours.close()
                raise
        try:
            async with asyncio.timeout(SPAWN_WAIT_S):
                return await first_contact(ours, run_dir, launch_id, attempt, pid, self._answer_s)
        except BaseException as exc:
            ours.close()
            await self._abandon(pid)
            if isinstance(exc, OSError | TimeoutError):
                said = _last_line(run_dir / protocol.CONTROL_DIR / protocol.ERRORS)
                raise ShimSpawnFailed(f"The supervising process did not start: {said or repr(exc)}") from exc
            raise

    async def adopt(self, handle: ShimHandle) -> Shim | None:
        """The living shim of an earlier daemon, or None: other boot, gone, another process, or no answer in time.

        A shim that still waits for its "go" counts as gone: it ends with the daemon that made it.
        """
        return await adopt(handle, self._answer_s)

    def exit_record(self, handle: ShimHandle) -> ExitRecord | None:
        """What a shim that has ended left behind. None: nothing, or not yet."""
        return exit_record_in(Path(handle.run_dir), handle.launch_id, handle.attempt)

    async def kill_marked(self, launch_id: str, attempt: int) -> bool:
        """Kill what is left of an attempt, its shim included, and return when nothing is.

        True when a process of the engine had to be killed. Idempotent. Does not return before everything is dead: a
        process that the kernel cannot end (stuck in a driver) is waited for, and named in the log now and then.
        """
        return (await self._kill(launch_id, attempt, rounds=None)).had_engine

    async def sweep(self, keep: set[tuple[str, int]]) -> list[Leftover]:
        """Kill everything that carries our marker and is not in ``keep``, and remove its run directory.

        What cannot be killed within seconds is reported with ``gone`` False and left for the next sweep.
        """
        table = await asyncio.to_thread(procfs.all_processes)
        found = await asyncio.to_thread(sweep.marked, self._state_id, table)
        dirs = await asyncio.to_thread(lambda: list(sweep.run_dirs(self._runtime_dir, self._state_id)))
        for attempt, path in dirs:
            if attempt is None:
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
        known = {attempt for attempt, _ in dirs if attempt is not None}
        swept = []
        for launch_id, number in sorted((found.keys() | known) - keep):
            killed = await self._kill(launch_id, number, rounds=SWEEP_ROUNDS)
            if killed.gone:
                await asyncio.to_thread(self.cleanup, launch_id, number)
            if killed.pids:
                swept.append(Leftover(launch_id, number, tuple(sorted(killed.pids)), killed.gone))
        return swept

    async def trees(self, shims: Iterable[int]) -> frozenset[int]:
        """Everything that lives below these shims now, themselves included."""

        def look() -> frozenset[int]:
            roots = frozenset(shims)
            return roots | procfs.descendants(roots, procfs.all_processes())

        return await asyncio.to_thread(look)

    def cleanup(self, launch_id: str, attempt: int) -> None:
        """Remove an ended attempt's run directory and private TMPDIR. Idempotent. Blocks on the disk."""
        run_dir = self.run_dir(launch_id, attempt)
        notes = protocol.read_json(str(run_dir / protocol.CONTROL_DIR / protocol.ENGINE)) or {}
        tmp_dir = notes.get("tmp_dir")
        for path in (tmp_dir if isinstance(tmp_dir, str) else None, run_dir):
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
                if os.path.lexists(path):
                    log.warning("%s could not be removed entirely", path)

    # -- spawning -----------------------------------------------------------------------------------------------

    def _make_run_dir(self, launch_id: str, attempt: int) -> Path:
        self._runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._runtime_dir.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{self._runtime_dir} is not a folder that only this user can write to")
        # Renamed when complete, so that a sweep can always tell whose it is.
        fresh = self._runtime_dir / f"{sweep.unfinished_prefix(self._state_id)}{launch_id}.{attempt}"
        shutil.rmtree(fresh, ignore_errors=True)
        control_dir = fresh / protocol.CONTROL_DIR
        for directory in (fresh, control_dir):
            directory.mkdir(mode=0o700)
            directory.chmod(0o700)
        (control_dir / protocol.OWNER).write_text(self._state_id)
        run_dir = self.run_dir(launch_id, attempt)
        fresh.rename(run_dir)
        return run_dir

    def _start_shim(self, stdin: socket.socket, run_dir: Path, launch_id: str, attempt: int) -> int:
        env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        env |= {"LC_ALL": "C.UTF-8", "MALLOC_ARENA_MAX": "1"}
        env[protocol.MARKER] = protocol.marker(self._state_id, launch_id, attempt)
        errors = str(run_dir / protocol.CONTROL_DIR / protocol.ERRORS)
        return os.posix_spawnp(
            self._command[0],
            [*self._command, str(run_dir), self._state_id, launch_id, str(attempt)],
            env,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, stdin.fileno(), 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            ],
            setsigmask=[],
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )

    async def _abandon(self, pid: int) -> None:
        # Our own child, not yet reaped: the pid cannot be anybody else's.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            await asyncio.shield(asyncio.to_thread(os.waitpid, pid, 0))

    # -- killing ------------------------------------------------------------------------------------------------

    async def _kill(self, launch_id: str, attempt: int, *, rounds: int | None) -> _Killed:
        run_dir, result = self.run_dir(launch_id, attempt), _Killed()
        shared_memory: set[str] = set()
        # A scan of /proc misses what is born while it runs to a parent that dies in it. An exit record proves the end;
        # without one, an empty scan is believed when others confirm it.
        wanted_empty = 1 if exit_record_in(run_dir, launch_id, attempt) is not None else EMPTY_SCANS
        number = empty = 0
        while True:
            found = await asyncio.to_thread(sweep.remains, self._state_id, (launch_id, attempt), run_dir)
            shared_memory |= found.shared_memory
            empty = 0 if found.tree else empty + 1
            if empty >= wanted_empty or (not found.engine and number >= SHIM_ROUNDS):
                result.gone = True
                break
            if rounds is not None and number >= rounds:
                break
            if empty:
                await asyncio.sleep(KILL_PAUSES_S[0])
                continue
            await asyncio.to_thread(sweep.kill, found)
            result.pids |= found.tree.keys()
            result.had_engine |= bool(found.engine)
            await asyncio.sleep(KILL_PAUSES_S[min(number, len(KILL_PAUSES_S) - 1)])
            number += 1
            if number % WARN_EVERY_ROUNDS == 0:
                log.warning("launch %s attempt %d: not dead after SIGKILL: %s", launch_id, attempt, sorted(found.tree))
        if result.gone:
            await asyncio.to_thread(shm.remove_unused, shared_memory)
            await _remove_leaf(found.leaf)
        return result


@dataclass(slots=True)
class _Killed:
    pids: set[int]
    had_engine: bool
    gone: bool

    def __init__(self) -> None:
        self.pids, self.had_engine, self.gone = set(), False, False


async def _remove_leaf(leaf: Leaf | None) -> None:
    # The kernel may call it busy for a moment after its last process has become a zombie.
    if leaf is None:
        return
    for pause in KILL_PAUSES_S:
        if leaf.remove():
            return
        await asyncio.sleep(pause)
    log.warning("%s could not be removed", leaf.path)


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
