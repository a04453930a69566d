"""What an attempt's engine is given to live in: private paths, an internal key, a loopback port where it needs one.

Invariant: the internal key of an attempt is derived from the state directory's secret, so that a restarted daemon
knows it again without it ever being stored; ports are never given to two living launches.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vllm_bootstrap.engines.base import EngineContext
from vllm_bootstrap.errors import NoFreePort
from vllm_bootstrap.launches.config import SupervisorConfig
from vllm_bootstrap.serving import Endpoint

LOOPBACK = "127.0.0.1"


class ContextMaker:
    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self._ports: dict[str, int] = {}

    def make(self, launch_id: str, attempt: int, run_dir: Path, *, needs_port: bool) -> EngineContext:
        """Paths and secrets of one attempt. Raises ``NoFreePort``."""
        tmp_dir = run_dir / "tmp"
        return EngineContext(
            launch_id=launch_id,
            attempt=attempt,
            run_dir=str(run_dir),
            tmp_dir=str(tmp_dir),
            uds_path=str(tmp_dir / "engine.sock"),
            internal_key=self.internal_key(launch_id, attempt),
            port=self._port(launch_id) if needs_port else None,
            host=LOOPBACK,
            base_env=self._config.base_env,
            hf_token=self._config.hf_token,
        )

    def internal_key(self, launch_id: str, attempt: int) -> str:
        message = f"engine key {launch_id}/{attempt}".encode()
        return hmac.new(self._config.instance_secret, message, hashlib.sha256).hexdigest()

    def restore_endpoint(self, launch_id: str, attempt: int, row: Mapping[str, object] | None) -> Endpoint | None:
        """The endpoint an earlier daemon stored, with its credential derived again."""
        if row is None:
            return None
        known = {k: v for k, v in row.items() if k in Endpoint.__dataclass_fields__}
        endpoint = Endpoint(**known)  # type: ignore[arg-type]  # written by us from an Endpoint
        if endpoint.host == LOOPBACK and endpoint.port is not None:
            self._ports[launch_id] = endpoint.port
        return replace(endpoint, credential=self.internal_key(launch_id, attempt))

    def release(self, launch_id: str) -> None:
        """Give a launch's port back. Idempotent."""
        self._ports.pop(launch_id, None)

    def _port(self, launch_id: str) -> int:
        first, last = self._config.port_range
        self._ports.pop(launch_id, None)
        taken = set(self._ports.values())
        for port in range(first, last + 1):
            if port not in taken and _can_bind(port):
                self._ports[launch_id] = port
                return port
        raise NoFreePort(
            f"No free port between {first} and {last} for this engine. Widen VLLM_LAUNCH_PORT_START/_END.",
            retry_after=30,
        )


def _can_bind(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
