"""Who a process is, as far as this host shows it. Blocking reads of /proc and of the user database.

Invariant: a process id that came from the driver is given a name only where it means the same thing here as there.
"""

from __future__ import annotations

import contextlib
import pwd
from pathlib import Path

PROC = Path("/proc")
# The inode of the first pid namespace is a constant of the kernel (PROC_PID_INIT_INO).
INITIAL_NAMESPACE = "pid:[4026531836]"
NAME_MAX = 64


def pids_trusted(proc: Path = PROC) -> bool:
    """Whether process ids from the driver are ours: only in the machine's first pid namespace. In doubt, no."""
    try:
        return str((proc / "self/ns/pid").readlink()) == INITIAL_NAMESPACE
    except OSError:
        return False


def describe_process(pid: int, proc: Path = PROC) -> tuple[str | None, str | None]:
    """(user, name) of a process, None for what cannot be seen.

    The name is what the process calls itself or its program, never its arguments: those may hold secrets.
    """
    folder = proc / str(pid)
    user: str | None = None
    name: str | None = None
    with contextlib.suppress(OSError):
        user = _user_name(folder.stat().st_uid)
    with contextlib.suppress(OSError):
        title = (folder / "cmdline").read_bytes().split(b"\0", 1)[0] or (folder / "comm").read_bytes()
        text = title.decode(errors="replace").strip()
        # A title set by the process itself is one string with blanks; a path is shortened to the program.
        first = text.split(" ", 1)[0] if text.startswith("/") else text
        name = "".join(c if c.isprintable() else "?" for c in first.rsplit("/", 1)[-1])[:NAME_MAX] or None
    return user, name


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
