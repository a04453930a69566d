"""The control plane on its own: the real application over stand-ins for launches, traffic and devices.

Invariant: requests go through the whole ASGI application, guard and envelope included; only what lies below
``Services`` is replaced.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.support.batch_desks import FakeBatches, FakeItems, FakeShelf
from tests.support.model_desk import FakeModels
from vllm_bootstrap.activity import Activity
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.api.services import Services
from vllm_bootstrap.auth.guard import Guard
from vllm_bootstrap.auth.keyfile import digest
from vllm_bootstrap.auth.keys import Key, KeyRing
from vllm_bootstrap.auth.scopes import ALL
from vllm_bootstrap.auth.sessions import Sessions
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.engines.base import Gpu
from vllm_bootstrap.errors import BadRequest, Conflict, NotFound
from vllm_bootstrap.gateway.inflight import Inflight, RequestInfo
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.readings import GpuReading, Snapshot
from vllm_bootstrap.launches import groups
from vllm_bootstrap.launches.types import (
    ClaimView,
    EventView,
    FailureView,
    GroupView,
    LaunchOrder,
    LaunchView,
    ProgressView,
    StopOutcome,
)
from vllm_bootstrap.metrics import Metrics
from vllm_bootstrap.scheduler.ports import BudgetReport
from vllm_bootstrap.serving import Advert, Endpoint, Instance, LoadReport
from vllm_bootstrap.settings import Settings

NOW = 1_800_000_000.0
SECRET_LINE = "a prompt in a log line"
GROUP_ID = f"g{0:020d}"


def launch_id(number: int) -> str:
    return f"l{number:020d}"


def view(number: int = 1, **fields: Any) -> LaunchView:
    base = LaunchView(
        launch_id=launch_id(number), group_id=launch_id(number), node_id="local", owner_id="root", state="ready",
        why=None, unresponsive=False, model="org/model", engine="simulator", served_model_name="model",
        claims=(ClaimView("GPU-0", 0, "Mock", 1.0),), labels={"team": "a"}, restart_policy="never", attempt=1,
        next_attempt_at=None, pid=10, shim_pid=9, created_at=NOW, changed_at=NOW + 1,
        transitions={"bootstrapping": NOW, "ready": NOW + 1}, progress=None, failure=None, capacity=4,
    )  # fmt: skip
    return replace(base, **fields)


def replica(number: int = 1, **fields: Any) -> LaunchView:
    """One of the launches of a group of two."""
    return view(number, **{"group_id": GROUP_ID, "group_size": 2, **fields})


def failed(number: int = 1) -> LaunchView:
    failure = FailureView(
        "bad_flag", "unknown flag", "remove it", permanent=True, exit_code=2, signal=None, lines=(SECRET_LINE,)
    )
    return view(number, state="failed", failure=failure, pid=None, claims=())


def loading(number: int = 1) -> LaunchView:
    progress = ProgressView("load", 0.5, "1/2", 3.0, 4.0, 10, 20)
    return view(number, state="bootstrapping", progress=progress)


def advert(of: LaunchView, *, routable: bool = True) -> Advert:
    instance = Instance(
        of.launch_id, of.group_id, of.engine, of.model, (of.served_model_name,), Endpoint(uds="/x"), 4, ()
    )
    return Advert(
        of.launch_id, of.group_id, of.model, (of.served_model_name,), of.state, instance if routable else None
    )


@dataclass
class FakeLaunches:
    views: dict[str, LaunchView] = field(default_factory=dict)
    rows: dict[str, list[EventView]] = field(default_factory=dict)
    logs: dict[tuple[str, int], Any] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)
    news: asyncio.Queue[EventView] | None = None
    closed: list[str] = field(default_factory=list)

    def add(self, found: LaunchView) -> LaunchView:
        self.views[found.launch_id] = found
        return found

    async def launch(self, order: LaunchOrder, owner_id: str, idempotency_key: str | None = None) -> LaunchView:
        self.calls.append((order, owner_id, idempotency_key))
        return self.add(view(len(self.views) + 1, model=order.model, state="bootstrapping", owner_id=owner_id))

    def get(self, wanted: str) -> LaunchView:
        if self.group(wanted) is not None:
            raise BadRequest("Name one of its launches.", param="launch_id")
        if wanted not in self.views:
            raise NotFound(f"No launch {wanted!r}.", param="launch_id")
        return self.views[wanted]

    async def launch_group(self, order: LaunchOrder, owner_id: str, idempotency_key: str | None = None) -> GroupView:
        self.calls.append((order, owner_id, idempotency_key))
        count = 2 if order.replicas == "per_gpu" else order.replicas
        for number in range(1, count + 1):
            self.add(replica(number, model=order.model, state="bootstrapping", owner_id=owner_id, group_size=count))
        found = self.group(GROUP_ID)
        assert found is not None
        return found

    def group(self, wanted: str) -> GroupView | None:
        members = [v for v in self.views.values() if v.group_id == wanted != v.launch_id]
        return groups.view_of(wanted, members) if members else None

    def list(self, *, include_ended: bool, group: str | None = None) -> list[LaunchView]:
        found = sorted(self.views.values(), key=lambda v: v.launch_id, reverse=True)
        shown = [v for v in found if include_ended or v.state not in {"stopped", "failed"}]
        return [v for v in shown if group in {None, v.group_id}]

    async def events(self, wanted: str, after_seq: int, limit: int) -> Any:
        return [row for row in self.rows.get(wanted, []) if row.seq > after_seq][:limit]

    async def watch(self, wanted: str, after_seq: int = 0) -> AsyncIterator[EventView]:
        try:
            for row in await self.events(wanted, after_seq, 1000):
                yield row
            while self.news is not None:
                yield await self.news.get()
        finally:
            self.closed.append(wanted)

    def log_reader(self, wanted: str, attempt: int | None = None) -> Any:
        number = self.get(wanted).attempt if attempt is None else attempt
        if (wanted, number) not in self.logs:
            raise NotFound("No such attempt.", param="attempt")
        return self.logs[wanted, number]

    def log_ended(self, wanted: str, attempt: int | None = None) -> bool:
        found = self.get(wanted)
        return found.state in {"stopped", "failed"} or (attempt or found.attempt) < found.attempt

    async def stop(self, wanted: str, *, wait: bool = True, force: bool = False) -> StopOutcome:
        if (group := self.group(wanted)) is not None:
            members = [await self.stop(one.launch_id, wait=wait, force=force) for one in group.members]
            return groups.outcome_of(wanted, members)
        self.calls.append((wanted, wait, force))
        state = "stopped" if wait else self.get(wanted).state
        self.views[wanted] = replace(self.get(wanted), state=state)
        return StopOutcome(wanted, state, force, ("GPU-0",) if force else ())

    async def own_pids(self, _snapshot: Snapshot) -> frozenset[int] | None:
        return None

    async def dropped_log_bytes(self) -> int:
        return 12

    async def delete(self, wanted: str) -> None:
        if (group := self.group(wanted)) is not None:
            for one in group.members:
                await self.delete(one.launch_id)
            return
        if self.get(wanted).state not in {"stopped", "failed"}:
            raise Conflict("It has not ended.", param="launch_id")
        del self.views[wanted]


@dataclass
class FakeTraffic:
    found: list[Advert] = field(default_factory=list)
    reports: dict[str, BudgetReport] = field(default_factory=dict)

    def budgets(self) -> dict[str, BudgetReport]:
        return self.reports

    def load(self, _launch_id: str) -> LoadReport:
        return LoadReport({"realtime": 2}, {"batch": 3})

    def queues(self) -> dict[str, LoadReport]:
        return {"model": LoadReport({"realtime": 2}, {"batch": 3})}

    def adverts(self) -> list[Advert]:
        return self.found


@dataclass
class FakeRequest:
    """A request under way that stays until it is cancelled."""

    among: Inflight
    now: RequestInfo

    def info(self) -> RequestInfo:
        return self.now

    def cancel(self) -> None:
        self.among.remove(self.now.id)

    def rights_changed(self) -> None: ...


def under_way(services: Services, name: str = "req_1", **fields: Any) -> RequestInfo:
    """Put a request under way."""
    base = RequestInfo(
        id=name, cls="realtime", owner="realtime", model="model", launch_id=launch_id(1), state="running",
        method="POST", path="/v1/chat/completions", age_s=2.5, queue_ms=7, sequences=1, tokens=12, stream=True,
    )  # fmt: skip
    info = base._replace(**fields)
    assert isinstance(services.requests, Inflight)
    services.requests.add(info.id, FakeRequest(services.requests, info))
    return info


@dataclass
class FakeDevices:
    now: Snapshot = field(
        default_factory=lambda: Snapshot(
            "mock",
            (
                GpuReading(Gpu("GPU-0", 0, "Mock", 8 << 30), used_bytes=1 << 20, utilization=0.25, temperature_c=40),
                GpuReading(Gpu("GPU-1", 1, "Mock", 8 << 30), used_bytes=3 << 30),
                GpuReading(Gpu("GPU-2", 2, "Mock", 8 << 30), unknown="timed out"),
            ),
        )
    )

    async def snapshot(self, max_age_s: float = 1.0) -> Snapshot:
        return self.now


@dataclass
class FakeGpus:
    unsettled: dict[str, str] = field(default_factory=dict)


def key(name: str, *names: str, **fields: Any) -> Key:
    disabled = fields.pop("disabled", False)
    return Key(digest(name), Principal(name, frozenset(names), **fields), disabled=disabled)


def make(keys: Iterable[Key] = (), *, protect_all: bool = False, settings: Mapping[str, Any] | None = None) -> Services:
    """Services of an open daemon, or of one with ``keys``. A key's name is its token."""
    ring = KeyRing(tuple(keys), clock=lambda: NOW)
    sessions, shelf = Sessions(ring, lifetime_s=60), FakeShelf()
    return Services(
        settings=Settings(state_dir=Path("/"), **dict(settings or {})),
        guard=Guard(ring, sessions, open_access=not ring.configured, protect_all=protect_all),
        keys=ring,
        sessions=sessions,
        supervisor=FakeLaunches(),
        gate=FakeTraffic(),
        requests=Inflight(),
        files=shelf,
        batches=FakeBatches(shelf),
        items=FakeItems(),
        models=FakeModels(),
        activity=Activity.open(Path("/nowhere"), rows=0),
        inventory=FakeDevices(),
        gpus=FakeGpus(),
        ledger=Ledger(),
        metrics=Metrics(),
        version="9.9",
        started_at=NOW,
        clock=lambda: NOW + 5,
        phase="ok",
    )


