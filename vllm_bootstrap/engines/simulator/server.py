"""The running server: connections, access check, routing, signals, draining, and the failures that knobs ask for.

Invariant: a request reaches a handler only with the internal key where vLLM would want it, and every error leaves in
vLLM's shape. The engine process's state is the batch's: stopped, it stands still; dead, all requests fail and the
server exits with 0, as vLLM does.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import traceback
import uuid
from collections.abc import Mapping

from vllm_bootstrap.engines.simulator import websocket
from vllm_bootstrap.engines.simulator.app import App
from vllm_bootstrap.engines.simulator.boot import location
from vllm_bootstrap.engines.simulator.formats import dumps, error_body
from vllm_bootstrap.engines.simulator.http import MAX_BODY_BYTES, Body, Exchange, HttpProtocol
from vllm_bootstrap.engines.simulator.knobs import Options
from vllm_bootstrap.engines.simulator.log import Log
from vllm_bootstrap.engines.simulator.mockgpu import Memory
from vllm_bootstrap.engines.simulator.requests import Refused, bare
from vllm_bootstrap.engines.simulator.routes import GUARDED, PATHS, REALTIME, ROUTES, Route
from vllm_bootstrap.engines.simulator.tree import EngineProcess
from vllm_bootstrap.engines.simulator.upload import Upload

BACKLOG = 2048
DRAIN_POLL_S = 0.02
# After the answer is out; vLLM's watchdog takes up to 5 s.
CRASH_DELAY_S, WATCHDOG_S = 0.05, 0.5
STOPPED = "engine process stopped"
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class Server:
    """What connections talk to. ``exit_code`` is done when the server is to end."""

    def __init__(
        self,
        options: Options,
        env: Mapping[str, str],
        loop: asyncio.AbstractEventLoop,
        core: EngineProcess,
        memory: Memory | None = None,
    ) -> None:
        self.app = App(options, env, clock=loop.time, call_later=loop.call_later, memory=memory)
        self.app.on_answered, self.app.on_poison = self._answered, core.kill
        self.connections: set[HttpProtocol] = set()
        self.websockets: set[websocket.WebSocket] = set()
        self.keep_alive_timeout = options.keep_alive_timeout
        self.exit_code: asyncio.Future[int] = loop.create_future()
        self._options = options
        self._loop = loop
        self._core = core
        self._log = Log("APIServer", os.getpid())

    # for connections

    def protocol(self) -> HttpProtocol:
        return HttpProtocol(self, self._loop)

    def open_body(self, exchange: Exchange) -> Body | None:
        route = ROUTES.get((exchange.method, exchange.path))
        kind = exchange.header(b"content-type") or b""
        if route is not None and route.multipart and kind.lower().startswith(b"multipart/form-data"):
            return Upload(kind)
        return None

    def dispatch(self, exchange: Exchange) -> None:
        app = self.app
        try:
            app.record(exchange)
            if not self._authorised(exchange):
                exchange.respond(401, dumps({"error": "Unauthorized"}))
                return
            self._find(exchange).handler(app, exchange)
        except Refused as exc:
            exchange.respond(exc.status, exc.body)
        except Exception as exc:  # noqa: BLE001 - a bug must answer 500 and be seen, not break the connection
            self._log.raw("".join(traceback.format_exception(exc)))
            exchange.respond(500, error_body(500, str(exc), "InternalServerError"))

    def upgrade(self, exchange: Exchange, transport: asyncio.Transport, rest: bytes) -> bool:
        """Turn the connection into a websocket, or answer why not. True when it was taken over."""
        key = exchange.header(b"sec-websocket-key")
        exchange.keep_alive = False
        if not self._authorised(exchange):
            exchange.respond(401, dumps({"error": "Unauthorized"}))
        elif exchange.path != REALTIME or exchange.method != "GET" or "realtime" not in self.app.tasks:
            exchange.respond(404, bare(404).body)
        elif key is None or exchange.header(b"sec-websocket-version") != b"13":
            exchange.respond(400, bare(400).body)
        else:
            self.app.record(exchange)
            self._open_websocket(exchange, transport, rest, key)
            return True
        return False

    def close_all(self) -> None:
        for protocol in [*self.connections]:
            protocol.close()
        for peer in [*self.websockets]:
            peer.close(websocket.GOING_AWAY)

    def _open_websocket(self, exchange: Exchange, transport: asyncio.Transport, rest: bytes, key: bytes) -> None:
        offered = [part.strip() for part in (exchange.header(b"sec-websocket-protocol") or b"").split(b",")]
        peer = websocket.WebSocket(transport, self._websocket_closed)
        self.websockets.add(peer)
        self.app.metrics.websockets += 1
        transport.set_protocol(peer)
        transport.write(websocket.handshake(key, b"realtime" if b"realtime" in offered else None))
        peer.greet(f"sess-{uuid.uuid4().hex}")
        if rest:
            peer.data_received(rest)

    def _websocket_closed(self, peer: websocket.WebSocket) -> None:
        self.websockets.discard(peer)
        self.app.metrics.websockets -= 1

    def _authorised(self, exchange: Exchange) -> bool:
        app = self.app
        if app.key is None or exchange.method == "OPTIONS" or not exchange.path.startswith(GUARDED):
            return True
        scheme, _, token = (exchange.header(b"authorization") or b"").partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(token, app.key.encode())

    def _find(self, exchange: Exchange) -> Route:
        route = ROUTES.get((exchange.method, exchange.path))
        if route is None:
            raise bare(405 if exchange.path in PATHS else 404)
        if route.task is not None:
            if route.task not in self.app.tasks:
                raise bare(404)
            if self.app.draining:
                raise Refused(503, "the server is shutting down", "ServiceUnavailableError")
            if self.app.batch.dead:
                raise Refused(500, self.app.batch.dead, "InternalServerError")
        if exchange.size > MAX_BODY_BYTES and exchange.upload is None:
            raise Refused(413, f"more than {MAX_BODY_BYTES} bytes", "RequestEntityTooLarge")
        return route

    # failures on purpose

    def _answered(self, count: int) -> None:
        if count == self._options.crash_after_requests:
            self._loop.call_later(CRASH_DELAY_S, self._crash)
        if count == self._options.exit_zero_after:
            self._loop.call_later(CRASH_DELAY_S, self._core.kill)

    def _crash(self) -> None:
        self._log.fail("api_server.py:1", "Fatal error on purpose: crash_after_requests")
        os._exit(1)

    # signals

    def core_changed(self) -> None:
        """Follow what happened to the engine process."""
        for change in self._core.changes():
            if change == "stopped":
                self.app.batch.freeze(STOPPED)
            elif change == "continued":
                self.app.batch.thaw(STOPPED)
            elif not self.exit_code.done():
                self._log.fail(
                    "core_client.py:782", "Engine core proc EngineCore died unexpectedly, shutting down client."
                )
                self.app.batch.fail(DEAD)
                self._loop.call_later(WATCHDOG_S, self._end, 0)

    def stop_requested(self) -> None:
        if self._options.ignore_sigterm:
            self._log.warn("launcher.py:254", "signal ignored on purpose: ignore_sigterm")
        elif not self.app.draining:
            self.app.draining = True
            self._log.say("launcher.py:254", "[shutdown] API server: shutdown triggered")
            self._drain(self._loop.time() + self._options.shutdown_timeout)

    def _drain(self, deadline: float) -> None:
        batch = self.app.batch
        if batch.busy and self._loop.time() < deadline:
            self._loop.call_later(DRAIN_POLL_S, self._drain, deadline)
        else:
            self._end(0)

    def _end(self, code: int) -> None:
        if not self.exit_code.done():
            self.exit_code.set_result(code)


async def serve(
    options: Options, env: Mapping[str, str], sock: socket.socket, core: EngineProcess, memory: Memory | None = None
) -> int:
    """Serve on a bound socket until stopped by a signal or by the engine's death. Returns the exit code."""
    loop = asyncio.get_running_loop()
    server = Server(options, env, loop, core, memory)
    log = Log("APIServer", os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop_requested)
    # Not add_signal_handler: uvloop keeps SIGCHLD to itself, but leaves Python's own handler alone.
    signal.signal(signal.SIGCHLD, lambda *_: loop.call_soon_threadsafe(server.core_changed))
    server.core_changed()
    log.say("entry.py:136", f"Supported tasks: {tuple(sorted(server.app.tasks))}")
    log.say("entry.py:140", f"Starting vLLM server on {location(options, sock)}")
    for method, path in ROUTES:
        log.say("launcher.py:195", f"Route: {path}, Methods: {method}")
    create = loop.create_unix_server if options.uds else loop.create_server
    listener = await create(server.protocol, sock=sock, backlog=BACKLOG)
    log.raw("INFO:     Application startup complete.")
    code = await server.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)  # a second signal must not break off the end
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener.close()
    server.close_all()
    await asyncio.sleep(0)  # lets the last writes go out
    log.say("launcher.py:290", "[shutdown] API server: shutting down FastAPI HTTP server")
    return code
