"""Starts the engine's main process. Standard library only.

Invariant: the engine gets nothing of the shim but what its order names: default signals, no descriptors but 0
(``/dev/null``) and 1, 2 (the log pipe), the environment of the order, its own process group, and SIGKILL from the
kernel when the shim dies. It runs as the user the order names before any of its own code does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import resource
import select
import signal
from collections import namedtuple

from . import procfs, syscalls
from .order import Order, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .cgroup import Leaf

EXEC_WAIT_S = 10.0
PIPE_BYTES = 1024 * 1024
F_SETPIPE_SZ = 1031


Inherited = namedtuple("Inherited", "umask core_limit")  # noqa: PYI024 - what the shim changed for itself only


class Started:
    """A running main process; ``output`` is the reading end of its stdout and stderr (not blocking)."""

    def __init__(self, pid: int, start_ticks: int, output: int) -> None:
        self.pid, self.start_ticks, self.output = pid, start_ticks, output


def prepare_directories(order: Order, run_dir: str) -> None:
    """Make the private TMPDIR, and let the engine's user through to it. Raises ``OSError``."""
    os.makedirs(order.tmp_dir, mode=0o700, exist_ok=True)
    os.chmod(order.tmp_dir, 0o700)
    if order.uid is None or order.uid == os.geteuid():
        return
    os.chown(order.tmp_dir, order.uid, -1 if order.gid is None else order.gid)
    # Passable, not readable; the control directory inside stays 0700.
    for directory in (run_dir, os.path.dirname(run_dir)):
        mode = os.stat(directory).st_mode & 0o777
        if not mode & 0o001:
            os.chmod(directory, mode | 0o111)  # noqa: S103 - passable is the point


def start(order: Order, marker: tuple[str, str], leaf: Leaf | None, inherited: Inherited) -> Started:
    """Fork and execute. Returns when the new program runs; blocks up to ten seconds. Raises ``Refused``."""
    env = {**order.env, "TMPDIR": order.tmp_dir, marker[0]: marker[1]}
    # Without this, setproctitle writes process titles over the initial environment and the marker with it.
    env["SPT_NOENV"] = "1"
    groups = _groups(order)
    output, log_end = os.pipe2(os.O_CLOEXEC)
    trouble, trouble_end = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # larger than the default where the user's quota of pipe memory allows
        fcntl.fcntl(log_end, F_SETPIPE_SZ, PIPE_BYTES)
    shim_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become_engine(order, env, groups, leaf, inherited, shim_pid, log_end, trouble_end)
    os.close(log_end)
    os.close(trouble_end)
    os.set_blocking(output, False)
    failure = _wait_for_exec(trouble)
    found = procfs.stat(pid)
    if failure is not None or found is None:
        os.close(output)
        os.kill(pid, signal.SIGKILL)  # our own child and not yet reaped: the pid is its
        os.waitpid(pid, 0)
        raise Refused("spawn_failed", failure or "the engine's process vanished")
    return Started(pid, found.start_ticks, output)


def _groups(order: Order) -> list[int] | None:
    if order.uid is None or order.uid == os.geteuid():
        return None
    gid = order.gid
    try:
        entry = pwd.getpwuid(order.uid)
    except KeyError:
        return [gid] if gid is not None else []
    return os.getgrouplist(entry.pw_name, entry.pw_gid if gid is None else gid)


def _wait_for_exec(trouble: int) -> str | None:
    """None when the pipe closed by itself, which is what a successful exec does to it."""
    try:
        if not select.select([trouble], [], [], EXEC_WAIT_S)[0]:
            return f"the engine's program did not start within {EXEC_WAIT_S:g} s"
        data = os.read(trouble, 4096)
        return str(json.loads(data)) if data else None
    finally:
        os.close(trouble)


def _become_engine(
    order: Order,
    env: dict[str, str],
    groups: list[int] | None,
    leaf: Leaf | None,
    inherited: Inherited,
    shim_pid: int,
    log_end: int,
    trouble_end: int,
) -> NoReturn:
    step = "signals"
    try:
        _default_signals()
        os.setpgid(0, 0)
        if leaf is not None:
            with contextlib.suppress(OSError):  # the shim looks whether it worked
                leaf.enter()
        step = "descriptors"
        _only_standard_descriptors(log_end, trouble_end)
        step = f"change of user to {order.uid}"
        _change_user(order, groups)
        step = "death signal"
        # After the change of user, which clears it; then make sure that the shim had not died before.
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != shim_pid:
            os._exit(1)
        step = f"working directory {order.cwd}"
        os.chdir(order.cwd)
        os.umask(inherited.umask)
        resource.setrlimit(resource.RLIMIT_CORE, inherited.core_limit)
        step = f"program {order.argv[0]}"
        os.execvpe(order.argv[0], order.argv, env)  # noqa: S606 - a list of arguments, no shell
    except BaseException as exc:  # noqa: BLE001 - whatever it is, the shim must hear of it and this copy must end
        text = exc.strerror if isinstance(exc, OSError) and exc.strerror else repr(exc)
        os.write(trouble_end, json.dumps(f"{step}: {text}").encode()[:4096])
    os._exit(127)


def _default_signals() -> None:
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(signum, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _only_standard_descriptors(log_end: int, trouble_end: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(log_end, 1)
    os.dup2(log_end, 2)
    procfs.close_descriptors(keep=(0, 1, 2, trouble_end))


def _change_user(order: Order, groups: list[int] | None) -> None:
    if groups is not None:
        os.setgroups(groups)
    if order.gid is not None:
        os.setgid(order.gid)
    if order.uid is not None:
        os.setuid(order.uid)
