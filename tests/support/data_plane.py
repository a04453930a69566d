"""The data plane on its own: our protocol on a real port, real guard and gate, hand-made engines behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
import uvloop
from uvicorn.server import ServerState

from tests.support.aio import eventually
from vllm_bootstrap.auth.guard import Guard
from vllm_bootstrap.auth.keyfile import digest
from vllm_bootstrap.auth.keys import Key, KeyRing
from vllm_bootstrap.auth.scopes import ADMIN, ALL, INFERENCE, MONITOR
from vllm_bootstrap.auth.sessions import Sessions
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.gateway import Gateway, GatewayLimits, RequestRecord, make_protocol
from vllm_bootstrap.gateway.targets import BY_MODEL
from vllm_bootstrap.scheduler.gate import Gate
from vllm_bootstrap.scheduler.ports import Prospects
from vllm_bootstrap.serving import Advert, Endpoint, EngineRoute, Instance

T = TypeVar("T")
LAUNCH = "l00000000000000000001"
ROUTES = (
    *BY_MODEL.values(),
    EngineRoute("GET", "/health", INFERENCE),
    EngineRoute("HEAD", "/health", INFERENCE),
    EngineRoute("GET", "/v1/models", INFERENCE),
    EngineRoute("GET", "/metrics", frozenset({MONITOR})),
    EngineRoute("POST", "/tokenize", INFERENCE),
    EngineRoute("POST", "/v1/load_lora_adapter", frozenset({ADMIN})),
)
KEYS = {
    "sk-admin": Principal("admin", ALL),
    "sk-realtime": Principal("rt", frozenset({"realtime"})),
    "sk-batch": Principal("bulk", frozenset({"batch"})),
    "sk-monitor": Principal("watcher", frozenset({"monitor"})),
    "sk-narrow": Principal("narrow", frozenset({"realtime"}), models=("other*",)),
    "sk-one": Principal("one", frozenset({"realtime"}), max_parallel=1),
    "sk-slow": Principal("slow", frozenset({"realtime"}), requests_per_minute=2),
    "sk-small": Principal("small", frozenset({"realtime"}), max_sequences=4),
}


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run on the loop the daemon uses, for a minute at most (a stuck uvloop does not hear pytest's own alarm)."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 60))


def instance(endpoint: Endpoint, launch_id: str = LAUNCH, **fields: Any) -> Instance:
    base: dict[str, Any] = {
        "launch_id": launch_id, "group_id": launch_id, "engine": "raw", "base_model": "org/model",
        "served_names": ("model",), "endpoint": endpoint, "slots": 1000, "routes": ROUTES, "priority_header": True,
    }  # fmt: skip
    return Instance(**{**base, **fields})


def advert(of: Instance | None = None, *, launch_id: str = LAUNCH, state: str = "ready", **fields: Any) -> Advert:
    if of is not None:
        return Advert(of.launch_id, of.group_id, of.base_model, of.served_names, state, of, **fields)
    return Advert(launch_id, launch_id, "org/model", ("model",), state, None, **fields)


async def echo_app(scope: Any, receive: Any, send: Any) -> None:
    """Stands for the control plane: tells what it was asked."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    told = {"path": scope["path"], "method": scope["method"], "size": len(body), "control": True}
    content = json.dumps(told).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content if scope["method"] != "HEAD" else b""})


@dataclass
class Plane:
    port: int
    gateway: Gateway
    gate: Gate
    records: list[RequestRecord] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)

    def announce(self, *instances: Instance) -> None:
        for one in instances:
            self.gate.update(advert(one))

    async def connect(self, tls: ssl.SSLContext | None = None) -> Wire:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=tls)
        self.wires.append(Wire(reader, writer))
        return self.wires[-1]

    def wire(self) -> AbstractAsyncContextManager[Wire]:
        return wire_to(("127.0.0.1", self.port))

    async def ask(self, *args: Any, **kwargs: Any) -> Reply:
        """One request on a connection of its own."""
        return await ask_on(self.wire(), *args, **kwargs)

    def in_use(self) -> int:
        """Slots taken on all launches."""
        return sum(sum(self.gate.load(one.launch_id).in_flight.values()) for one in self.gate.adverts())

    def queued(self) -> int:
        return sum(sum(report.queued.values()) for report in self.gate.queues().values())


@dataclass
class Reply:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    raw_head: bytes

    def header(self, name: str) -> str | None:
        return next((value.decode() for key, value in self.headers if key == name.encode()), None)

    def all(self, name: str) -> list[str]:
        return [value.decode() for key, value in self.headers if key == name.encode()]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


