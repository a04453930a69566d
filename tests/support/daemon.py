"""A whole daemon as a subprocess, on a port of its own choice and in folders of its own, for acceptance tests.

Invariant: it is used from outside only (HTTP, signals, files that users see); what it leaves behind is looked for with
the kernel's eyes, never by asking it. Everything lies below one short temp folder.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from tests.support import leftovers, orphans
from tests.support.waiting import wait_for
from vllm_bootstrap.client import Client

SERVE = (sys.executable, "-m", "vllm_bootstrap", "serve")
PREFIX = "VLLM_BOOTSTRAP_"
ENDED = ("stopped", "failed")
# In tests the form of the data plane that is tested (see ``conftest``); elsewhere whatever is at hand.
FORM: dict[str, Any] = {}
KILL_ROUNDS = 20
# Short times, so that what takes its time in production does not in tests.
QUICK = {
    "devices": "mock:2",
    "probe_interval_s": "0.2",
    "probe_timeout_s": "2",
    "stop_grace_s": "3",
    "restart_backoff_s": "0.2",
    "gpu_settle_timeout_s": "3",
}


class Answer:
    """Header names in lower case; of repeated headers the last."""

    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers}
        self.body = body

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object; fails when the answer holds none."""
        found: dict[str, Any] = self.json()["error"]
        return found


