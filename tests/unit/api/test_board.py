"""What the page shows, out of what the API answers."""

import pytest

from tests.support.control_plane import launch_id, view
from tests.support.statuses import GIB, ID, NOW, gpu, gpus, status
from vllm_bootstrap.api import board

FAILURE = {"class": "gpu_out_of_memory", "message": "Out of memory.", "hint": "Use less.", "permanent": False}


def card(*args, **fields):
    return board.launch_card(status(*args, **fields), NOW)


def test_active_and_ended_launches_are_apart():
    launches = [status("ready"), status("stopped"), status("bootstrapping"), status("failed", failure=FAILURE)]
    made = board.make(launches, gpus(gpu(0), gpu(1, "claimed")), NOW, frozenset({"logs"}))
    assert [c.tone for c in made.active] == ["ready", "bootstrapping"]
    assert [c.tone for c in made.ended] == ["stopped", "failed"]
    assert made.headline == "1 ready · 1 loading · 1 of 2 GPUs free"
    assert made.allowed == {"logs"}


def test_only_the_last_ended_launches_are_worth_showing():
    ended = [view(n, state="stopped") for n in range(30, 10, -1)]
    running = [view(5), view(1, state="bootstrapping")]
    shown = board.worth_showing([*ended, *running])
    assert [v.launch_id for v in shown] == [launch_id(n) for n in (*range(30, 30 - board.ENDED_SHOWN, -1), 5, 1)]


def test_a_replica_says_that_it_is_one_of_several():
    one = card("ready", group_id="g01hxyzabcdefghjkmnp0", group_size=3)
    assert one.device == "GPU 0 · one of 3 replicas"
    assert ("group", "g01hxyzabcdefghjkmnp0") in one.facts
    alone = card("ready")
    assert alone.device == "GPU 0"
    assert "group" not in dict(alone.facts)


def test_a_box_without_gpus_says_so():
    made = board.make([], gpus(gpu(kind="cpu", name="x86", uuid="cpu"), kind="cpu"), NOW, frozenset())
    assert made.headline == "0 ready · no GPU here, models run on the CPU"
    assert (made.gpus[0].title, made.gpus[0].name) == ("CPU", "")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, ""),
        ({"unknown": "NVML timed out"}, "Nothing can be given out at the moment: NVML timed out"),
        ({"pids_trusted": False}, "judged by memory alone"),
    ],
)
def test_what_is_wrong_with_all_gpus_is_said_once(fields, said):
    note = board.make([], gpus(**fields), NOW, frozenset()).gpu_note
    assert said in note
    assert bool(note) is bool(said)


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (
            status("ready", load={"capacity": 8, "in_flight": {"realtime": 2, "batch": 1}, "queued": {"batch": 4}}),
            "3 of 8 running · 4 queued · up 10 s",
        ),
        (status("ready"), "0 running · 0 queued · up 10 s"),
        (status("stopping", stopping_because="unhealthy"), "no longer healthy, for 10 s"),
        (status("bootstrapping"), ""),
        (status("bootstrapping", attempt=3), "attempt 3"),
        (status("stopped"), "ended 10 s ago, lasted 50 s"),
    ],
)
def test_one_line_sums_a_launch_up(launch, said):
    assert board.launch_card(launch, NOW).summary == said


@pytest.mark.parametrize(
    ("fields", "percent", "label"),
    [
        ({}, None, "starting"),
        ({"attempt": 2, "next_attempt_at": NOW}, None, "waiting for attempt 2"),
        ({"progress": {"phase": "weights", "fraction": 0.5, "elapsed_s": 12}}, 50, "loading weights 50 % · 12 s"),
        (
            {"progress": {"phase": "compile", "elapsed_s": 30, "eta_s": 10}},
            75, "compiling · 30 s · about 10 s left",
        ),
        (
            {"progress": {"phase": "compile", "elapsed_s": 30, "eta_s": 0}},
            99, "compiling · 30 s · longer than last time",
        ),
        ({"progress": {"phase": "boot", "elapsed_s": 0, "eta_s": 0}}, None, "starting the engine · 0.0 s"),
        (
            {"progress": {"phase": "load", "elapsed_s": 30, "downloaded_bytes": GIB}},
            None, "loading the model (1.0 GiB in the cache) · 30 s",
        ),
        (
            {"progress": {"phase": "load", "elapsed_s": 30, "downloaded_bytes": GIB, "download_total_bytes": 2 * GIB}},
            None, "loading the model (1.0 GiB of 2.0 GiB in the cache) · 30 s",
        ),
    ],
)  # fmt: skip
def test_the_bar_of_a_start(fields, percent, label):
    assert card("bootstrapping", **fields).bar == board.Bar(percent, label)


