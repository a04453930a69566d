"""What a daemon and a shim say to each other, and the names both use on disk. Standard library only.

Invariant: version 1 stays understood from the first release on (``tests/fixtures/shim_v1`` is a frozen shim that the
tests adopt). Whoever changes the meaning of a message raises ``PROTOCOL`` and keeps the earlier one in ``SUPPORTED``;
adding a field or an operation needs neither, because both sides ignore fields they do not know and a shim refuses an
unknown operation by name.

One JSON object a line, both ways. A request has ``id`` and ``op``; its answer has the same ``id`` and ``ok``, and when
refused ``kind`` (a word) and ``reason`` (a sentence).

=======  =====================================  ===================================================================
op       fields                                 answer
=======  =====================================  ===================================================================
hello    ``protocol``                           as status, with ``protocol``, ``launch_id``, ``attempt``, ``state_id``
                                                and ``identity``; from then on the connection gets events
status   none                                   ``phase``, ``engine``, ``main``, ``stop_requested``, ``forced``,
                                                ``log``, ``record``, ``locked`` (whether the GPUs' lock files are
                                                held; a shim that does not say it cannot give them up)
go       ``order``                              ``engine``; only on the inherited connection, only once
stop     ``grace_s``                            accepted; may be repeated, a later one never lengthens the grace
force    none                                   accepted; SIGKILL at once, also during a grace
unlock   none                                   accepted; the GPUs' lock files are given up, as the engine sleeps
lock     none                                   accepted; they are taken again; refused (``gpu_locked``) when another
                                                program has one, (``busy``) when it may be tried again in a moment
=======  =====================================  ===================================================================

Events: ``{"event": "main_exited", "exit_code", "signal"}`` and ``{"event": "ended", "record"}``.

Control directory (0700) ``<run_dir>/shim``: ``owner`` (the daemon's state id), ``identity.json`` (before "go"),
``engine.json`` (with it), ``exit.json`` (fsynced, last), ``control.sock`` (0600), ``errors.log``.
"""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False  # the module `typing` costs a shim half a megabyte
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PROTOCOL = 1
SUPPORTED = (1,)

MARKER = "VBS_LAUNCH"
CONTROL_DIR = "shim"
OWNER, IDENTITY, ENGINE, EXIT = "owner", "identity.json", "engine.json", "exit.json"
SOCKET, ERRORS = "control.sock", "errors.log"
MAX_LINE = 4 * 1024 * 1024
MAX_SOCKET_PATH = 107


class ProtocolError(Exception):
    """The other side sent something that is not this protocol; the connection is closed."""


def marker(state_id: str, launch_id: str, attempt: int) -> str:
    """The value by which every process of an attempt is recognised in ``/proc/*/environ``."""
    return f"{state_id}/{launch_id}/{attempt}"


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes | bytearray) -> dict[str, Any]:
    """One message. Raises ``ProtocolError``."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"not JSON: {exc}") from None
    if not isinstance(message, dict):
        raise ProtocolError("not a JSON object")
    return message


class LineBuffer:
    """Bytes in, messages out. Holds at most ``MAX_LINE`` bytes."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Messages completed by ``data``. Raises ``ProtocolError``."""
        self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise ProtocolError("line too long")
        return [decode(line) for line in lines]


def write_json(path: str, value: dict[str, Any], *, durable: bool = False) -> None:
    """Write or replace a file atomically; with ``durable`` it has reached the disk on return. Raises ``OSError``."""
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Cut after writing, not before: space reserved for this file must not be given back to a full disk.
        os.ftruncate(fd, os.write(fd, json.dumps(value).encode()))
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(path + ".new", path)
    if durable:
        sync_directory(os.path.dirname(path))


def reserve(path: str) -> None:
    """Set space aside, so that a later ``write_json`` of up to 4 KiB works on a full disk. Raises ``OSError``."""
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, b" " * 4096)
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    """Make renames in a directory durable. Raises ``OSError``."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: str) -> dict[str, Any] | None:
    """The object in a file; None when it is missing or torn."""
    try:
        with open(path, "rb") as file:
            return decode(file.read())
    except (OSError, ProtocolError):
        return None


def at_socket(control_dir: str, act: Callable[[str], None]) -> None:
    """Call ``act`` with an address for the control socket, whatever the length of its path.

    The real path where it fits, so that cleaners of temporary folders recognise a living socket in
    ``/proc/net/unix``; else one through a directory descriptor.
    """
    path = f"{control_dir}/{SOCKET}"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        act(path)
        return
    fd = os.open(control_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        act(f"/proc/self/fd/{fd}/{SOCKET}")
    finally:
        os.close(fd)
