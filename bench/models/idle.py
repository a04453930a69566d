"""What the catalogue costs while nothing happens: CPU of an idle daemon, and how long a look holds up its event loop.

The daemons stand side by side on eight mock GPUs each, most with 500 models; where models are wanted that find no
room, the daemon looks ten times a second, else once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from bench.common import median, percentile, table
from bench.models.box import cpu_s, daemon, models, pid_of
from bench.models.first_token import AS_IT_COMES
from tests.support.daemon import DaemonProcess

GPUS = 8
HEADS = ["", "CPU, ms a minute", "of a core, %", "looks/s", "a look, µs of CPU, median", "p99"]
PARTS = ("facts", "needs", "plan")


@dataclass
class Case:
    """``loaded`` of ``models`` are loaded, so many more are wanted. ``launched``: by hand, with no catalogue."""

    name: str
    models: int = 0
    loaded: int = 0
    wanted: int = 0
    launched: int = 0
    spent: float = 0.0
    looks: list[dict[str, float]] = field(default_factory=list)

    def row(self, seconds: float) -> list[str]:
        took = [sum(one.get(part, 0.0) for part in PARTS) for one in self.looks]
        share = self.spent / seconds
        return [
            self.name, f"{share * 60_000:.0f}", f"{share * 100:.2f}", f"{len(took) / seconds:.1f}",
            f"{median(took):.0f}", f"{percentile(took, 99):.0f}",
        ]  # fmt: skip


def cases() -> list[Case]:
    return [
        Case("no models"),
        Case("500 models, none loaded", 500),
        Case("no models, 8 launches by hand", launched=GPUS),
        Case("500 models, 8 loaded", 500, GPUS),
        Case("500 models, 8 loaded, 1 finds no room", 500, GPUS, 1),
        Case("500 models, 8 loaded, 40 find no room", 500, GPUS, 40),
    ]


def run(seconds: float) -> Iterator[str]:
    every = cases()
    with ExitStack() as stack:
        boxes = [_begin(stack, case) for case in every]
        yield "all are as they should be"
        time.sleep(2)
        before = [(cpu_s(pid_of(one)), len(_looks(one))) for one in boxes]
        time.sleep(seconds)
        for case, one, (spent, looks) in zip(every, boxes, before, strict=True):
            case.spent, case.looks = cpu_s(pid_of(one)) - spent, _looks(one)[looks:]
    yield table(HEADS, [case.row(seconds) for case in every])


def _begin(stack: ExitStack, case: Case) -> DaemonProcess:
    settings = {**AS_IT_COMES, "model_min_loaded_s": 3600, "devices": f"mock:{GPUS}"}
    one = stack.enter_context(daemon(models(case.models), measured=True, **settings))
    for _ in range(case.launched):
        one.ready()
    for number in range(case.loaded):
        answer = one.request("POST", f"/models/model-{number}/load?wait=true", timeout_s=60)
        if answer.status != 200:
            raise SystemExit(answer.body.decode())
    for number in range(case.loaded, case.loaded + case.wanted):
        one.request("POST", f"/models/model-{number}/load")
    return one


def _looks(one: DaemonProcess) -> list[dict[str, float]]:
    return [json.loads(line) for line in (one.root / "looks.jsonl").read_text().splitlines()]
