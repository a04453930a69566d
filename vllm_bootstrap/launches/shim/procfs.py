"""Readings of ``/proc``: who lives, since when, below whom, with which marker. Standard library only.

Invariant: a process is named by pid **and** start time, and signalled only after both were compared while a pidfd
(where the kernel has it) keeps the pid from being given to somebody else. A zombie counts as dead.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterable

Stat = namedtuple("Stat", "state ppid session start_ticks")  # noqa: PYI024 - `typing` is too big for a shim
DEAD = ("Z", "X", "x")


def boot_id() -> str:
    """Identifies this boot of the machine. Raises ``OSError`` where there is no ``/proc``."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def stat(pid: int) -> Stat | None:
    """What the kernel says about a pid now, zombies included; None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            data = file.read()
    except OSError:
        return None
    # The name may hold spaces and brackets; everything after its last bracket is made of plain fields.
    fields = data[data.rfind(b")") + 2 :].split()
    if len(fields) < 20:
        return None
    return Stat(fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19]))


def is_alive(pid: int, start_ticks: int) -> bool:
    """Whether exactly that process runs (not a later one with the same pid, not a zombie)."""
    found = stat(pid)
    return found is not None and found.start_ticks == start_ticks and found.state not in DEAD


def all_processes() -> dict[int, Stat]:
    """Every process that can be seen, zombies included."""
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            found = stat(int(name))
            if found is not None:
                table[int(name)] = found
    return table


def descendants(roots: Iterable[int], table: dict[int, Stat]) -> set[int]:
    """Everything below ``roots``, without them."""
    children: dict[int, list[int]] = {}
    for pid, found in table.items():
        children.setdefault(found.ppid, []).append(pid)
    below: set[int] = set()
    waiting = list(roots)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in below:
                below.add(child)
                waiting.append(child)
    return below


def environ_value(pid: int, name: str) -> str | None:
    """A variable of a process's initial environment; None when unset or not ours to read."""
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            data = file.readall()
    except OSError:
        return None
    wanted = os.fsencode(name) + b"="
    for entry in data.split(b"\0"):
        if entry.startswith(wanted):
            return os.fsdecode(entry[len(wanted) :])
    return None


def close_descriptors(keep: Container[int]) -> None:
    """Close every descriptor of this process but those. By list, not by range: the limit may be a billion."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))


def open_pidfd(pid: int) -> int | None:
    """A pidfd, or None where kernel or sandbox has none. Raises ``ProcessLookupError``."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (AttributeError, OSError):
        return None


def send_signal(pid: int, start_ticks: int, signum: int) -> bool:
    """Signal exactly that process. False when it is gone, another one, or not ours to signal."""
    pidfd = None
    try:
        pidfd = open_pidfd(pid)
        if not is_alive(pid, start_ticks):
            return False
        if pidfd is None:
            os.kill(pid, signum)
        else:
            signal.pidfd_send_signal(pidfd, signum)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        if pidfd is not None:
            os.close(pidfd)
    return True
