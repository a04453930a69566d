"""Many clients at once: for the same GPUs, for the same launch, with the same key, and in the middle of a start."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import orphans
from tests.support.daemon import ENDED, DaemonProcess
from tests.support.waiting import wait_for

RACERS = 100
CLIENTS = 25


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(stop_grace_s="2") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left_running(daemon):
    """What a failed test leaves must not fail the next one."""
    yield
    for launch in daemon.request("GET", "/launches").json()["data"]:
        daemon.stop_launch(launch["launch_id"], force="true")


class OwnersWatch:
    """Looks at the GPUs as long as the race lasts: by the daemon's words and by what engines were really given."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon, self._over = daemon, threading.Event()
        self.looks, self.problems = 0, []
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join(10)

    def _watch(self):
        while not self._over.is_set():
            for gpu in self._daemon.request("GET", "/gpus").json()["data"]:
                shares = [claim["share"] for claim in gpu["claims"]]
                if sum(shares) > 1:
                    self.problems.append(gpu)
            self.looks += 1


def devices_of_engines(daemon: DaemonProcess) -> Counter[tuple[str, str]]:
    """(GPU, launch) as written in the environments of living processes, without asking the daemon."""
    found: Counter[tuple[str, str]] = Counter()
    for pid in orphans.marked(daemon.state_id):
        try:
            pairs = [entry.split(b"=", 1) for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
        except OSError:
            continue
        environ = {pair[0]: pair[1].decode() for pair in pairs if len(pair) == 2}
        for uuid in filter(None, environ.get(b"CUDA_VISIBLE_DEVICES", "").split(",")):
            found[uuid, environ[b"VBS_LAUNCH"].split("/")[1]] += 1
    return found


def race(daemon: DaemonProcess, orders: list[dict]) -> tuple[list[dict], list]:
    """Send all orders from many clients; the winners' statuses and the losers' answers."""
    wishes = [{"model": "sim", "engine": "simulator", **order} for order in orders]
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda wish: daemon.request("POST", "/launch", wish, timeout_s=60), wishes))
    assert {answer.status for answer in answers} <= {201, 409}
    return [a.json() for a in answers if a.status == 201], [a for a in answers if a.status == 409]


def assert_refused_by_name(losers: list, winners: list[dict]) -> None:
    ids = {launch["launch_id"] for launch in winners}
    for answer in losers:
        assert answer.error["code"] == "gpu_conflict"
        assert answer.headers["x-should-retry"] == "false"
        named = {owner for gpu in answer.error["gpus"] for owner in gpu["owners"]}
        assert named
        assert named <= ids
        assert all(owner in answer.error["message"] for owner in named)


def stop_all(daemon: DaemonProcess, launches: list[dict]) -> None:
    with ThreadPoolExecutor(4) as clients:
        states = clients.map(lambda launch: daemon.stop_launch(launch["launch_id"]).json()["state"], launches)
        assert set(states) == {"stopped"}
    daemon.assert_no_leftovers()


def test_a_hundred_launches_for_two_gpus_have_two_winners_at_most(daemon):
    pick = random.Random(5)
    wishes = [{"gpu_count": 1}, {"gpu_ids": [0]}, {"gpu_ids": [1]}, {}]
    with OwnersWatch(daemon) as watch:
        winners, losers = race(daemon, [pick.choice(wishes) for _ in range(RACERS)])
        for launch in winners:
            daemon.wait_state(launch["launch_id"], "ready")
        engines = devices_of_engines(daemon)
    assert watch.looks > 0
    assert watch.problems == []
    assert len(winners) + len(losers) == RACERS
    owned = [gpu["uuid"] for launch in winners for gpu in launch["gpus"]]
    assert sorted(owned) == ["GPU-mock-0", "GPU-mock-1"]
    assert sorted(uuid for uuid, _ in engines) == sorted(owned)
    assert_refused_by_name(losers, winners)
    stop_all(daemon, winners)


def test_a_hundred_launches_that_share_never_own_more_than_there_is(daemon):
    """Four halves fit; those that want a whole GPU get one or nothing."""
    pick = random.Random(6)
    wishes = [{"gpu_count": 1, "gpu_share": 0.5}] * 4 + [{"gpu_count": 1}]
    with OwnersWatch(daemon) as watch:
        winners, losers = race(daemon, [pick.choice(wishes) for _ in range(RACERS)])
        for launch in winners:
            daemon.wait_state(launch["launch_id"], "ready", timeout_s=30)
        engines = devices_of_engines(daemon)
    assert watch.problems == []
    shares = Counter()
    for launch in winners:
        for gpu in launch["gpus"]:
            shares[gpu["uuid"]] += gpu["share"]
    assert shares == {"GPU-mock-0": 1, "GPU-mock-1": 1}
    assert engines.keys() == {(gpu["uuid"], launch["launch_id"]) for launch in winners for gpu in launch["gpus"]}
    assert_refused_by_name(losers, winners)
    stop_all(daemon, winners)