class DaemonProcess:
    """``settings`` are the daemon's, by field name (``access_key="k"``); ``env`` is added as it is.

    Used as a context manager it is started, and at the end stopped and cleared away with everything it started.
    ``key`` is sent with each request, by default the access key when one is set.
    """

    def __init__(
        self,
        *,
        env: dict[str, str] | None = None,
        command: Sequence[str] = SERVE,
        key: str | None = None,
        **settings: Any,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="d"))
        self.state_dir, self.runtime_dir = self.root / "s", self.root / "r"
        self.lock_dir, self.log_file = self.root / "l", self.root / "daemon.log"
        self.key = key if key is not None else settings.get("access_key")
        self.process: subprocess.Popen[bytes] | None = None
        self._command = list(command)
        self._launched: list[str] = []
        self._env = {**self._environment(settings), **(env or {})}

    def _environment(self, settings: dict[str, Any]) -> dict[str, str]:
        kept = ("PATH", "TMPDIR", "LANG")
        env = {k: v for k, v in os.environ.items() if k in kept or k.startswith("COV")}
        own = {
            **QUICK,
            "host": "127.0.0.1",
            "port": "0",
            "state_dir": self.state_dir,
            "runtime_dir": self.runtime_dir,
            "lock_dir": self.lock_dir,
            "hf_home": self.root / "hf",
            **FORM,
            **settings,
        }
        given = {PREFIX + name.upper(): str(value) for name, value in own.items() if value is not None}
        return {**env, "HOME": str(self.root), **given}

    def configure(self, **settings: Any) -> None:
        """Settings for the next start, for example files below ``root``."""
        self._env |= {PREFIX + name.upper(): str(value) for name, value in settings.items()}

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- its life ------------------------------------------------------------------------------------------------

    def start(self, timeout_s: float = 20.0) -> Self:
        """Start it and wait until it listens. Its output goes on in the same file after a restart."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._env, cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(self._is_up, timeout_s, what="start of the daemon")
        return self

    def _is_up(self) -> bool:
        process = self._process
        assert process.poll() is None, f"the daemon ended with {process.returncode}:\n{self.log}"
        try:
            announced = json.loads((self.state_dir / "daemon.json").read_text())
        except (FileNotFoundError, ValueError):
            return False
        self.url = str(announced["url"])
        return bool(announced["pid"] == process.pid)

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, "the daemon was not started"
        return self.process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    @property
    def state_id(self) -> str:
        return str(json.loads((self.state_dir / "instance.json").read_text())["state_id"])

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Ask it to stop and wait. Returns the exit code."""
        self.send_signal(number)
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL the daemon, and only it."""
        self._process.kill()
        self._process.wait(10)

    def restart(self) -> Self:
        """Kill it and start it again on the same folders; the port changes."""
        self.kill()
        return self.start()

    def close(self) -> None:
        """End the daemon and everything of it, whatever state they are in, and remove its folder."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        # Killing one may bring forth another (a shim that was just about to start its engine): until none is left.
        for _ in range(KILL_ROUNDS):
            leftovers.kill(leftovers.processes_referring_to(self.root))
            if not leftovers.wait_until_none(self.root, 0.5):
                break
        if self.process is not None:
            self.process.wait(10)
        for group in orphans.cgroups(*self._launched):  # of launches that were killed just now
            with contextlib.suppress(OSError):
                group.rmdir()
        shutil.rmtree(self.root, ignore_errors=True)

    # -- talking to it -------------------------------------------------------------------------------------------

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def client(self, key: str | None = None, **options: Any) -> Client:
        """Our own SDK's client for it."""
        return Client(self.url, key if key is not None else self.key, **options)

    def connection(self, timeout_s: float = 15.0) -> http.client.HTTPConnection:
        host, port = self.address
        return http.client.HTTPConnection(host, port, timeout=timeout_s)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        key: str | None = None,
        timeout_s: float = 15.0,
    ) -> Answer:
        """One request on a connection of its own. A body that is not bytes is sent as JSON; ``key`` "" sends none."""
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        used = self.key if key is None else key
        all_headers = {
            **({"content-type": "application/json"} if sent is not None else {}),
            **({"authorization": f"Bearer {used}"} if used else {}),
            **(headers or {}),
        }
        connection = self.connection(timeout_s)
        try:
            connection.request(method, path, sent, all_headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()

    def raw(self, data: bytes, timeout_s: float = 10.0) -> bytes:
        """Send bytes as they are; everything that comes back until the daemon closes or is silent for the time."""
        with socket.create_connection(self.address, timeout_s) as sock:
            sock.sendall(data)
            received = b""
            with contextlib.suppress(TimeoutError):
                while piece := sock.recv(65536):
                    received += piece
            return received

    # -- launches ------------------------------------------------------------------------------------------------

    def launch(self, model: str = "sim", *, knobs: dict[str, Any] | None = None, **fields: Any) -> str:
        """Launch and return the id. ``knobs`` are the simulator's. Takes one GPU unless ``fields`` say otherwise."""
        wish = {"model": model, "engine": "simulator", "extra_args": knobs or {}, **fields}
        if not {"gpu_count", "gpu_ids"} & fields.keys():
            wish["gpu_count"] = 1
        answer = self.request("POST", "/launch", wish)
        assert answer.status == 201, answer.body.decode(errors="replace")
        self._launched.append(str(answer.json()["launch_id"]))
        return self._launched[-1]

    def status(self, launch_id: str) -> dict[str, Any]:
        answer = self.request("GET", f"/status/{launch_id}")
        assert answer.status == 200, answer.body.decode(errors="replace")
        found: dict[str, Any] = answer.json()
        return found

    def wait_state(self, launch_id: str, *states: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """Wait until the launch is in one of ``states``; its status. Fails early when it ends in another one."""

        def arrived() -> dict[str, Any] | None:
            found = self.status(launch_id)
            if found["state"] in states:
                return found
            assert found["state"] not in ENDED, f"ended as {found['state']}: {found['failure']}"
            return None

        return wait_for(arrived, timeout_s, 0.05, f"{launch_id} {states}") or {}

    def ready(self, model: str = "sim", **fields: Any) -> dict[str, Any]:
        """Launch, wait until it is ready; its status."""
        return self.wait_state(self.launch(model, **fields), "ready")

    def stop_launch(self, launch_id: str, **query: str) -> Answer:
        suffix = "?" + "&".join(f"{k}={v}" for k, v in query.items()) if query else ""
        return self.request("POST", f"/stop/{launch_id}{suffix}", {}, timeout_s=60)

    def engine_log(self, launch_id: str) -> str:
        return str(self.request("GET", f"/logs/{launch_id}?offset=0&limit=1000000").json()["content"])

    # -- what is left --------------------------------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """A sentence for each thing that should not be there once all launches have ended: processes (other than the
        daemon), files and sockets of launches, held GPU locks, control groups."""
        living = self.process.pid if self.process is not None and self.process.poll() is None else None
        found = [
            f"process {left.pid} ({left.because}): {left.command}"
            for left in leftovers.processes_referring_to(self.root)
            if left.pid != living
        ]
        if (self.state_dir / "instance.json").exists():
            found += [f"process {pid} bears the mark" for pid in orphans.marked(self.state_id) if pid != living]
        found += [f"control group {path}" for path in orphans.cgroups(*self._launched)]
        found += [f"lock {name} is held" for name in orphans.locked(self.lock_dir)]
        found += [f"{path} is left" for path in sorted(self.runtime_dir.rglob("*")) if not path.is_dir()]
        return found

    def assert_no_leftovers(self, timeout_s: float = 10.0) -> None:
        """Fail unless nothing is left within the time."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.leftovers(), timeout_s, 0.1)
        assert self.leftovers() == []
