"""Where this user's state and configuration lie by default: what daemon, commands and client must agree on.

Invariant: works on every platform and touches no file. Other settings are none of its business.
"""

from __future__ import annotations

import os
from pathlib import Path

NAME = "vllm-bootstrap"


def running_as_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def default_state_dir() -> Path:
    """Database, ids, generated key and announcement of the daemon that this user would start."""
    if running_as_root():
        return Path("/var/lib", NAME)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / NAME


def default_config_dir() -> Path:
    """Where the file ``env`` with settings is read from."""
    if running_as_root():
        return Path("/etc", NAME)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / NAME
