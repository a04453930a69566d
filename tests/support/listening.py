"""Serves an ASGI application on a port of its own, in a thread, so that real clients can be pointed at it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import uvicorn

from tests.support import control_plane
from tests.support.control_plane import FakeLaunches, launch_id
from tests.support.waiting import wait_for
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.api.services import Services
from vllm_bootstrap.launches.logs import LogReader
from vllm_bootstrap.launches.shim.logwriter import segment_name


class Listening:
    """A context manager. ``port`` 0 takes a free one; ``stop`` and ``start`` again stand for a restart."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.port = 0

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app, log_config=None, lifespan="off", ws="none", access_log=False, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started, 10)
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class StubDaemon(Listening):
    """The real control plane over made-up launches (``launches``). ``on_request`` sees each ASGI scope first."""

    def __init__(self, folder: Path, services: Services | None = None) -> None:
        self.services = services or control_plane.make()
        self.folder = folder
        self.on_request: Callable[[dict[str, Any]], None] = lambda _scope: None
        inner = build_api(self.services)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            self.on_request(scope)
            await inner(scope, receive, send)

        super().__init__(app)

    @property
    def launches(self) -> FakeLaunches:
        found = self.services.supervisor
        assert isinstance(found, FakeLaunches)
        return found

    def write_log(self, text: str, number: int = 1, attempt: int = 1, start: int = 0) -> None:
        """Add to the log of a launch, in the segment that begins with byte ``start``."""
        folder = self.folder / f"{number}.{attempt}"
        folder.mkdir(exist_ok=True)
        with (folder / segment_name(start)).open("ab") as file:
            file.write(text.encode())
        self.launches.logs.setdefault((launch_id(number), attempt), LogReader(folder))