@dataclass
class Wire:
    """A raw client connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        raw = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        lines = raw.split(b"\r\n")[:-2]
        pairs = [line.partition(b":") for line in lines[1:]]
        return int(lines[0].split()[1]), [(k.lower(), v.strip()) for k, _, v in pairs], raw

    async def reply(self, *, head_only: bool = False) -> Reply:
        """One whole answer."""
        status, headers, raw = await self.head()
        if status == 100:
            status, headers, raw = await self.head()
        fields = dict(headers)
        if head_only or status in (204, 304):
            return Reply(status, headers, b"", raw)
        if b"content-length" in fields:
            body = await asyncio.wait_for(self.reader.readexactly(int(fields[b"content-length"])), 30)
        elif fields.get(b"transfer-encoding") == b"chunked":
            body = b"".join([piece async for piece in self.chunks()])
        else:
            body = await asyncio.wait_for(self.reader.read(), 10)
        return Reply(status, headers, body, raw)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Chunks until the last; raises ``IncompleteReadError`` when the connection breaks first."""
        while True:
            line = await asyncio.wait_for(self.reader.readuntil(b"\r\n"), 10)
            size = int(line, 16)
            data = await asyncio.wait_for(self.reader.readexactly(size + 2), 10)
            assert data.endswith(b"\r\n")
            if size == 0:
                return
            yield data[:-2]

    async def at_end(self, timeout: float = 10) -> bytes:
        """What still comes until the other side closes."""
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(), timeout)
        return b""

    def close(self) -> None:
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def wire_to(address: tuple[str, int], limit: int = 2**16) -> AsyncIterator[Wire]:
    """A connection that is cut at the end. ``limit``: bytes of the longest head or line that is read."""
    wire = Wire(*await asyncio.open_connection(*address, limit=limit))
    try:
        yield wire
    finally:
        wire.close()


async def ask_on(fresh: AbstractAsyncContextManager[Wire], *args: Any, **kwargs: Any) -> Reply:
    """One request (``request`` says of what) on a connection of its own."""
    async with fresh as wire:
        await wire.send(request(*args, **kwargs))
        return await wire.reply(head_only=bool(args) and args[0] == "HEAD")


def request(
    method: str = "POST",
    path: str = "/v1/completions",
    body: Any = None,
    *,
    key: str | None = "sk-realtime",
    headers: Iterable[tuple[str, str]] = (),
    raw_body: bytes | None = None,
) -> bytes:
    """A well-formed request. ``body`` None on POST: a minimal completion."""
    if raw_body is None and method == "POST":
        raw_body = json.dumps({"model": "model", "prompt": "x"} if body is None else body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    names = {name.lower() for name, _ in headers}
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    if raw_body is not None:
        if "content-type" not in names:
            lines.append("Content-Type: application/json")
        if "transfer-encoding" not in names and "content-length" not in names:
            lines.append(f"Content-Length: {len(raw_body)}")
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (raw_body or b"")


@contextlib.asynccontextmanager
async def running(
    tmp: Path,
    limits: GatewayLimits | None = None,
    *,
    keys: dict[str, Principal] | None = None,
    app: Any = echo_app,
    max_queued: int = 100,
    queue_timeout_s: float = 30,
    allowed_hosts: Iterable[str] = (),
    tls: ssl.SSLContext | None = None,
    listener: socket.socket | None = None,
    prospects: Prospects | None = None,
    hold_s: float = 30,
    **about_models: Any,
) -> AsyncIterator[Plane]:
    """Our protocol class on a port of its own, or behind ``listener``. ``about_models``: what the gateway asks about
    models."""
    table = KEYS if keys is None else keys
    ring = KeyRing([Key(digest(token), principal) for token, principal in table.items()])
    guard = Guard(ring, Sessions(ring, lifetime_s=60), open_access=not table, allowed_hosts=allowed_hosts)
    gate = Gate(
        max_queued=max_queued,
        queue_timeout_s=queue_timeout_s,
        ended=lambda one: one == "ended-before",
        prospects=prospects,
        hold_s=hold_s,
    )
    records: list[RequestRecord] = []
    gateway = Gateway(guard, gate, limits, spool_dir=tmp, on_record=records.append, **about_models)
    # What uvicorn's server does with the class, without its rounds of sleeping at the end.
    config = uvicorn.Config(app, http=make_protocol(gateway), ws="none", lifespan="off", log_config=None)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}),  # type: ignore[call-arg]
        host=None if listener else "127.0.0.1",
        port=None if listener else 0,
        sock=listener,
        backlog=2048,
        ssl=tls,
    )
    plane = Plane(server.sockets[0].getsockname()[1], gateway, gate, records)
    try:
        yield plane
    finally:
        for wire in plane.wires:
            wire.close()
        server.close()
        gateway.close()
        await eventually(lambda: not gateway.connections)
        await server.wait_closed()


def certificate(folder: Path) -> Path:
    """A fresh certificate for localhost and 127.0.0.1 with its key, in one file."""
    path, public = folder / "cert.pem", folder / "public.pem"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path, "-out", public, "-days", "2",
         "-subj", "/CN=localhost", "-addext", names],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_bytes(path.read_bytes() + public.read_bytes())
    return path
