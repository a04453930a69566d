"""What keeps a box busy, read off the real parts where they are small, and stand-ins where they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.control_plane import FakeLaunches, FakeRequest, launch_id, loading, view
from vllm_bootstrap.gateway.inflight import Inflight, RequestInfo
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.models.idle_sense import Sense
from vllm_bootstrap.models.idle_time import Use
from vllm_bootstrap.serving import LoadReport

INFO = RequestInfo("r", "realtime", "o", "m", None, "queued", "POST", "/v1/completions", 1.0, 0, 1, 0, False)


@dataclass
class World:
    launches: FakeLaunches = field(default_factory=FakeLaunches)
    ledger: Ledger = field(default_factory=Ledger)
    requests: Inflight = field(default_factory=Inflight)
    running: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    served: int = 0
    reachable: bool = True
    other: str | None = None

    def load(self, wanted: str) -> LoadReport:
        return LoadReport({"realtime": self.running.get(wanted, 0)}, {"realtime": 5})

    def states(self) -> dict[str, int]:
        return self.counts

    def sense(self) -> Sense:
        return Sense(
            self.ledger, self.launches, self, self.requests, self, self, served=lambda: self.served,
            reachable=lambda: self.reachable, others=[lambda: None, lambda: self.other],
        )  # fmt: skip

    def busy(self) -> str | None:
        return self.sense().look(["GPU-0"]).busy_because

    def enter(self, **fields: Any) -> None:
        self.requests.add("r", FakeRequest(self.requests, INFO._replace(**fields)))


def test_a_ready_model_that_nobody_uses_is_an_idle_box() -> None:
    world = World()
    world.launches.add(view(1))
    world.launches.add(view(2, state="asleep"))
    world.ledger.claim(launch_id(1), ["GPU-0"])
    seen = world.sense().look(["GPU-0", "GPU-1"])
    assert seen.busy_because is None
    assert (seen.working, seen.devices) == (False, {"GPU-0": Use(True, False), "GPU-1": Use(False, False)})


def test_a_device_works_for_its_owners_only() -> None:
    world = World(running={launch_id(1): 1})
    for number in (1, 2):
        world.launches.add(view(number))
        world.ledger.claim(launch_id(number), [f"GPU-{number}"])
    seen = world.sense().look(["GPU-1", "GPU-2", "GPU-3"])
    assert seen.devices == {"GPU-1": Use(True, True), "GPU-2": Use(True, False), "GPU-3": Use(False, False)}
    assert seen.working


def do(name: str, value: object) -> Callable[[World], None]:
    return lambda world: setattr(world, name, value)


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (lambda world: world.enter(), "requests are under way"),
        (lambda world: world.enter(cls=None, state="reading"), "requests are under way"),
        (lambda world: world.enter(cls=None, state="running"), None),
        (lambda world: world.launches.add(loading(1)), f"launch {launch_id(1)} is bootstrapping"),
        (lambda world: world.launches.add(view(1, state="stopping")), f"launch {launch_id(1)} is stopping"),
        (do("counts", {"validating": 1, "paused": 0}), "a batch is validating"),
        (do("counts", {"finalizing": 1, "paused": 1}), "a batch is finalizing"),
        (do("counts", {"in_progress": 2, "paused": 1}), "batch work is left to do"),
        (do("counts", {"in_progress": 2, "paused": 2}), None),
        (do("waiting", 3), "single items are left to do"),
        (do("other", "weights are downloaded"), "weights are downloaded"),
    ],
)
def test_what_is_work_and_what_is_not(happens: Callable[[World], None], said: str | None) -> None:
    world = World()
    assert world.busy() is None
    happens(world)
    assert world.busy() == said


@pytest.mark.parametrize("work", [do("counts", {"in_progress": 2, "paused": 0}), do("waiting", 3)])
def test_work_that_nothing_can_do_keeps_no_box_awake(work: Callable[[World], None]) -> None:
    world = World(reachable=False)
    work(world)
    assert world.busy() is None


def test_requests_between_two_looks_are_noticed() -> None:
    world = World(served=7)
    sense = world.sense()
    assert sense.look([]).busy_because is None
    world.served = 8
    assert sense.look([]).busy_because == "requests have just ended"
    assert sense.look([]).busy_because is None
