"""uvicorn's protocol, which makes its own part of a connection only when the app gets a request on it.

Most connections never have one: what uvicorn prepares for each (a parser, loggers, addresses asked of the kernel) is a
tenth of what a stream costs that comes on a connection of its own.

Invariant: before ``prepare_app`` none of uvicorn's code for requests runs, after it all of it as if the connection had
begun there; what is paused stays so. Must not know: requests, claims, deadlines.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState


class LateProtocol(HttpToolsProtocol):
    """``transport``, ``flow``, ``loop``, ``server_state`` and ``connections`` are there from the start; ``cycle`` and
    ``parser`` are None until ``prepare_app``."""

    cycle: RequestResponseCycle = None  # type: ignore[assignment] # as uvicorn itself begins
    parser: httptools.HttpRequestParser = None  # type: ignore[assignment]
    _has_app = False

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._for_app = (config, server_state, app_state)
        self.loop = _loop or asyncio.get_running_loop()
        self.server_state = server_state
        self.connections = server_state.connections

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.flow = FlowControl(transport)
        self.connections.add(self)

    def prepare_app(self) -> None:
        """The app gets a request. Idempotent. The app is told no address of a client that is gone already."""
        if self._has_app:
            return
        self._has_app = True
        transport, flow = self.transport, self.flow
        HttpToolsProtocol.__init__(self, *self._for_app, self.loop)
        HttpToolsProtocol.connection_made(self, transport)
        self.flow = flow

    def connection_lost(self, exc: Exception | None) -> None:
        if self._has_app:
            super().connection_lost(exc)
            return
        self.connections.discard(self)
        if exc is None:
            self.transport.close()
