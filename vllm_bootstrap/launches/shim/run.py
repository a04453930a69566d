"""The shim's life: one loop over signals, connections and the engine's output. Standard library only.

Invariant: the process ends only when no process of the engine's tree is left (or none was ever started), and an exit
record lies on disk then. Whatever a daemon does or fails to do, the loop never blocks for it.

The decision made after every wake-up (``_step``):

1. no engine: end when the daemon is gone, a stop was asked for, or the start was refused; else wait for "go"
2. main process lives, no stop asked for: wait, and look at its shared memory now and then
3. main process lives, grace running: SIGTERM to it once, wait for the end of the grace
4. main process lives, grace over or force: SIGKILL to the whole tree, again until nothing is left
5. main process dead, others left: let them go by themselves for a moment, then as 4
6. nothing left: keep the last output, write the exit record, announce it, end
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
import time

from . import engine, gpuhold, procfs, protocol, shm, syscalls
from .cgroup import Leaf
from .control import Connection, Server
from .logwriter import LogPump, Masker, SegmentWriter
from .order import Order, Refused
from .tree import Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SETTLE_S = 0.5
TERM_GRACE_S = 5.0
LONGEST_GRACE_S = 86_400.0
FLUSH_LOG_S = 3.0
FLUSH_PEERS_S = 0.5
FIRST_LOOK_S, LONGEST_LOOK_S = 5.0, 300.0
KILL_PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
READS_A_TURN = 16
READ_BYTES = 64 * 1024
IGNORED = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGPIPE", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU", "SIGTSTP")


class Shim:
    """One attempt of one launch. Single-threaded but for the log's writer."""

    def __init__(self, run_dir: str, state_id: str, launch_id: str, attempt: int, inherited: engine.Inherited) -> None:
        self._run_dir, self._control_dir = run_dir, f"{run_dir}/{protocol.CONTROL_DIR}"
        self._names = {"state_id": state_id, "launch_id": launch_id, "attempt": attempt}
        self._marker = (protocol.MARKER, protocol.marker(state_id, launch_id, attempt))
        self._inherited = inherited
        found = procfs.stat(os.getpid())
        self._boot_id = procfs.boot_id()
        self._identity = self._identify(os.getpid(), found.start_ticks if found else 0)
        self._poll = select.poll()
        self._engine: engine.Started | None = None
        self._tree: Tree | None = None
        self._log: LogPump | None = None
        self._gpus = gpuhold.GpuHold(launch_id)
        self._tmp_dir = ""
        self._main_exit: dict[str, Any] | None = None
        self._stop_requested = self._force = self._forced = self._terminated = False
        self._childless = True
        self._deadline = self._next_kill = self._next_look = 0.0
        self._look_pause = FIRST_LOOK_S
        self._kills = 0
        self._error: str | None = None
        self._gone_before_start = False
        self._record: dict[str, Any] | None = None
        self._wakeup = self._take_signals()
        first_connection = self._take_standard_descriptors()
        protocol.write_json(
            f"{self._control_dir}/{protocol.IDENTITY}", {"protocol": protocol.PROTOCOL, **self._identity, **self._names}
        )
        self._server = Server(self._poll, self._control_dir, first_connection, self._answer)

    # -- becoming a shim ----------------------------------------------------------------------------------------

    def _identify(self, pid: int, start_ticks: int) -> dict[str, Any]:
        return {"pid": pid, "start_ticks": start_ticks, "boot_id": self._boot_id}

    def _take_signals(self) -> int:
        for name in IGNORED:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        wakeup, signalled = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._poll.register(wakeup, select.POLLIN)
        return wakeup

    def _take_standard_descriptors(self) -> socket.socket:
        inherited = socket.socket(fileno=os.dup(0))
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        return inherited

    def _on_sigterm(self, *_: object) -> None:
        self._ask_to_stop(TERM_GRACE_S)

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        while self._record is None:
            pause = self._step(time.monotonic())
            if self._record is None:
                self._wait(pause)
        deadline = time.monotonic() + FLUSH_PEERS_S
        while self._server.unsent() and time.monotonic() < deadline:
            self._wait(FLUSH_PEERS_S / 10)
        self._server.close()

    def _wait(self, pause_s: float | None) -> None:
        timeout = None if pause_s is None else max(0, int(pause_s * 1000) + 1)
        for fd, events in self._poll.poll(timeout):
            if fd == self._wakeup:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 4096)
            elif self._engine is not None and fd == self._engine.output:
                self._read_output(READS_A_TURN)
            else:
                self._server.handle(fd, events)

    def _step(self, now: float) -> float | None:
        """See the module's decision tree. The longest time to wait for the next event, None for any."""
        self._reap(now)
        if self._engine is None or self._tree is None:  # 1
            if not self._server.first_is_open:
                self._gone_before_start = True
            if self._gone_before_start or self._stop_requested or self._error is not None:
                self._end()
            return None
        if self._main_exit is None:
            if not self._stop_requested:  # 2
                return self._look(self._tree, now)
            if not self._force and now < self._deadline:  # 3
                self._terminate(self._engine, self._tree)
                return self._deadline - now
            return self._kill(self._tree, now)  # 4
        if not self._tree.is_left(childless=self._childless):  # 6
            self._end()
            return None
        if not self._force and now < self._deadline:  # 5
            return min(self._deadline - now, KILL_PAUSES_S[1])
        return self._kill(self._tree, now)

    def _reap(self, now: float) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._childless = True
                return
            self._childless = False
            if pid == 0:
                return
            if self._engine is not None and pid == self._engine.pid:
                self._main_ended(os.waitstatus_to_exitcode(status), now)

    def _main_ended(self, code: int, now: float) -> None:
        self._main_exit = {"exit_code": None, "signal": -code} if code < 0 else {"exit_code": code, "signal": None}
        self._deadline = now + SETTLE_S
        self._server.broadcast({"event": "main_exited", **self._main_exit})

    # -- the tree -----------------------------------------------------------------------------------------------

    def _look(self, tree: Tree, now: float) -> float:
        if now >= self._next_look:
            # Seldom and ever more seldom: whoever is killed later can no longer be asked what it had mapped.
            if self._next_look and tree.look():
                self._note_engine(tree)
            self._next_look = now + self._look_pause
            self._look_pause = min(2 * self._look_pause, LONGEST_LOOK_S)
        return self._next_look - now

    def _terminate(self, main: engine.Started, tree: Tree) -> None:
        if not self._terminated:
            self._terminated = True
            tree.look()
            procfs.send_signal(main.pid, main.start_ticks, signal.SIGTERM)

    def _kill(self, tree: Tree, now: float) -> float:
        self._force = True
        if now >= self._next_kill:
            self._forced |= tree.kill()
            self._next_kill = now + KILL_PAUSES_S[min(self._kills, len(KILL_PAUSES_S) - 1)]
            self._kills += 1
        return self._next_kill - now

    # -- requests -----------------------------------------------------------------------------------------------

    def _answer(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        op = request.get("op")
        if op == "hello":
            connection.wants_events = True
            return {"protocol": protocol.PROTOCOL, "identity": self._identity, **self._names, **self._status()}
        if op == "status":
            return self._status()
        if op == "go":
            return self._go(connection, request)
        if op == "stop":
            grace = request.get("grace_s", 0)
            self._ask_to_stop(float(grace) if isinstance(grace, int | float) else 0.0)
            return {}
        if op == "force":
            self._ask_to_stop(0.0)
            self._force = True
            return {}
        if op == "unlock":
            self._gpus.give_up()
            return {}
        if op == "lock":
            self._gpus.take_again()
            return {}
        raise Refused("unknown_op", f"this shim does not know {op!r}")

    def _status(self) -> dict[str, Any]:
        if self._record is not None:
            phase = "ended"
        elif self._engine is None:
            phase = "waiting"
        else:
            phase = "stopping" if self._stop_requested or self._main_exit is not None else "running"
        return {
            "phase": phase,
            "engine": self._identify(self._engine.pid, self._engine.start_ticks) if self._engine else None,
            "main": self._main_exit,
            "stop_requested": self._stop_requested,
            "forced": self._forced,
            "log": {"end": self._log.end, "dropped": self._log.dropped} if self._log else None,
            "record": self._record,
            "locked": self._gpus.is_held,
        }

    def _ask_to_stop(self, grace_s: float) -> None:
        if self._main_exit is not None:
            return  # it died by itself: asking afterwards does not make that a stop
        deadline = time.monotonic() + min(max(0.0, grace_s), LONGEST_GRACE_S)
        self._deadline = min(self._deadline, deadline) if self._stop_requested else deadline
        self._stop_requested = True

    def _go(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        if not connection.first:
            raise Refused("not_yours", "only the daemon that made this shim may start its engine")
        if self._engine is not None or self._error is not None:
            raise Refused("already_started", "this shim was told to start before")
        if self._stop_requested:
            raise Refused("stopping", "a stop was asked for before the start")
        try:
            started = self._start(Order(request.get("order")))
        except Refused as exc:
            self._error = str(exc)
            raise
        return {"engine": self._identify(started.pid, started.start_ticks)}

    def _start(self, order: Order) -> engine.Started:
        self._gpus.take(order)
        try:
            engine.prepare_directories(order, self._run_dir)
        except (OSError, ValueError) as exc:
            raise Refused("spawn_failed", str(exc)) from None
        leaf = Leaf.create(f"{self._names['launch_id']}.{self._names['attempt']}")
        tree, self._tmp_dir = Tree(leaf, shm.existing()), order.tmp_dir
        self._note_engine(tree)  # so that a sweep knows of the leaf, whatever happens to us next
        try:
            started = engine.start(order, self._marker, leaf, self._inherited)
        except (OSError, Refused) as exc:
            tree.clear()
            raise exc if isinstance(exc, Refused) else Refused("spawn_failed", str(exc)) from None
        if leaf is not None and started.pid not in leaf.pids() and leaf.remove():
            tree.leaf = None
        self._engine, self._tree, self._childless = started, tree, False
        writer = SegmentWriter(order.log_dir, order.log_segment_bytes, order.log_max_bytes)
        self._log = LogPump(writer, Masker(order.secrets))
        self._poll.register(started.output, select.POLLIN)
        self._note_engine(tree)
        with contextlib.suppress(OSError):
            protocol.reserve(f"{self._control_dir}/{protocol.EXIT}")
        return started

    def _note_engine(self, tree: Tree) -> None:
        # For a sweep after the shim's own death; the marker finds the engine even when this cannot be written.
        main = self._engine
        notes = {
            **self._identify(main.pid if main else 0, main.start_ticks if main else 0),
            "cgroup": tree.leaf.path if tree.leaf else None,
            "tmp_dir": self._tmp_dir,
            "shared_memory": sorted(tree.shared_memory),
            "shared_before": sorted(tree.shared_before),
        }
        with contextlib.suppress(OSError):
            protocol.write_json(f"{self._control_dir}/{protocol.ENGINE}", notes)

    # -- output and end -----------------------------------------------------------------------------------------

    def _read_output(self, turns: int) -> bool:
        """Move output from the pipe to the log. False at its end, or when nothing more is there now."""
        if self._engine is None or self._log is None:
            return False
        for _ in range(turns):
            try:
                data = os.read(self._engine.output, READ_BYTES)
            except BlockingIOError:
                return False
            if not data:
                with contextlib.suppress(KeyError):
                    self._poll.unregister(self._engine.output)
                return False
            self._log.put(data)
        return True

    def _end(self) -> None:
        if self._log is not None:
            while self._read_output(READS_A_TURN):
                continue
            self._log.close(FLUSH_LOG_S)
        if self._tree is not None:
            self._tree.clear()
        self._record = {
            "exit_code": None,
            "signal": None,
            **(self._main_exit or {}),
            "forced": self._forced,
            "stop_requested": self._stop_requested,
            "ended_at": time.time(),
            "error": self._error,
        }
        if self._gone_before_start:
            return  # nobody waits for it, and nothing was started
        with contextlib.suppress(OSError):
            protocol.write_json(f"{self._control_dir}/{protocol.EXIT}", {**self._names, **self._record}, durable=True)
        self._server.broadcast({"event": "ended", "record": self._record})

    def last_resort(self, fault: BaseException) -> None:
        """After a fault of our own: end the tree by the bluntest means, and say that there was a fault."""
        self._error = f"the shim failed: {fault!r}"
        self._log = None
        while self._tree is not None and self._tree.is_left(childless=self._childless):
            self._kill(self._tree, time.monotonic())
            time.sleep(KILL_PAUSES_S[0])
            self._reap(time.monotonic())
        self._end()


def main(arguments: list[str]) -> int:
    """``run_dir state_id launch_id attempt``, with the first connection as standard input.

    The shim stays dumpable, unlike the daemon: what it knows of secrets stands in the engine's environment, which the
    same users can read, and a process that is not dumpable vanishes from its own user's view where ``/proc`` is mounted
    with ``hidepid``. What must not be written is a core file: its size limit is zero here and restored for the engine.
    """
    run_dir, state_id, launch_id, attempt = arguments
    inherited = engine.Inherited(os.umask(0o077), resource.getrlimit(resource.RLIMIT_CORE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, inherited.core_limit[1]))
    procfs.close_descriptors(keep=(0, 1, 2))  # what a careless parent may have left open
    with contextlib.suppress(PermissionError):  # already a leader
        os.setsid()
    os.chdir("/")
    syscalls.prctl(syscalls.PR_SET_NAME, b"vbs-shim")
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    # Programs that clean temporary folders by age leave alone what lies below a locked one.
    fcntl.flock(os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_SH | fcntl.LOCK_NB)
    shim = Shim(run_dir, state_id, launch_id, int(attempt), inherited)
    try:
        shim.run()
    except BaseException as fault:
        shim.last_resort(fault)  # whatever failed, no engine may outlive its shim
        raise
    return 0
