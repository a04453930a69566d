"""Everything about batches in one process, with the real lanes and an engine that answers at once and remembers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.batches import COMPLETIONS, line
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches.desk import BatchConfig, BatchDepartment
from vllm_bootstrap.batches.dispatch import Dispatcher, LaneKey
from vllm_bootstrap.batches.files import FileStore
from vllm_bootstrap.batches.flight import Carriage, Flight
from vllm_bootstrap.batches.indexer import OnProgress
from vllm_bootstrap.batches.indexing import Indexing, Outcome, Task
from vllm_bootstrap.batches.jobs import TERMINAL
from vllm_bootstrap.batches.types import BatchView, NewBatch
from vllm_bootstrap.batches.work import Job
from vllm_bootstrap.batches.work import Outcome as Answer
from vllm_bootstrap.db import Database
from vllm_bootstrap.serving import Advert, Endpoint, Instance

OWNER, MODELS = "alice", ("small", "large")
LINES = 200
AT_ONCE, SLOTS = 8, 32


class InstantEngine:
    """Answers some of what waits at each turn of the loop: its prompt again, and every tenth with a refusal.
    ``executed``: (batch, line) of each job it was given, in order, ``prompts`` what they asked; ``cancelled``: those
    that were taken back. ``held``: answers nothing while true, by itself after ``holds_after`` answers. ``pace_s``: the
    time between two turns, so that records are written in small groups."""

    def __init__(self, pace_s: float = 0.0, holds_after: int | None = None) -> None:
        self._pace_s, self._holds_after = pace_s, holds_after
        self.executed: list[tuple[str, int]] = []
        self.prompts: list[str] = []
        self.cancelled: list[tuple[str, int]] = []
        self.answered = 0
        self.held = False
        self._waiting: list[Flight] = []
        self._turn: asyncio.TimerHandle | None = None

    def send(self, flight: Flight) -> Carriage:
        for job in flight.jobs:
            self.executed.append((job.source.id.rpartition(".")[0], job.number))
            self.prompts.append(json.loads(job.body)["prompt"])
        self._waiting.append(flight)
        asyncio.get_running_loop().call_soon(self._fill)
        self._go_on()
        return _Ride(self, flight)

    @property
    def running(self) -> set[tuple[str, int]]:
        """What has a place."""
        return {(job.source.id.rpartition(".")[0], job.number) for f in self._waiting if f.launch for job in f.jobs}

    @property
    def waiting(self) -> int:
        """What was sent and has no answer, with and without a place."""
        return len(self._waiting)

    def release(self) -> None:
        """Answer the rest."""
        self.held, self._holds_after = False, None
        self._go_on()

    def drop(self, flight: Flight) -> None:
        if flight in self._waiting:
            self._waiting.remove(flight)
            self.cancelled += [(job.source.id.rpartition(".")[0], job.number) for job in flight.jobs]

    def _go_on(self) -> None:
        if self._turn is None and not self.held:
            self._turn = asyncio.get_running_loop().call_later(self._pace_s, self._answer)

    def _fill(self) -> None:
        """Give places in the order of coming."""
        for flight in self._waiting[:SLOTS]:
            if flight.launch is None:
                flight.placed("launch-1")

    def _answer(self) -> None:
        self._turn = None
        for flight in self._waiting[:AT_ONCE]:
            self.held = self.held or self.answered == self._holds_after
            if self.held:
                break
            if flight.launch is not None:
                self._waiting.remove(flight)
                self.answered += 1
                flight.ended(answer_to(flight.jobs[0]))
        self._fill()
        if self._waiting:
            self._go_on()


class _Ride:
    def __init__(self, engine: InstantEngine, flight: Flight) -> None:
        self._engine, self._flight = engine, flight

    def cancel(self) -> None:
        self._engine.drop(self._flight)


def answer_to(job: Job) -> Answer:
    prompt = json.loads(job.body)["prompt"]
    if job.number % 10 == 3:
        return Answer(400, b'{"error": {"message": "%b"}}' % prompt.encode(), None, True, "req")
    body = {"choices": [{"text": prompt}], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}
    return Answer(200, json.dumps(body).encode(), None, True, "req")


class InstantLanes(Dispatcher):
    """The real lanes; what they send goes to an ``InstantEngine``, which stands where the gateway would."""

    def send(self, flight: Flight, principal: Principal, key: LaneKey) -> Carriage:
        engine: InstantEngine = self._gateway  # type: ignore[assignment]
        return engine.send(flight)


async def index_here(task: Task, on_progress: OnProgress | None = None) -> Outcome:
    """In this process, so that its disk is recorded too."""
    return await asyncio.to_thread(Indexing(task, lambda _: None).run)


@dataclass
class Office:
    """One life of everything about batches."""

    db: Database
    files: FileStore
    department: BatchDepartment
    engine: InstantEngine
    keys: dict[str, Principal]

    @property
    def batches(self) -> Any:
        return self.department.batches

    async def upload(self, lines: list[bytes], owner: str = OWNER) -> str:
        file = self.files.receive(owner, "batch", "in.jsonl", None)
        for item in lines:
            await file.write(item + b"\n")
        return (await file.commit()).id

    async def create(self, file_id: str, **changes: Any) -> BatchView:
        fields: dict[str, Any] = {"completion_window": "24h", "window_s": 86400.0, **changes}
        view: BatchView = await self.batches.create(NewBatch(OWNER, COMPLETIONS, file_id, **fields))
        return view

    async def content(self, file_id: str) -> list[dict[str, Any]]:
        _, path = await self.files.open(file_id, OWNER)
        return [json.loads(item) for item in path.read_bytes().splitlines()]

    async def ended(self, batch_id: str, timeout_s: float = 20.0) -> BatchView:
        """Wait until it has; look at it in each turn of the loop."""
        give_up = time.monotonic() + timeout_s
        while True:
            view: BatchView = await self.batches.get(batch_id, OWNER)
            if view.row.phase.state in TERMINAL and batch_id not in self.batches._runs:
                return view
            assert time.monotonic() < give_up, f"{view} has not ended within {timeout_s} s"
            await asyncio.sleep(0.001)

    def launch(self, *, there: bool = True, model: str = "small") -> None:
        """Announce an engine for a model, or its absence."""
        launch_id = f"launch-{model}"
        instance = Instance(
            launch_id, launch_id, "simulator", model, (model,), Endpoint(host="localhost", port=1), SLOTS // 2, ()
        )
        state = "ready" if there else "stopped"
        self.department.advert(Advert(launch_id, launch_id, model, (model,), state, instance if there else None))


@contextlib.asynccontextmanager
async def office(
    folder: Path,
    engine: InstantEngine,
    *,
    clock: Callable[[], float] = time.time,
    index: Any = index_here,
    launched: bool = True,
    **changes: Any,
) -> AsyncIterator[Office]:
    """Open for as long as the block lasts; closed as a daemon closes."""
    (folder / "batches").mkdir(parents=True, exist_ok=True)
    db = Database.open(folder / "state.db")
    files = FileStore(db, folder / "files", max_bytes=2**30, expires_after_s=86400, reserve_bytes=0, clock=clock)
    fields: dict[str, Any] = {
        "folder": folder / "batches", "node_id": "local", "max_lines": 1000, "max_line_bytes": 10_000,
        "prefix_order": True,
        "max_unfinished": 10, "line_attempts": 3, "kept_s": 86400.0, "max_size": 1, "max_latency_s": 0.0,
        "item_expires_after_s": 86400.0, "items_max_queued": 10, "webhook_allow_private": True, "webhook_attempts": 3,
        **changes,
    }  # fmt: skip
    keys = {OWNER: Principal(OWNER, frozenset({"batch"}))}
    gateway: Any = engine
    department = BatchDepartment(
        BatchConfig(**fields), db, files, gateway, keys.get, clock, dispatcher=InstantLanes, index=index
    )
    found = Office(db, files, department, engine, keys)
    if launched:
        for model in MODELS:
            found.launch(model=model)
    try:
        await department.start()
        yield found
    finally:
        await department.close()
        files.close()
        db.close()


def input_lines(count: int = LINES) -> list[bytes]:
    return [line(f"id-{n}", model=MODELS[n % 2], prompt=f"id-{n}") for n in range(1, count + 1)]
