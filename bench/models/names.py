"""What it costs to go by a model's name: CPU time of the daemon for a request by ``/v1`` against ``/proxy/{id}``.

One daemon with a short catalogue and one with 500 models, both with loaded models, stand side by side; ways take turns
in each round, and a way is compared with ``/proxy/{id}`` of the same daemon in the same round.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from bench.common import median, table
from bench.models.box import KEY, cpu_s, daemon, models, pid_of, pin_daemon
from bench.proxy.contenders import pin
from tests.support.daemon import DaemonProcess

CONNECTIONS = 64
SHORT, LONG = 3, 500
MOST_US = 10.0
BY_LAUNCH = "/proxy/{id}"
AT_ONCE = {"tokens-per-second": 0, "prefill-tokens-per-second": 0}
DEFAULTS = {"temperature": 0.7, "max_tokens": 16}


@dataclass
class Way:
    """One kind of request to one daemon. ``of``: the way it is compared with. ``numbered``: each has a head of its own,
    so that what the daemon remembers of heads is of no use."""

    name: str
    one: DaemonProcess
    path: str
    model: str
    of: Way | None = None
    numbered: bool = False
    us: list[float] = field(default_factory=list)


def catalogue(count: int) -> dict[str, dict[str, Any]]:
    """The two that are asked for and so many that nobody wants."""
    own = {"source": "org/m", "gpus": {"count": 1}, "extra_args": AT_ONCE, "args": {"max_num_seqs": 1024}}
    return {
        "plain": {**own, "aliases": ["another"]},
        "changed": {**own, "defaults": DEFAULTS},
        **models(count - 2),
    }


def ways(stack: ExitStack, count: int, *, all_of_them: bool) -> list[Way]:
    one = stack.enter_context(daemon(catalogue(count), devices="mock:2", max_in_flight_requests=1024))
    for name in ("plain", "changed"):
        answer = one.request("POST", f"/models/{name}/load?wait=true", timeout_s=30)
        if answer.status != 200:
            raise SystemExit(answer.body.decode())
        launch = answer.json()["launches"][0]["launch_id"]
        if pin(1):
            pid = one.status(launch)["pid"]
            subprocess.run(["taskset", "-apc", "1", str(pid)], check=False, stdout=subprocess.DEVNULL)
    pin_daemon(one)
    launches = {
        name: one.request("GET", f"/models/{name}").json()["launches"][0]["launch_id"] for name in ("plain", "changed")
    }
    to_plain, to_changed = (f"/proxy/{launches[name]}/v1/completions" for name in ("plain", "changed"))
    about, by_name = f", {count} models", "/v1/completions"
    base = Way(f"{BY_LAUNCH}{about}", one, to_plain, "plain")
    found = [base, Way(f"by name{about}", one, by_name, "plain", base)]
    other = Way(f"{BY_LAUNCH}{about}, no head twice", one, to_plain, "plain", numbered=True)
    found += [other, Way(f"by name{about}, no head twice", one, by_name, "plain", other, numbered=True)]
    if all_of_them:
        third = Way(f"{BY_LAUNCH}{about}, two defaults added", one, to_changed, "changed")
        found += [
            Way(f"by alias{about}", one, by_name, "another", base),
            Way(f"by alias{about}, no head twice", one, by_name, "another", other, numbered=True),
            third,
            Way(f"by name{about}, two defaults added", one, by_name, "changed", third),
        ]
    return found


def measure(way: Way, requests: int) -> float:
    """Microseconds of CPU a request."""
    work = ["requests", str(CONNECTIONS), str(requests), way.path, way.model, *(["numbered"] if way.numbered else [])]
    before = cpu_s(pid_of(way.one))
    output = subprocess.run(
        [*pin(1), sys.executable, "-m", "bench.proxy.load", str(way.one.address[1]), KEY, *work],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    spent = cpu_s(pid_of(way.one)) - before
    found = json.loads(output.stdout)
    if found["failed"] or found["done"] != requests:
        raise SystemExit(f"{way.name}: {found['failed']} failed, {found['done']} of {requests} done")
    return spent / requests * 1e6


def run(rounds: int, requests: int) -> Iterator[str]:
    with ExitStack() as stack:
        every = [*ways(stack, SHORT, all_of_them=True), *ways(stack, LONG, all_of_them=False)]
        for way in every:
            measure(way, requests // 4)  # a fresh daemon is slow
        for number in range(rounds):
            for way in every if number % 2 == 0 else every[::-1]:
                way.us.append(measure(way, requests))
            yield f"round {number + 1} of {rounds}: " + ", ".join(f"{way.us[-1]:.1f}" for way in every)
    yield table(
        ["", "µs of CPU a request", f"more than {BY_LAUNCH}, median of rounds", "rounds"],
        [[way.name, f"{median(way.us):.1f}", *_more(way)] for way in every],
    )


def _more(way: Way) -> list[str]:
    if way.of is None:
        return ["", ""]
    more = [one - other for one, other in zip(way.us, way.of.us, strict=True)]
    return [f"{median(more):+.1f}", " ".join(f"{one:+.1f}" for one in more)]
