"""The state directory and who this daemon is: its ids, its secret, its generated key, its announcement.

Invariant: everything in here is readable by the daemon's user only, written atomically, and made once. Deleting the
state directory makes another daemon of it; moving it does not.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

ACCESS_KEY_FILE = "access_key"
ANNOUNCEMENT_FILE = "daemon.json"
LOCK_FILE = "daemon.lock"


@dataclass(frozen=True, slots=True)
class Instance:
    """``state_id`` marks our processes and sockets; ``secret`` keys derived keys; ``boot_id`` is the kernel's."""

    state_dir: Path
    state_id: str
    secret: bytes = field(repr=False)
    boot_id: str = ""
    node_id: str = "local"


def private_dir(path: Path, mode: int = 0o700) -> Path:
    """Make a directory (and its parents) for us alone. Idempotent. Raises ``OSError``.

    One that is there already and open to others is closed only when it is empty or ours: it may be /tmp.
    """
    path.mkdir(parents=True, exist_ok=True, mode=mode)
    found = path.stat()
    # Passing through (x alone) shows nothing and may be on purpose: engines of another user live below runtime_dir.
    if found.st_uid != os.getuid() or not found.st_mode & 0o066 & ~mode:
        return path
    if any(path.iterdir()) and not (path / LOCK_FILE).exists():
        raise PermissionError(
            errno.EPERM,
            "Others may enter this folder and it is not empty. Choose one of the daemon's own, or close it (chmod 700)",
            str(path),
        )
    path.chmod(mode)
    return path


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically with one that only we can read, durable when this returns."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def open_instance(state_dir: Path) -> Instance:
    """Read or make the identity of a state directory. The caller holds the daemon lock."""
    private_dir(state_dir)
    path = state_dir / "instance.json"
    if not path.exists():
        made = {"state_id": secrets.token_hex(4), "secret": secrets.token_hex(32)}
        write_private(path, json.dumps(made))
    stored = json.loads(path.read_text())
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Instance(state_dir, stored["state_id"], bytes.fromhex(stored["secret"]), boot_id)


def generated_key(state_dir: Path) -> tuple[str, bool]:
    """The key made at first start on a public bind, and whether it was made just now."""
    path = state_dir / ACCESS_KEY_FILE
    if path.exists():
        return path.read_text().strip(), False
    key = f"vb-{secrets.token_urlsafe(32)}"
    write_private(path, key + "\n")
    return key, True


def announce(state_dir: Path, url: str) -> None:
    """Tell commands of the same user where the daemon listens. Removed by ``withdraw``. Raises ``OSError``."""
    withdraw(state_dir)  # what a killed daemon left is wrong by now, and on a full disk its room is needed
    facts = {"pid": os.getpid(), "url": url, "started_at": time.time()}
    write_private(state_dir / ANNOUNCEMENT_FILE, json.dumps(facts))


def withdraw(state_dir: Path) -> None:
    (state_dir / ANNOUNCEMENT_FILE).unlink(missing_ok=True)
