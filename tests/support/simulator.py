"""A simulator as a process of its own on a Unix socket, for tests that need a real engine without the daemon.

Everything is found and ended by pid; what the engine left behind is ended by ``close``, and a test that expects
nothing to be left says so itself with ``tree()``.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from tests.support.orphans import is_dead
from tests.support.waiting import wait_for

MODULE = "vllm_bootstrap.engines.simulator"
JSON = {"content-type": "application/json"}


class UdsConnection(http.client.HTTPConnection):
    """http.client over a Unix socket."""

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.close()
            raise


class Reply:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def json(self) -> Any:
        return json.loads(self.body)


class Simulator:
    """``knobs`` as on the command line, with underscores; ``env`` is added to a small environment. ``stdout``: a
    descriptor that takes the output instead of the log file."""

    def __init__(
        self,
        *,
        env: dict[str, str] | None = None,
        ready: bool = True,
        model: str = "tiny",
        stdout: int | None = None,
        **knobs: Any,
    ) -> None:
        # Below the run's own short temp folder: paths of Unix sockets end after 107 bytes.
        self.dir = Path(tempfile.mkdtemp(prefix="s"))
        self.uds = str(self.dir / "e.sock")
        self.log_file = self.dir / "log"
        self._marker = f"SIMULATOR_TEST={self.dir}"
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR") or k.startswith("COV")}
        argv = [sys.executable, "-m", MODULE, f"--model={model}", f"--uds={self.uds}"]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*argv, *_arguments(knobs)],
                stdout=log if stdout is None else stdout,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**kept, "SIMULATOR_TEST": str(self.dir), **(env or {})},
            )
        if ready:
            self.wait_ready()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_ready(self, timeout: float = 15.0) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.log}")
            return "Application startup complete." in self.log

        wait_for(ready, timeout, what="start")

    def tree(self) -> dict[str, int]:
        """Every living process that this simulator started, by title: found by the environment, as an orphan is."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environ = (entry / "environ").read_bytes().split(b"\0")
                if self._marker.encode() in environ and not is_dead(int(entry.name)):
                    command = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                    title = "main" if len(command) > 1 else command[0].decode()
                    found[title] = int(entry.name)
        return found

    def wait_tree(self, *titles: str) -> dict[str, int]:
        """Wait until exactly these are alive."""
        wait_for(lambda: self.tree().keys() == set(titles), 10, what=f"tree {titles}")
        return self.tree()

    def connect(self, timeout: float = 10.0) -> UdsConnection:
        return UdsConnection(self.uds, timeout)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 10.0
    ) -> Reply:
        """One request on a connection of its own. A body that is not bytes is sent as JSON."""
        connection = self.connect(timeout)
        try:
            sent = body if body is None or isinstance(body, bytes) else json.dumps(body)
            connection.request(method, path, sent, {**(JSON if isinstance(sent, str) else {}), **(headers or {})})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def complete(self, prompt: str = "a b", **fields: Any) -> Reply:
        return self.request("POST", "/v1/completions", {"prompt": prompt, **fields})

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample of /metrics."""
        for line in self.request("GET", "/metrics").body.decode().splitlines():
            if line.startswith(f"vllm:{name}{{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no {name}")

    def stop(self, number: int = signal.SIGTERM, timeout: float = 10.0) -> int:
        """Signal the main process and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def close(self) -> None:
        """End everything, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3)
        for pid in self.tree().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        wait_for(lambda: not self.tree(), 10, what="end of the tree")


def _arguments(knobs: dict[str, Any]) -> list[str]:
    made = []
    for name, value in knobs.items():
        flag = name.replace("_", "-")
        made.append(f"--{flag}={value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}")
    return made
