"""Rounds of starts, stops and kills against a whole daemon, each followed by a look at what must always hold.

Invariant: everything is chosen by one seeded generator, done from outside (HTTP and signals), and judged with the
kernel's eyes beside the daemon's own words. Only processes that bear the mark of this daemon are ever killed. The
choices are repeatable, the timing of processes is not.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import leftovers, orphans
from tests.support.daemon import ENDED, DaemonProcess
from tests.support.waiting import wait_for

SETTLED = (*ENDED, "ready")
# From the end of a round's fault to everything being settled; the longest back-off and grace fit in many times.
DEADLINE_S = 20.0
SETTINGS: dict[str, Any] = {"stop_grace_s": "1", "restart_backoff_s": "0.1", "probe_timeout_s": "2"}
DEATHS = ("bad_flag", "engine_died", "killed_by_signal")
FINDING = re.compile(r"launch \S+ \(\w+\): (again|continue|finished|lost)\b")


@dataclass
class Figures:
    """What happened, for people. ``findings``: what restarted daemons made of the launches they found."""

    rounds: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        shown = [f"rounds {self.rounds} in {self.seconds:.1f} s, slowest to settle {self.slowest_s:.2f} s"]
        for name in ("faults", "answers", "ends", "findings"):
            counted = sorted(getattr(self, name).items())
            shown.append(f"{name}: " + ", ".join(f"{what} {count}" for what, count in counted))
        return shown


class Chaos:
    """Rounds against ``daemon``, which must be up. Raises ``AssertionError`` when something does not hold.

    ``spared``: launches that nothing is done to, but that must be there and in order like all others. ``kept``: how
    many ended launches the daemon remembers.
    """

    def __init__(
        self, daemon: DaemonProcess, seed: int, spared: frozenset[str] = frozenset(), kept: int = 1000
    ) -> None:
        self.figures = Figures()
        self._daemon, self._random, self._spared = daemon, random.Random(seed), spared
        self._acknowledged: set[str] = set()
        self._newest = kept // 2  # launches do not end in the order of their ids
        self._seen_ended: set[str] = set()
        self._restarts = 0

    def run(
        self, rounds: int, *, fewest: int | None = None, within_s: float = 0.0,
        told: Callable[[int, str], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        """So many rounds, or ``fewest`` and what more the time allows; then stop all and find nothing left."""
        began = time.monotonic()
        for number in range(rounds):
            if fewest is not None and number >= fewest and time.monotonic() - began > within_s:
                break
            fault = self.round()
            told(number, fault)
        self.stop_all()
        self.figures.findings.update(FINDING.findall(self._daemon.log))
        self.figures.seconds = time.monotonic() - began

    def round(self, *, kill_daemon: bool | None = None) -> str:
        """One round; what was done. ``kill_daemon``: whether the daemon is a victim, None leaves it to chance."""
        launches = (
            self._stop_one, self._stop_one, self._stop_many, self._kill_shim, self._kill_main, self._kill_child,
            self._kill_shim_at_birth,
        )  # fmt: skip
        daemons = (
            self._kill_daemon, self._kill_daemon_at_birth, self._kill_daemon_at_birth, self._kill_daemon_and_shim,
            self._kill_daemon_and_main, self._kill_daemon_while_stopping,
        )  # fmt: skip
        actions = {None: launches + daemons, False: launches, True: daemons}[kill_daemon]
        if self._random.random() < 0.8:
            self._start_some()
        if self._random.random() < 0.5:  # half of the faults hit starts, half of them engines that serve
            self._wait_settled(time.monotonic() + DEADLINE_S)
        action = self._random.choice(actions)
        name = action.__name__.strip("_")
        self.figures.faults[name] += 1
        action()
        began = time.monotonic()
        if self._daemon.process is None or self._daemon.process.poll() is not None:
            self._daemon.start()
            self._restarts += 1
        self._check(name, began + DEADLINE_S)
        self.figures.slowest_s = max(self.figures.slowest_s, time.monotonic() - began)
        if self._random.random() < 0.3:
            self.stop_all()
        self.figures.rounds += 1
        return name

    def stop_all(self) -> None:
        """Stop all but the spared, and find nothing left."""
        self._end_all()
        if self._spared:
            self._check("stopping everything", time.monotonic() + DEADLINE_S)
        else:
            self._daemon.assert_no_leftovers()

    def freeze(self, seconds: float) -> None:
        """Stop an engine's main process for so long."""
        launch = self._one()
        if launch is not None and self._signal(launch["pid"], signal.SIGSTOP):
            time.sleep(seconds)
            self._signal(launch["pid"], signal.SIGCONT)
            self.figures.faults["freeze"] += 1

    # -- what is done --------------------------------------------------------------------------------------------

    def _order(self) -> dict[str, Any]:
        pick = self._random
        knobs: dict[str, Any] = {"boot-delay": pick.choice([0, 0, 0.2, 0.6])}
        for name, chance in (("fork-setsid-child", 0.4), ("ignore-sigterm", 0.15)):
            if pick.random() < chance:
                knobs[name] = True
        if pick.random() < 0.1:
            knobs["die-at-boot"] = pick.choice(DEATHS)
        if pick.random() < 0.15:
            knobs["slow-stop"] = 0.5
        order: dict[str, Any] = {"model": "sim", "engine": "simulator", "extra_args": knobs}
        order.update(pick.choice([{"gpu_count": 1}, {"gpu_count": 1}, {}, {"gpu_count": 1, "gpu_share": 0.5}]))
        if pick.random() < 0.3:
            order["restart"] = {"policy": "on-failure", "max_attempts": 3}
        return order

    def _start_some(self) -> None:
        for _ in range(self._random.randint(1, 2)):
            self._start()

    def _start(self) -> None:
        answer = self._daemon.request("POST", "/launch", self._order())
        self.figures.answers[str(answer.status)] += 1
        assert answer.status in {201, 409}, answer.body
        if answer.status == 201:
            self._acknowledged.add(answer.json()["launch_id"])
        else:
            assert answer.error["code"] == "gpu_conflict"

    def _active(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._daemon.request("GET", "/launches?limit=1000").json()["data"]
        return [launch for launch in found if launch["launch_id"] not in self._spared]

    def _one(self) -> dict[str, Any] | None:
        active = self._active()
        return self._random.choice(active) if active else None

    def _stop_one(self) -> None:
        if (launch := self._one()) is not None:
            self._pause(0.1)
            self._stop(launch["launch_id"])

    def _stop_many(self) -> None:
        """The same and other launches at once, from several clients."""
        active = self._active()
        threads = [
            threading.Thread(target=self._stop, args=(launch["launch_id"],)) for launch in active for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    def _stop(self, launch_id: str) -> None:
        query = self._random.choice([{}, {}, {"force": "true"}, {"wait": "false"}])
        answer = self._daemon.stop_launch(launch_id, **query)
        assert answer.status in {200, 202}, answer.body
        assert answer.status == 202 or answer.json()["state"] in ENDED

    def _end_all(self) -> None:
        for launch in self._active():
            answer = self._daemon.stop_launch(launch["launch_id"])
            assert answer.status == 200, (answer.status, answer.body, launch)
            assert answer.json()["state"] in ENDED, answer.body

    def _kill_shim(self) -> None:
        if (launch := self._one()) is not None:
            self._kill(launch["shim_pid"])

    def _kill_main(self) -> None:
        if (launch := self._one()) is not None:
            self._kill(launch["pid"])

    def _kill_child(self) -> None:
        if (launch := self._one()) is not None:
            children = _children(launch["pid"])
            self._kill(self._random.choice(children) if children else launch["pid"])

    def _kill_daemon(self) -> None:
        self._pause(0.3)
        self._daemon.kill()

    def _kill_daemon_at_birth(self) -> None:
        """Before the first handle is stored, or soon after: as soon as a launch's folder is there, give or take."""
        self._make_room()
        before = set(self._run_dirs())
        sent = threading.Thread(target=self._send_launch)
        sent.start()
        deadline = time.monotonic() + 0.5
        while set(self._run_dirs()) <= before and time.monotonic() < deadline:
            time.sleep(0.001)
        self._pause(self._random.choice([0, 0.02, 0.1]))
        self._daemon.kill()
        sent.join(20)

    def _kill_shim_at_birth(self) -> None:
        self._make_room()
        before = set(orphans.marked(self._daemon.state_id))
        sent = threading.Thread(target=self._send_launch)
        sent.start()
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            fresh = set(orphans.marked(self._daemon.state_id)) - before
            if fresh:
                self._kill(min(fresh))
                break
        sent.join(20)

    def _make_room(self) -> None:
        """Else a launch would only be refused."""
        if self._random.random() < 0.8:
            self._end_all()

    def _send_launch(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # the daemon may die meanwhile: no answer
            self._start()

    def _kill_daemon_and_shim(self) -> None:
        launch = self._one()
        self._daemon.kill()
        if launch is not None:
            self._kill(launch["shim_pid"])

    def _kill_daemon_and_main(self) -> None:
        launch = self._one()
        self._daemon.kill()
        if launch is not None:
            self._kill(launch["pid"])

    def _kill_daemon_while_stopping(self) -> None:
        if (launch := self._one()) is not None:
            self._daemon.stop_launch(launch["launch_id"], wait="false")
            self._pause(0.05)
        self._daemon.kill()

    def _kill(self, pid: int | None) -> None:
        self._signal(pid, signal.SIGKILL)

    def _signal(self, pid: int | None, number: int) -> bool:
        """Send it, if it still is a process of this daemon's launches."""
        with contextlib.suppress(OSError):
            if pid is not None and f"{self._daemon.state_id}/".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(pid, number)
                return True
        return False

    def _pause(self, longest_s: float) -> None:
        time.sleep(self._random.random() * longest_s)

    def _run_dirs(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return [path.name for path in self._daemon.runtime_dir.iterdir()]
        return []

    # -- what must hold ------------------------------------------------------------------------------------------

    def _wait_settled(self, deadline: float) -> None:
        wait_for(lambda: all(launch["state"] in SETTLED for launch in self._active()), deadline - time.monotonic())

    def _check(self, fault: str, deadline: float) -> None:
        problems = ["never looked"]
        while problems:
            problems = self._problems()
            assert not problems or time.monotonic() < deadline, f"after {fault}: {problems}\n{self._daemon.log[-6000:]}"
            if problems:
                time.sleep(0.03)

    def _problems(self) -> list[str]:
        """A sentence for each thing that is not as it must be once everything has settled."""
        everything = self._daemon.request("GET", "/launches?all=true&limit=1000").json()["data"]
        by_id = {launch["launch_id"]: launch for launch in everything}
        gpus = self._daemon.request("GET", "/gpus").json()["data"]
        living = {key for key, launch in by_id.items() if launch["state"] not in ENDED}
        for launch_id in by_id.keys() - living - self._seen_ended:
            self._seen_ended.add(launch_id)
            failure = by_id[launch_id]["failure"]
            self.figures.ends[failure["class"] if failure else by_id[launch_id]["state"]] += 1
        newest = set(sorted(self._acknowledged)[-self._newest :])
        problems = [f"accepted launch {key} is forgotten" for key in newest - by_id.keys()]
        problems += [f"{key} is {by_id[key]['state']}" for key in living if by_id[key]["state"] not in SETTLED]
        problems += self._claim_problems(gpus, by_id, living)
        problems += self._process_problems(by_id, living)
        problems += [f"control group {path} is left" for path in orphans.cgroups(*(by_id.keys() - living))]
        problems += [f"folder {name} is left" for name in self._run_dirs() if name.rpartition(".")[0] not in living]
        return problems

    @staticmethod
    def _claim_problems(gpus: list[dict[str, Any]], by_id: dict[str, Any], living: set[str]) -> list[str]:
        problems = []
        claimed: dict[str, set[str]] = {}
        for gpu in gpus:
            owners = {str(claim["launch_id"]): float(claim["share"]) for claim in gpu["claims"]}
            for owner in owners:
                claimed.setdefault(owner, set()).add(gpu["uuid"])
            if owners.keys() - living:
                problems.append(f"{gpu['uuid']} is claimed by {owners.keys() - living}, which do not run")
            if sum(owners.values()) > 1:
                problems.append(f"{gpu['uuid']} is claimed twice: {owners}")
            if gpu["state"] not in {"free", "claimed"}:
                problems.append(f"{gpu['uuid']} is {gpu['state']}: {gpu['reason']}")
        problems += [
            f"{key} runs without its claims: {claimed.get(key)}"
            for key in living
            if claimed.get(key, set()) != {gpu["uuid"] for gpu in by_id[key]["gpus"]}
        ]
        return problems

    def _process_problems(self, by_id: dict[str, Any], living: set[str]) -> list[str]:
        """Processes that belong to no launch that lives, and engines that are not there."""
        problems = []
        running = set()
        for left in leftovers.processes_referring_to(self._daemon.root):
            mark = _mark(left.pid)
            if mark is None:
                if left.pid != self._daemon.pid and not orphans.is_dead(left.pid):
                    problems.append(f"process {left.pid} without a mark: {left.command}")
                continue
            _, launch_id, attempt = mark.split("/")
            running.add(left.pid)
            if launch_id not in living or int(attempt) != by_id[launch_id]["attempt"]:
                problems.append(f"orphan {left.pid} of {launch_id} attempt {attempt}: {left.command}")
        problems += [
            f"{key} is ready but its processes are gone"
            for key in living
            if by_id[key]["state"] == "ready" and not {by_id[key]["pid"], by_id[key]["shim_pid"]} <= running
        ]
        return problems


def _mark(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(orphans.MARK):
                return entry[len(orphans.MARK) :].decode()
    return None


def _children(pid: int | None) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(part) for part in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
