"""A lane with a desk and sources in memory: what is sent stays where it is until a test says how it went."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.batch_office import answer_to
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches.flight import Carriage, Flight
from vllm_bootstrap.batches.lane import Lane
from vllm_bootstrap.batches.work import Ending, Job, Outcome
from vllm_bootstrap.errors import ApiError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OWNER = "bulk"


def answered(status: int = 200, body: bytes = b"{}") -> Outcome:
    return Outcome(status, body, None, True, "req")


def failed(error: ApiError, *, sent: bool = False) -> Outcome:
    return Outcome(None, b"", error, sent, "req")


def prompt(text: str = "x", **fields: object) -> bytes:
    return json.dumps({"model": "m", "prompt": text, **fields}).encode()


class Jobs:
    """A source that checks what it is told: each job is out or here, and ends once."""

    def __init__(self, source_id: str, count: int, *, owner: str = OWNER, path: str = CHAT, first: int = 1) -> None:
        self.id, self.owner, self.priority, self.deadline = source_id, owner, 0, 1e12
        self.here = deque(Job(self, first + at, path, prompt(str(at))) for at in range(count))
        self.out: set[Job] = set()
        self.endings: dict[int, Ending] = {}
        self.dropped: set[int] = set()
        self.notes: Counter[int] = Counter()
        self.ready: Callable[[], None] = lambda: None

    @property
    def left(self) -> int:
        return len(self.here) + len(self.out)

    def take(self) -> Job | None:
        if not self.here:
            return None
        job = self.here.popleft()
        self.out.add(job)
        return job

    def ended(self, job: Job, ending: Ending) -> None:
        self._back(job)
        assert job.number not in self.endings
        self.endings[job.number] = ending

    def returned(self, job: Job) -> None:
        self._back(job)
        self.here.appendleft(job)
        self.ready()

    def noted(self, job: Job) -> None:
        assert job in self.out, job.number
        self.notes[job.number] += 1

    def _back(self, job: Job) -> None:
        assert job in self.out, job.number
        assert job.number not in self.dropped, job.number
        self.out.remove(job)


class Sent:
    """A request under way."""

    def __init__(self, flight: Flight, desk: Desk) -> None:
        self.flight, self._desk = flight, desk

    def cancel(self) -> None:
        self._desk.under_way.remove(self)

    def place(self, launch_id: str = "l1") -> None:
        self.flight.placed(launch_id)

    def end(self, outcome: Outcome) -> None:
        self._desk.under_way.remove(self)
        self.flight.ended(outcome)

    @property
    def numbers(self) -> list[int]:
        return [job.number for job in self.flight.jobs]


@dataclass
class Desk:
    """``refusals``: what the next ones come to at once, None: they are sent. ``keys``: those that are valid."""

    keys: dict[str, Principal] = field(default_factory=lambda: {OWNER: Principal(OWNER, frozenset({"batch"}))})
    under_way: list[Sent] = field(default_factory=list)
    sent: int = 0
    breaks: Exception | None = None

    def send(self, flight: Flight, principal: Principal) -> Sent:
        assert principal.name == flight.source.owner
        self.sent += 1
        if self.breaks is not None:
            raise self.breaks
        self.under_way.append(Sent(flight, self))
        return self.under_way[-1]

    def principal(self, owner: str) -> Principal | None:
        return self.keys.get(owner)

    def of(self, number: int) -> Sent:
        return next(sent for sent in self.under_way if number in sent.numbers)


def make_lane(desk: Desk, *sources: Jobs, slots: int = 4, attempts: int = 3, max_joined: int = 1) -> Lane:
    lane = Lane(desk, attempts=attempts, max_joined=max_joined)
    lane.engines(slots, "nothing serves it")
    for source in sources:
        join_in(lane, source)
    return lane


def join_in(lane: Lane, source: Jobs) -> None:
    source.ready = lambda: lane.ready(source.id)
    lane.add(source)


async def turn() -> None:
    """Let everything happen that happens at once."""
    for _ in range(6):
        await asyncio.sleep(0)


class HandEngine:
    """Stands where the gateway would. Answers all it has at each turn of the loop; while ``held`` it gives no places.
    ``waiting``: what it has not answered."""

    def __init__(self, pace_s: float = 0.0) -> None:
        self._pace_s = pace_s
        self.held = False
        self.waiting: list[Flight] = []
        self.executed: list[tuple[str, int]] = []
        self.prompts: list[str] = []
        self._turn: asyncio.TimerHandle | None = None

    def send(self, flight: Flight) -> Carriage:
        for job in flight.jobs:
            self.executed.append((job.source.id, job.number))
            self.prompts.append(json.loads(job.body)["prompt"])
        self.waiting.append(flight)
        self._go_on()
        return _HandRide(self, flight)

    def drop(self, flight: Flight) -> None:
        if flight in self.waiting:
            self.waiting.remove(flight)

    def take(self) -> Flight:
        """The oldest, with a place; what becomes of it is for the caller to say."""
        flight = self.waiting.pop(0)
        flight.placed("launch-1")
        return flight

    def release(self) -> None:
        """Answer the rest."""
        self.held = False
        self._go_on()

    def _go_on(self) -> None:
        if self._turn is None and not self.held:
            self._turn = asyncio.get_running_loop().call_later(self._pace_s, self._answer)

    def _answer(self) -> None:
        self._turn = None
        for _ in range(min(8, len(self.waiting))):
            if self.held:
                return
            flight = self.take()
            flight.ended(answer_to(flight.jobs[0]))
        if self.waiting:
            self._go_on()


class _HandRide:
    def __init__(self, engine: HandEngine, flight: Flight) -> None:
        self._engine, self._flight = engine, flight

    def cancel(self) -> None:
        self._engine.drop(self._flight)
