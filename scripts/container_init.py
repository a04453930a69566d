"""A small init for containers: keeps the daemon running, reaps what is orphaned, stops everything in time.

What a container needs before that (the user that the daemon runs as, folders, sshd) is container_setup.py's.

Usage: ``python3 container_init.py [COMMAND ...]`` (default ``vllm-bootstrap serve``). Standard library only, Linux.

Promises:
* When the daemon dies (signal or non-zero exit) it is started again after a back-off; the engines live on under their
  shims meanwhile and the new daemon finds them again. Exit 2 right after a start (a configuration that cannot work) and
  exit 0 (somebody asked the daemon itself to end) are final: this program then ends everything and exits alike.
* SIGTERM and SIGINT go to the daemon; SIGHUP too (it reloads the keys). The whole stop takes less than ``STOP_S``
  seconds, because container runtimes send SIGKILL after ten: what is left by then is killed.
* Every child that ends is reaped, also those it inherits. It works as pid 1 and, as a subreaper, as any other pid.
* Started as root with ``DAEMON_USER`` it gives its rights up for the daemon, which cannot get them back. sshd, where it
  is wanted, is started again when it dies and never decides about the container's life.

It must not know anything about launches or engines: it sees processes only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import container_setup
from container_setup import Identity, Plan

STOP_S = 9.0  # of the ten that Docker and Kubernetes-like runtimes commonly give by default
KILL_S = 0.7  # kept of these for killing and reaping what did not end by itself
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30.0
STEADY_S = 60.0  # a daemon that lived this long starts the back-off anew
EXIT_USAGE = 2

_PR_SET_CHILD_SUBREAPER = 36
_FORWARDED = {signal.SIGHUP}
_STOPPING = {signal.SIGTERM, signal.SIGINT}
_HANDLED = _FORWARDED | _STOPPING | {signal.SIGCHLD}


def backoff(failures: int) -> float:
    """Seconds to wait before the start that follows ``failures`` (1 or more) quick deaths in a row."""
    return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 16))


def say(text: str) -> None:
    sys.stderr.write(f"init: {text}\n")
    sys.stderr.flush()


@dataclass
class Child:
    """A program that is kept running."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    identity: Identity | None = None
    pid: int | None = None
    started_at: float = 0.0
    failures: int = 0
    start_at: float = 0.0  # when to start (again); meaningless while it runs

    def died(self, shown: str) -> None:
        """Count the death and set the time of the next start."""
        lived = time.monotonic() - self.started_at
        self.failures = 1 if lived >= STEADY_S else self.failures + 1
        wait = backoff(self.failures)
        self.start_at = time.monotonic() + wait
        say(f"{self.name} died ({shown}) after {lived:.0f} s; starting it again in {wait:g} s")