def test_one_idempotency_key_used_by_many_at_once_gives_one_launch(daemon):
    wish = {"model": "sim", "engine": "simulator"}
    with ThreadPoolExecutor(20) as clients:
        sent = [clients.submit(daemon.request, "POST", "/launch", wish, {"idempotency-key": "k-1"}) for _ in range(20)]
        answers = [future.result() for future in sent]
    assert {answer.status for answer in answers} == {201}
    ids = {answer.json()["launch_id"] for answer in answers}
    assert len(ids) == 1
    daemon.stop_launch(ids.pop())
    daemon.assert_no_leftovers()


def test_sixty_calls_at_once_on_one_launch_end_in_one_state(daemon):
    pick = random.Random(7)
    launch_id = daemon.launch(knobs={"boot-delay": 0.3, "fork-setsid-child": True})
    calls = [
        lambda: daemon.request("POST", f"/stop/{launch_id}", {}, timeout_s=60),
        lambda: daemon.request("POST", f"/stop/{launch_id}?wait=false", {}),
        lambda: daemon.request("POST", f"/stop/{launch_id}?force=true", {}, timeout_s=60),
        lambda: daemon.request("DELETE", f"/launches/{launch_id}"),
        lambda: daemon.request("GET", f"/status/{launch_id}"),
        lambda: daemon.request("POST", "/launch", {"model": "sim", "engine": "simulator", "gpu_count": 1}),
    ]
    with ThreadPoolExecutor(30) as clients:
        answers = [f.result() for f in [clients.submit(pick.choice(calls)) for _ in range(60)]]
    # Too early to delete, too late to ask, no GPU left: all of that is an answer. Anything else is not.
    assert {answer.status for answer in answers} <= {200, 201, 202, 404, 409}
    wait_for(
        lambda: daemon.request("GET", f"/status/{launch_id}").json().get("state", "deleted") in {*ENDED, "deleted"}
    )
    others = [answer.json()["launch_id"] for answer in answers if answer.status == 201]
    for other in others:
        assert daemon.stop_launch(other).json()["state"] == "stopped"
    if (last := daemon.request("GET", f"/status/{launch_id}")).status == 200:
        assert last.json()["state"] == "stopped"
        assert daemon.request("DELETE", f"/launches/{launch_id}").status == 200
    assert daemon.request("GET", f"/status/{launch_id}").status == 404
    daemon.assert_no_leftovers()


# Where a start stands, as its own log on the disk says at that moment; the daemon looks at it only now and then.
LOGGED = {
    "importing": "vLLM server version",
    "download": "Starting to load model",
    "loading": "50% Completed",
    "compiling": "for vLLM's torch.compile",
    "capturing": "Capturing CUDA graphs",
}


def is_at(daemon: DaemonProcess, launch_id: str, moment: str) -> bool:
    if moment in LOGGED:
        written = (daemon.state_dir / "logs" / launch_id / "1").glob("*")
        return any(LOGGED[moment] in path.read_text() for path in written)
    found = daemon.status(launch_id)
    if moment == "waiting for the GPU":
        return found["progress"]["phase"] == "waiting_for_gpu"
    return found["shim_pid"] is not None if moment == "spawned" else found["state"] == "ready"


@pytest.mark.parametrize("moment", ["waiting for the GPU", "spawned", *LOGGED, "ready"])
def test_a_stop_at_any_step_of_the_start_leaves_nothing(daemon, moment):
    pick = random.Random(moment)
    order = {"gpu_ids": [0], "gpu_share": 0.4, "knobs": {"boot-delay": 1.0, "download-seconds": 0.2}}
    first = wanted = daemon.launch(f"m/{moment[:3]}", **order)
    if moment == "waiting for the GPU":
        wanted = daemon.launch("m/second", **order)
    wait_for(lambda: is_at(daemon, wanted, moment), 15, 0.005, moment)
    outcome = daemon.stop_launch(wanted, **pick.choice([{}, {"force": "true"}])).json()
    assert outcome["state"] == "stopped"
    if wanted != first:
        daemon.stop_launch(first)
    daemon.assert_no_leftovers()


def test_stops_at_random_moments_of_the_start_leave_nothing(daemon):
    pick = random.Random(8)
    never = threading.Event()

    def start_and_stop(gpu: int) -> list[str]:
        ends = []
        for _ in range(6):
            launch_id = daemon.launch(gpu_ids=[gpu], knobs={"boot-delay": 0.3, "fork-setsid-child": True})
            never.wait(pick.random() * 0.7)
            ends.append(daemon.stop_launch(launch_id).json()["state"])
        return ends

    with ThreadPoolExecutor(2) as clients:
        ends = [*clients.map(start_and_stop, [0, 1])]
    assert {state for found in ends for state in found} == {"stopped"}
    daemon.assert_no_leftovers()
