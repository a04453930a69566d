"""Finds the daemon and the key to it: what was said, else the environment, else what a local daemon left for us.

Invariant: the key that a local daemon generated is only ever sent to the address which that daemon announced. Reads
small local files and opens no connection.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_bootstrap.instance import ACCESS_KEY_FILE, ANNOUNCEMENT_FILE
from vllm_bootstrap.places import default_state_dir

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE, KEY_VARIABLE = "VLLM_BOOTSTRAP_URL", "VLLM_BOOTSTRAP_KEY"
STATE_DIR_VARIABLE = "VLLM_BOOTSTRAP_STATE_DIR"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to talk to. ``url`` has no trailing slash; ``key`` None: none is known."""

    url: str
    key: str | None = field(default=None, repr=False)

    @property
    def is_loopback(self) -> bool:
        """Whether the daemon is on this machine, where an HTTP proxy of the environment could not reach it."""
        return (urlsplit(self.url).hostname or "") in _LOOPBACK


def find(url: str | None = None, key: str | None = None, environ: Mapping[str, str] | None = None) -> Target:
    """The daemon to talk to. Arguments win over ``VLLM_BOOTSTRAP_URL``/``_KEY``, those over the local daemon's
    announcement; without any of them ``http://127.0.0.1:8000``. Raises ``ValueError`` for what is no usable URL."""
    env = os.environ if environ is None else environ
    state_dir = Path(env[STATE_DIR_VARIABLE]) if env.get(STATE_DIR_VARIABLE) else default_state_dir()
    local = announced(state_dir)
    chosen = clean_url(url or env.get(URL_VARIABLE) or local or DEFAULT_URL)
    known = key or env.get(KEY_VARIABLE)
    if not known and local and _address(chosen) == _address(local):
        known = _generated_key(state_dir)
    return Target(chosen, known or None)


def clean_url(text: str) -> str:
    """``text`` as an absolute URL without a trailing slash; ``host:port`` alone means http. Raises ``ValueError``."""
    url = (text if "://" in text else f"http://{text}").strip().rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{text!r} is not the address of a daemon: write it as http://HOST:PORT")
    if parts.username is not None:
        raise ValueError(f"give the key in {KEY_VARIABLE}, not inside the URL")
    _ = parts.port  # raises ValueError when it is out of range
    return url


def _address(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname in _LOOPBACK else parts.hostname or ""
    return parts.scheme, host, parts.port or (443 if parts.scheme == "https" else 80)


def announced(state_dir: Path) -> str | None:
    """The URL of the daemon that lives in ``state_dir``. A daemon that was killed could not take its announcement
    back, and its port may be a stranger's by now: such a one does not count."""
    try:
        facts: Any = json.loads((state_dir / ANNOUNCEMENT_FILE).read_text(encoding="utf-8"))
        return clean_url(str(facts["url"])) if _is_alive(int(facts["pid"])) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would end the process there, and no daemon runs there anyway
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _generated_key(state_dir: Path) -> str | None:
    try:
        return (state_dir / ACCESS_KEY_FILE).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
