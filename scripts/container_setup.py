"""What a container's start needs before the daemon runs: the user it runs as, folders this user may write to, sshd.

Standard library only, Linux. Used by container_init.py, which says every note and starts what is returned here.

Promises:
* Nothing of a volume but its top folder changes hands; what that leaves unusable is said, and how to mend it.
* sshd lets nobody in by password, has a host key of its own in each container, and nothing of the daemon's environment.
* A wish that cannot be met is an error (``SetupError``), not a note, unless it was only implied: ``PUBLIC_KEY``, which
  some providers set in every container.

It must not know anything about launches, engines or keys.
"""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import socket
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "VLLM_BOOTSTRAP_"
TRUE, FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
SSHD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEY_TYPES = ("ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-")
HOST_KEY = "ssh_host_ed25519_key"


class SetupError(Exception):
    """The container cannot start as it was asked to. The message is one sentence for the log."""


@dataclass(frozen=True)
class Identity:
    """Whom the daemon runs as."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass
class Plan:
    """``identity`` None: as who we are. ``sshd`` is a command, to be started as we are, with ``sshd_environment``."""

    identity: Identity | None = None
    environment: dict[str, str] = field(default_factory=dict)
    sshd: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def sshd_environment(self) -> dict[str, str]:
        return {"PATH": SSHD_PATH}


def prepare(environment: Mapping[str, str], root: Path = Path("/")) -> Plan:
    """Do all of it. ``root`` is where sshd's files lie. Raises ``SetupError``. Blocks while a key is made."""
    plan = Plan(identity(environment.get("DAEMON_USER", "")), dict(environment))
    if plan.identity is not None:
        plan.environment |= {"HOME": plan.identity.home, "USER": plan.identity.name, "LOGNAME": plan.identity.name}
        plan.notes += _give_folders(environment, plan.identity)
        plan.notes += _check_key_file(environment, plan.identity)
    plan.sshd, notes = _sshd(environment, root)
    plan.notes += notes
    return plan


def identity(name: str) -> Identity | None:
    """Raises ``SetupError``. None: stay who we are, because nobody is named, root is, or we may not change."""
    if os.geteuid() != 0 or name in {"", "root"}:
        return None
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise SetupError(f"DAEMON_USER: there is no user {name!r} in this container") from None
    return Identity(name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(name, entry.pw_gid)), entry.pw_dir)


# -- folders ---------------------------------------------------------------------------------------------------------


def _setting(environment: Mapping[str, str], name: str, established: str = "") -> str:
    return environment.get(PREFIX + name) or (environment.get(established, "") if established else "")


def _give_folders(environment: Mapping[str, str], who: Identity) -> list[str]:
    wanted = {
        _setting(environment, "STATE_DIR"): 0o700,
        _setting(environment, "RUNTIME_DIR"): 0o700,
        _setting(environment, "LOG_DIR"): 0o700,
        _setting(environment, "HF_HOME", "HF_HOME"): 0o755,
    }
    notes = [note for path, mode in wanted.items() if path for note in give(Path(path), who, mode)]
    locks = _setting(environment, "LOCK_DIR")
    return notes + (open_to_all(Path(locks)) if locks else [])


def give(path: Path, who: Identity, mode: int) -> list[str]:
    """Make ``path`` a folder of ``who``; never anything in it. Notes on what was done and what it leaves."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=mode)
        found = path.lstat()
        notes = []
        if not stat.S_ISDIR(found.st_mode):
            return [f"{path} is no folder: left as it is"]
        if found.st_uid != who.uid:
            os.chown(path, who.uid, who.gid, follow_symlinks=False)
            notes.append(f"gave {path} to {who.name} (it was uid {found.st_uid}'s): only the folder, not what is in it")
        with os.scandir(path) as entries:
            foreign = next((e.name for e in entries if e.stat(follow_symlinks=False).st_uid != who.uid), None)
    except OSError as exc:
        return [f"cannot give {path} to {who.name}: {exc.strerror}; it must be writable for uid {who.uid}"]
    if foreign is not None:
        notes.append(
            f"{path} holds files of others, {foreign!r} for one. If the daemon cannot use them: "
            f"docker exec -u root CONTAINER chown -R {who.uid}:{who.gid} {path}"
        )
    return notes


def open_to_all(path: Path) -> list[str]:
    """Make the lock folder, which daemons of several users may share, as they do it themselves."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if stat.S_IMODE(path.stat().st_mode) != 0o1777:
            path.chmod(0o1777)
    except OSError as exc:
        return [f"cannot open the lock folder {path} to all: {exc.strerror}"]
    return []