def test_only_a_start_has_a_bar():
    assert card("ready").bar is None


@pytest.mark.parametrize(
    ("claims", "shown"),
    [
        ([], ""),
        ([{"uuid": "cpu", "index": 0, "share": 1}], "CPU"),
        ([{"uuid": "a", "index": 1, "share": 0.5}], "GPU 1 (50 %)"),
        ([{"uuid": "a", "index": 1, "share": 1}, {"uuid": "b", "share": 1}], "GPU 1, b"),
    ],
)
def test_where_a_launch_runs(claims, shown):
    assert card(gpus=claims).device == shown


@pytest.mark.parametrize(
    ("state", "fields", "tone", "label", "can_stop"),
    [
        ("bootstrapping", {}, "bootstrapping", "loading", True),
        ("ready", {}, "ready", "ready", True),
        ("ready", {"unresponsive": True}, "unresponsive", "unresponsive", True),
        ("stopping", {}, "stopping", "stopping", False),
        ("failed", {}, "failed", "failed", False),
    ],
)
def test_states_have_a_look_and_a_word(state, fields, tone, label, can_stop):
    made = card(state, **fields)
    assert (made.tone, made.label, made.can_stop) == (tone, label, can_stop)


@pytest.mark.parametrize(
    ("fields", "ended"), [({}, ""), ({"exit_code": 1}, "exit code 1"), ({"exit_code": None, "signal": 9}, "signal 9")]
)
def test_failures(fields, ended):
    made = card("failed", failure={**FAILURE, "lines": ["a", "b"], **fields}).failure
    assert made == board.FailureCard("gpu out of memory", "Out of memory.", "Use less.", ended, ("a", "b"))
    assert card("failed", failure=FAILURE).failure.lines == ()


def test_details_leave_out_what_says_nothing():
    plain = dict(card("ready", pid=None).facts)
    assert set(plain) == {"engine", "owner", "own path", "started"}
    full = dict(
        card(
            "stopping", served_model_name="short", pid=7, shim_pid=6, restart="on-failure", attempt=2, labels={"a": "b"}
        ).facts
    )
    assert full["model"] == "org/model"
    assert full["process"] == "7 under 6"
    assert full["restart"] == "on-failure, attempt 2"
    assert full["labels"] == "a=b"
    assert "own path" not in full


def test_a_gpu_with_owners():
    found = gpu(
        2, "claimed", memory_used_bytes=20 * GIB, utilization=0.37, temperature_c=64, power_w=310.4,
        claims=[{"launch_id": ID, "share": 0.25}, {"launch_id": "l2", "share": 1.0}], reason="is owned by launch l",
    )  # fmt: skip
    made = board.gpu_card(found, {ID: "short"})
    assert (made.key, made.title, made.memory) == ("gpu-2", "GPU 2", board.Bar(25, "20.0 GiB of 80.0 GiB"))
    assert (made.warmth, made.load) == ("64 °C · 310 W", "load 37 %")
    assert made.owners == (board.Owner(ID, "short", "25 %"), board.Owner("l2", "l2", ""))
    assert made.reason == ""


def test_a_gpu_that_says_nothing():
    made = board.gpu_card(gpu(0, "unknown", memory_used_bytes=None, reason="cannot be judged: timed out"), {})
    assert made.memory == board.Bar(None, "80.0 GiB, use not known")
    assert (made.warmth, made.load, made.reason) == ("", "", "cannot be judged: timed out")


def test_others_are_named_as_far_as_they_are_known():
    users = [{"pid": 7, "name": "python3", "user": "eve", "used_bytes": GIB}, {}]
    made = board.gpu_card(gpu(0, "busy", others=users, reason="has 1 GiB held by pid 7"), {})
    assert made.others == ("pid 7 python3 of eve with 1.0 GiB", "a process")
    assert made.reason == ""  # it would say the same again
    assert board.gpu_card(gpu(0, "busy", reason="has 1 GiB held by others"), {}).reason == "has 1 GiB held by others"


def test_memory_without_a_total_has_no_bar():
    assert board.gpu_card(gpu(0, memory_total_bytes=0), {}).memory.percent is None