def one_key_each() -> list[Key]:
    return [key(scope, scope) for scope in sorted(ALL)]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, after checking that the body has the one shape."""
        body = self.json()
        assert body["src"] == "vllm-bootstrap"
        assert {"message", "type", "param", "code"} <= set(body["error"])
        found = body["error"]
        assert isinstance(found, dict)
        return found


class Browser:
    """Sends requests straight into the application."""

    def __init__(self, services: Services, token: str | None = None, **headers: str) -> None:
        self.services = services
        self.app = build_api(services)
        self.headers = {"host": "127.0.0.1:8000", **headers}
        if token is not None:
            self.headers["authorization"] = f"Bearer {token}"

    def get(self, path: str, **headers: str) -> Answer:
        return self.call("GET", path, headers=headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.call(
            "POST", path, data, headers={"content-type": "application/json", **headers} if data else headers
        )

    def call(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
        return asyncio.run(self.exchange(method, path, body, headers or {}))

    async def exchange(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        leave_after: Callable[[bytes], bool] = lambda _sent: False,
    ) -> Answer:
        """One request. The client goes away as soon as ``leave_after`` of all bytes received so far is true."""
        target, _, query = path.partition("?")
        sent = {k.replace("_", "-"): v for k, v in {**self.headers, **(headers or {})}.items()}
        if body:
            sent["content-length"] = str(len(body))
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "path": unquote(target), "raw_path": target.encode(), "query_string": query.encode(), "root_path": "",
            "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "state": {},
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in sent.items()],
        }  # fmt: skip
        incoming: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()
        start: dict[str, Any] = {}
        chunks: list[bytes] = []

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                chunks.append(message.get("body", b""))
                if leave_after(b"".join(chunks)):
                    left.set()

        await self.app(scope, receive, send)
        found = {k.decode(): v.decode("latin-1") for k, v in start["headers"]}
        return Answer(start["status"], found, b"".join(chunks))


def sse_events(body: bytes) -> list[dict[str, str]]:
    """The events of a stream, comments left out."""
    found = []
    for block in body.decode().split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines() if line and not line.startswith(":")]
        if lines:
            found.append({name: value for name, _, value in lines})
    return found