class Init:
    """The whole program. ``run`` returns the exit code; nothing here is thread-safe or reusable."""

    def __init__(self, command: Sequence[str], plan: Plan) -> None:
        self.daemon = Child("the daemon", list(command), plan.environment, plan.identity)
        self.children = [self.daemon]
        if plan.sshd is not None:
            self.children.append(Child("sshd", plan.sshd, plan.sshd_environment))
        self.stop_by: float | None = None
        self.exit_code = 0

    def run(self) -> int:
        _become_subreaper()
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        while self.stop_by is None:
            now = time.monotonic()
            for child in self.children:
                if child.pid is None and now >= child.start_at and self.stop_by is None:
                    self.start(child)
            waits = [child.start_at - now for child in self.children if child.pid is None]
            self.take(signal.sigtimedwait(_HANDLED, max(0.01, min(waits, default=3600))))
        self.end()
        return self.exit_code

    def start(self, child: Child) -> None:
        child.started_at = time.monotonic()
        try:
            child.pid = spawn(child)
        except OSError as exc:
            say(f"cannot start {child.command[0]}: {exc}")
            if child is self.daemon:
                self.stop(127)
            else:
                child.died("it cannot be started")

    def take(self, info: signal.struct_siginfo | None) -> None:
        """Act on one signal."""
        number = info.si_signo if info else None
        if number in _STOPPING:
            say(f"{signal.Signals(number).name}: stopping")
            self.stop(0)
        elif number in _FORWARDED:
            self.tell_daemon(signal.Signals(number))
        self.reap()

    def tell_daemon(self, number: signal.Signals) -> None:
        if self.daemon.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.daemon.pid, number)

    def reap(self) -> None:
        """Collect every process that has ended; decide what the end of one of ours means."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self.children:
                if child.pid == pid:
                    child.pid = None
                    self.ended(child, os.waitstatus_to_exitcode(status))

    def ended(self, child: Child, code: int) -> None:
        lived = time.monotonic() - child.started_at
        shown = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if child is not self.daemon:
            if self.stop_by is None:
                child.died(shown)
        elif self.stop_by is not None:
            self.exit_code = self.exit_code or (128 - code if code < 0 else code)
        elif code == 0 or (code == EXIT_USAGE and lived < STEADY_S and child.failures == 0):
            say(f"the daemon ended ({shown}): stopping")
            self.stop(code)
        else:
            child.died(shown)

    def stop(self, exit_code: int) -> None:
        """Begin the stop. Idempotent: the first deadline and the first exit code stay."""
        if self.stop_by is None:
            self.stop_by = time.monotonic() + STOP_S - KILL_S
            self.exit_code = exit_code
            self.tell_daemon(signal.SIGTERM)

    def end(self) -> None:
        """See the daemon and everything it left dead, by force when the time is over."""
        deadline = self.stop_by or time.monotonic()
        asked_the_rest = False
        while (left := deadline - time.monotonic()) > 0:
            if self.daemon.pid is None and not asked_the_rest:
                _signal_all(children(), signal.SIGTERM)
                asked_the_rest = True
            if self.daemon.pid is None and not descendants():
                return
            self.take(signal.sigtimedwait(_HANDLED, min(left, 0.1 if self.daemon.pid is None else 1.0)))
        if descendants():
            say("time is over: killing what is left")
            self.exit_code = self.exit_code or 128 + signal.SIGKILL
        until = time.monotonic() + KILL_S
        while (left_over := descendants()) and time.monotonic() < until:
            _signal_all(left_over, signal.SIGKILL)
            signal.sigtimedwait({signal.SIGCHLD}, 0.05)
            self.reap()


def spawn(child: Child) -> int:
    """Start it, with the signal mask and the dispositions a program expects, as who it is to be. Raises ``OSError``."""
    reader, writer = os.pipe()  # closed by a successful exec; else it carries the reason
    pid = os.fork()
    if pid == 0:
        try:
            _become(child)
        except OSError as exc:
            os.write(writer, str(exc.errno or 0).encode())
        finally:
            os._exit(127)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        reason = told.read()
    if reason:
        os.waitpid(pid, 0)
        raise OSError(int(reason), os.strerror(int(reason)))
    return pid


def _become(child: Child) -> None:
    """Never returns. Raises ``OSError``."""
    for number in (*_HANDLED, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if child.identity is not None:
        os.setgroups(child.identity.groups)
        os.setgid(child.identity.gid)
        os.setuid(child.identity.uid)  # last, and of all three ids: there is no way back
    os.execvpe(child.command[0], child.command, child.environment)  # noqa: S606  # no shell is the point


def children() -> list[int]:
    return [pid for pid, parent in _parents().items() if parent == os.getpid()]


def descendants() -> list[int]:
    """All living processes below this one, nearest first. Zombies of others are theirs to reap."""
    parents = _parents()
    found = [os.getpid()]
    for parent in found:
        found.extend(pid for pid, above in parents.items() if above == parent)
    return found[1:]


def _parents() -> dict[int, int]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = int(fields[1])
    return found


def _signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _become_subreaper() -> None:
    """Inherit orphans even when not pid 1 (for example below a runtime's own init)."""
    if os.getpid() != 1 and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        say("cannot become a subreaper: orphans go to another process")


def main(command: Sequence[str]) -> int:
    """Set up and run. Returns the exit code; 2 for a container that cannot start as it was asked to."""
    try:
        plan = container_setup.prepare(os.environ)
    except container_setup.SetupError as exc:
        say(str(exc))
        return EXIT_USAGE
    for note in plan.notes:
        say(note)
    return Init(command, plan).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["vllm-bootstrap", "serve"]))