def _check_key_file(environment: Mapping[str, str], who: Identity) -> list[str]:
    path = _setting(environment, "AUTH_KEYS_FILE", "AUTH_KEYS_FILE")
    if not path or not Path(path).exists() or _may_read(path, who):
        return []
    advice = f"on the host give it to uid {who.uid}, or let it hold only token_sha256 and make it readable for all"
    return [f"AUTH_KEYS_FILE {path} cannot be read by {who.name}: {advice}"]


def _may_read(path: str, who: Identity) -> bool:
    asked = subprocess.run(["test", "-r", path], user=who.uid, group=who.gid, extra_groups=who.groups, check=False)
    return asked.returncode == 0


# -- sshd ------------------------------------------------------------------------------------------------------------


def _sshd(environment: Mapping[str, str], root: Path) -> tuple[list[str] | None, list[str]]:
    keys = environment.get("PUBLIC_KEY", "").strip()
    explicit = _switch(environment.get("ENABLE_SSHD", ""))
    if not (bool(keys) if explicit is None else explicit):
        return None, []
    try:
        return sshd_command(keys, _port(environment.get("SSH_PORT", "")), root)
    except SetupError as exc:
        if explicit:
            raise
        return None, [f"PUBLIC_KEY is set, but no sshd is started: {exc}"]


def _switch(text: str) -> bool | None:
    """None: not said. Raises ``SetupError``."""
    if text.lower() in TRUE | FALSE:
        return text.lower() in TRUE
    if text:
        raise SetupError(f"ENABLE_SSHD must be 0 or 1, not {text!r}")
    return None


def _port(text: str) -> int:
    if not text:
        return 22
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise SetupError(f"SSH_PORT must be a port, not {text!r}")
    return int(text)


def sshd_command(keys: str, port: int, root: Path) -> tuple[list[str], list[str]]:
    """Make what sshd needs below ``root``; its command and notes. ``keys`` are lines as in ``authorized_keys``.

    Raises ``SetupError``.
    """
    if os.geteuid() != 0:
        raise SetupError("sshd needs a container that is started as root")
    program = shutil.which("sshd", path=SSHD_PATH)
    if program is None:
        raise SetupError("this image has no sshd (it is built with --build-arg WITH_SSHD=true)")
    if _taken(port):
        raise SetupError(f"port {port} is in use already")
    authorized = root / "root/.ssh/authorized_keys"
    authorize(authorized, keys)
    fingerprint = host_key(root / "etc/ssh" / HOST_KEY)
    (root / "run/sshd").mkdir(parents=True, exist_ok=True, mode=0o755)
    options = {
        "Port": str(port),
        "HostKey": str(root / "etc/ssh" / HOST_KEY),
        "AuthorizedKeysFile": str(authorized),
        "AllowUsers": "root",
        "PermitRootLogin": "prohibit-password",
        "AuthenticationMethods": "publickey",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
    }
    # Its own configuration only: what the base image has in /etc/ssh may let passwords in.
    command = [program, "-D", "-e", "-f", "/dev/null"]
    command += [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    notes = [f"sshd on port {port}, by key only; its host key: {fingerprint}"]
    if not authorized.exists():
        notes.append(f"sshd lets nobody in yet: set PUBLIC_KEY, or mount {authorized}")
    return command, notes


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104  # nothing is served here: sshd listens on all addresses
        except OSError as exc:
            return exc.errno == errno.EADDRINUSE
    return False


def authorize(path: Path, keys: str) -> None:
    """Add the keys that are not there yet. Raises ``SetupError``, which never shows what it refuses."""
    wanted = [line.strip() for line in keys.splitlines() if line.strip() and not line.strip().startswith("#")]
    if not all(line.startswith(KEY_TYPES) for line in wanted):
        raise SetupError("PUBLIC_KEY must hold public keys as in the file id_ed25519.pub, one a line")
    if not wanted:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    present = path.read_text().splitlines() if path.exists() else []
    missing = [line for line in wanted if line not in present]
    if missing:
        path.write_text("".join(f"{line}\n" for line in [*present, *missing]))
    path.chmod(0o600)


def host_key(path: Path) -> str:
    """Make the host key unless it is there; its fingerprint. Raises ``SetupError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not path.exists():
            _keygen("-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path))
        return _keygen("-l", "-f", str(path)).strip()
    except (OSError, subprocess.SubprocessError) as exc:
        raise SetupError(f"no host key for sshd could be made in {path.parent}: {exc}") from exc


def _keygen(*arguments: str) -> str:
    found = subprocess.run(["ssh-keygen", *arguments], capture_output=True, text=True, check=True, timeout=60)
    return found.stdout
