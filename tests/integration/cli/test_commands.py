"""The commands against the real control plane over made-up launches."""

import json
import threading

import pytest

from tests.support import commands
from tests.support.control_plane import NOW, SECRET_LINE, failed, key, launch_id, loading, make, view
from tests.support.listening import StubDaemon
from tests.support.waiting import wait_for
from vllm_bootstrap import compiled
from vllm_bootstrap.gpus.readings import Snapshot
from vllm_bootstrap.launches.types import EventView

ONE, TWO = launch_id(1), launch_id(2)


class Box(StubDaemon):
    def run(self, *args, **options):
        env = {"VLLM_BOOTSTRAP_URL": self.url, "VLLM_BOOTSTRAP_STATE_DIR": "/nonexistent", **options.pop("env", {})}
        return commands.run(*args, env=env, **options)

    def lines(self, *args, **options):
        result = self.run(*args, **options)
        assert result.code == 0, result.err
        return result.out.splitlines()


@pytest.fixture
def box(tmp_path):
    with Box(tmp_path) as made:
        yield made


# -- launch ---------------------------------------------------------------------------------------------------------


def test_launch_prints_the_id_in_a_pipe(box):
    assert box.lines("launch", "org/model") == [ONE]


def test_launch_sends_what_the_options_say(box):
    box.lines(
        "launch", "org/model", "--gpu", "0", "--gpu", "GPU-1", "--gpu-share", "0.5", "--served-model-name", "short",
        "--engine", "simulator", "--max-model-len", "4096", "--tp", "2", "--arg", "dtype=half", "--arg", "boot-delay=1",
        "--env", "A=b", "--label", "team=x", "--restart", "on-failure",
    )  # fmt: skip
    ((order, _, _),) = box.launches.calls
    assert order.gpu_ids == (0, "GPU-1")
    assert (order.gpu_share, order.tensor_parallel_size, order.engine) == (0.5, 2, "simulator")
    assert order.fields == {"dtype": "half", "max_model_len": 4096}
    assert (order.extra_args, order.env, order.labels) == ({"boot-delay": 1}, {"A": "b"}, {"team": "x"})
    assert (order.served_model_name, order.restart_policy) == ("short", "on-failure")


def test_launch_with_few_options_sends_few_fields(box):
    box.lines("launch", "org/model", "--gpus", "2", "--max-model-len", "auto")
    ((order, _, _),) = box.launches.calls
    assert (order.gpu_count, order.gpu_ids, order.extra_args, order.fields) == (2, None, {}, {"max_model_len": "auto"})


def test_launch_on_a_terminal_says_what_to_do_next(box):
    out = box.run("launch", "org/model", terminal=True).out
    assert "Launching org/model on GPU 0" in out
    assert f"vllm-bootstrap status {ONE}" in out


def becomes(box, state_view):
    """Let the first launch be something else after the second look at it."""
    looks = []

    def on_request(scope):
        if scope["path"].startswith("/status/"):
            looks.append(scope)
            if len(looks) == 2:
                box.launches.add(state_view)

    box.on_request = on_request


@pytest.mark.parametrize("terminal", [False, True])
def test_launch_and_wait_shows_phases(box, terminal):
    make_loading(box)
    becomes(box, view(1))
    result = box.run("launch", "org/model", "--wait", terminal=terminal)
    assert result.code == 0
    assert "loading the model" in result.out
    assert f"after 1.0 s at {box.url}/v1 (model 'model')" in result.out
    assert result.err == ""
    if not terminal:
        assert result.out.splitlines()[0] == f"{ONE}  loading the model (50 %)"
        assert "\x1b" not in result.out


def make_loading(box):
    launch = box.launches.launch

    async def loading_launch(order, owner, idempotency_key=None):
        await launch(order, owner, idempotency_key)
        return box.launches.add(loading(1))

    box.launches.launch = loading_launch


@pytest.mark.parametrize("terminal", [False, True])
def test_a_failed_launch_is_explained(box, terminal):
    make_loading(box)
    becomes(box, failed(1))
    result = box.run("launch", "org/model", "--wait", terminal=terminal)
    assert result.code == 1
    for said in ("bad flag", "unknown flag", SECRET_LINE, "Hint: remove it", f"vllm-bootstrap logs {ONE}"):
        assert said in result.err


def test_a_failed_launch_as_json(box):
    make_loading(box)
    becomes(box, failed(1))
    result = box.run("launch", "org/model", "--wait", "--json")
    assert result.code == 1
    assert result.json()["failure"]["class"] == "bad_flag"


def test_a_launch_that_is_stopped_meanwhile(box):
    make_loading(box)
    becomes(box, view(1, state="stopped"))
    result = box.run("launch", "org/model", "--wait")
    assert (result.code, result.err) == (1, "org/model was stopped before it was ready.\n")


def test_waiting_may_have_an_end(box):
    make_loading(box)
    result = box.run("launch", "org/model", "--wait", "--timeout", "0.05")
    assert result.code == 1
    assert "It goes on starting" in result.err
    assert "loading the model" in result.out


def test_ready_as_json(box):
    make_loading(box)
    becomes(box, view(1))
    assert box.run("launch", "org/model", "--wait", "--json").json()["state"] == "ready"
    assert box.run("launch", "org/model", "--json").json()["launch_id"] == ONE


# -- looking --------------------------------------------------------------------------------------------------------


def test_ps(box):
    box.launches.add(view(1, model="model"))
    box.launches.add(loading(2))
    box.launches.add(failed(3))
    header, *rows = box.lines("ps")
    assert header.split() == ["ID", "MODEL", "STATE", "GPUS", "AGE", "RUNNING", "QUEUED", "BATCH"]
    assert [row.split()[0] for row in rows] == [TWO, ONE]
    assert "model (org/model)" in rows[0]
    assert "bootstrapping (loading the model, 50 %)" in rows[0]
    assert len(box.lines("ps", "--all")) == 4
    assert "failed (bad flag)" in box.run("ps", "-a").out
    assert [row["launch_id"] for row in box.run("ps", "--json").json()["data"]] == [TWO, ONE]
    assert "There are more" in box.run("ps", "--limit", "1").err


def test_ps_on_a_terminal(box):
    assert box.run("ps", terminal=True).out == "Nothing is running.\n"
    assert box.run("ps", "--all", terminal=True).out == "There are no launches.\n"
    box.launches.add(view(1))
    out = box.run("ps", terminal=True).out
    assert "\x1b[32mready\x1b[0m" in out
    assert ONE in out


def test_status(box):
    box.launches.add(view(1, restart_policy="on-failure"))
    box.launches.rows[ONE] = [
        EventView(1, ONE, 1, NOW, "created", None, "bootstrapping", {}),
        EventView(2, ONE, 1, NOW, "became_ready", "bootstrapping", "ready", {}),
    ]
    out = box.run("status", ONE, "--events").out
    requests = "2 (2 realtime) running on 4 slots, 3 (3 batch) queued"
    for said in (f"{box.url}/proxy/{ONE}/v1", "team=a", "10 (shim 9)", requests, "on-failure"):
        assert said in out
    assert "created  bootstrapping" in out
    assert "became_ready  bootstrapping -> ready" in out
    assert len(box.run("status", ONE, "--events", "--json").json()["events"]) == 2
    assert "events" not in box.run("status", ONE, "--json").json()
    assert "\x1b[32mready" in box.run("status", ONE, terminal=True).out


def test_status_of_a_start_and_of_a_failure(box):
    box.launches.add(loading(1))
    out = box.run("status", ONE).out
    assert "about 4.0 s left" in out
    box.launches.add(failed(1))
    out = box.run("status", ONE).out
    for said in ("unknown flag (exit code 2)", f"| {SECRET_LINE}", "Hint: remove it"):
        assert said in out


def test_launches_may_be_named_by_model_or_by_a_part_of_the_id(box):
    box.launches.add(view(1, served_model_name="a"))
    box.launches.add(view(2, served_model_name="b", state="stopped"))
    assert box.run("status", "a", "--json").json()["launch_id"] == ONE
    assert box.run("status", ONE[-5:], "--json").json()["launch_id"] == ONE  # the active one is meant
    assert box.run("status", "b", "--json").json()["launch_id"] == TWO
    box.launches.add(view(3, served_model_name="b", state="stopped"))
    assert box.run("status", "b", "--json").json()["launch_id"] == launch_id(3)  # the newest of the ended
    box.launches.add(view(4, served_model_name="a"))
    unclear = box.run("status", "a")
    assert unclear.code == 2
    assert "may mean several launches" in unclear.err
    nothing = box.run("status", "zzz")
    assert (nothing.code, nothing.out) == (1, "")
    assert "No launch is called 'zzz'" in nothing.err


def test_gpus(box):
    header, *rows = box.lines("gpus")
    assert header.split()[:3] == ["GPU", "NAME", "STATE"]
    assert rows[0].split()[:4] == ["0", "Mock", "free", "1.0"]
    assert "3.0 GiB of 8.0 GiB" in rows[1]
    notes = box.run("gpus").err
    assert "GPU 1 has 3.0 GiB held by" in notes
    assert "GPU 2 cannot be judged: timed out" in notes
    assert box.run("gpus", "--json").json()["kind"] == "mock"
    assert "\x1b[32mfree" in box.run("gpus", terminal=True).out


@pytest.mark.parametrize(
    ("snapshot", "said"),
    [
        (Snapshot("cuda", unknown="NVML timed out"), "Nothing can be given out at the moment: NVML timed out"),
        (Snapshot("cuda", pids_trusted=False), "others' use is judged by memory"),
    ],
)
def test_what_is_wrong_with_all_gpus(box, snapshot, said):
    box.services.inventory.now = snapshot
    assert said in box.run("gpus").err


def test_version(box):
    plane = "compiled" if compiled.in_use() else "interpreted"
    assert box.lines("version")[1] == f"daemon 9.9 at {box.url} (build dev, dev, data plane {plane})"
    assert box.run("version", "--json").json()["daemon"]["version"] == "9.9"
    alone = box.run("version", env={"VLLM_BOOTSTRAP_URL": "http://127.0.0.1:1"})
    assert (alone.code, len(alone.out.splitlines())) == (0, 1)
    assert "No daemon answers" in alone.err
    assert box.run("--version").out == box.lines("version")[0] + "\n"


# -- logs -----------------------------------------------------------------------------------------------------------


def test_logs(box):
    box.launches.add(view(1))
    box.write_log("one\ntwo\n\x1b[2Jthree")
    assert box.run("logs", ONE).out == "one\ntwo\n\x1b[2Jthree"  # a pipe gets it as it is
    assert box.run("logs", ONE, terminal=True).out == "one\ntwo\nthree"
    assert box.run("logs", ONE, "--tail", "2").out == "two\n\x1b[2Jthree"
    assert box.run("logs", ONE, "--offset", "4").out == "two\n\x1b[2Jthree"
    assert box.run("logs", ONE, "--json").json()["next_offset"] == 17
    assert box.run("logs", ONE, "--tail", "1", "--offset", "1").code == 2
    assert box.run("logs", ONE, "--attempt", "7").code == 1


def test_long_logs_come_whole(box):
    box.launches.add(view(1))
    content = "".join(f"line {number} of a long log\n" for number in range(20_000))
    box.write_log(content)
    assert box.run("logs", ONE).out == content


def test_what_was_rotated_away_is_said(box):
    box.launches.add(view(1))
    box.write_log("kept\n", start=100)
    result = box.run("logs", ONE)
    assert (result.out, result.err) == ("kept\n", "(the log before byte 100 was rotated away)\n")


def test_following_goes_through_the_attempts(box):
    box.launches.add(view(1))
    box.write_log("first\n")

    def go_on():
        wait_for(lambda: asked)
        box.write_log("second\n", attempt=2)
        box.launches.add(view(1, attempt=2, state="bootstrapping"))
        wait_for(lambda: len(asked) == 2)
        box.launches.add(view(1, attempt=2, state="stopped"))

    asked = []
    box.on_request = lambda scope: asked.append(scope) if scope["path"].startswith("/logs/") else None
    thread = threading.Thread(target=go_on)
    thread.start()
    result = box.run("logs", "-f", ONE)
    thread.join()
    assert (result.code, result.out, result.err) == (0, "first\nsecond\n", "(attempt 2)\n")


def test_following_one_attempt_ends_with_it(box):
    box.launches.add(view(1, attempt=2))
    box.write_log("first\n")
    pages = [json.loads(line) for line in box.lines("logs", "--follow", "--attempt", "1", ONE, "--json")]
    assert [page["content"] for page in pages] == ["first\n"]


def test_a_key_for_logs_alone_can_follow(tmp_path):
    with Box(tmp_path, make([key("reader-of-logs", "logs")])) as box:
        box.launches.add(view(1, state="stopped"))
        box.write_log("one\n")
        env = {"VLLM_BOOTSTRAP_KEY": "reader-of-logs"}
        assert box.run("logs", "-f", ONE, env=env).out == "one\n"
        refused = box.run("ps", env=env)
        assert refused.code == 1
        assert "lacks the scope 'monitor'" in refused.err


# -- ending ---------------------------------------------------------------------------------------------------------


def test_stop(box):
    box.launches.add(view(1))
    assert box.lines("stop", ONE) == [f"{ONE}  stopped"]
    assert box.launches.calls == [(ONE, True, False)]
    assert box.lines("stop", ONE, "--force", "--no-wait")[0].startswith(f"{ONE}  stopped, by force")
    assert "memory not back yet on GPU-0" in box.run("stop", ONE, "--force").out
    assert box.run("stop", ONE, "--json").json()["data"][0]["state"] == "stopped"


def test_stop_all_begins_everywhere_before_it_waits(box):
    assert box.lines("stop", "--all") == ["Nothing is running."]
    box.launches.add(view(1))
    box.launches.add(view(2))
    assert len(box.lines("stop", "--all")) == 2
    assert [(name, wait) for name, wait, _ in box.launches.calls] == [
        (TWO, False), (ONE, False), (TWO, True), (ONE, True),
    ]  # fmt: skip


@pytest.mark.parametrize("args", [["stop"], ["stop", "--all", ONE], ["rm"], ["launch"], ["nonsense"], ["ps", "--nope"]])
def test_usage_errors(box, args):
    assert box.run(*args).code == 2


@pytest.mark.parametrize("arg", [["--arg", "=1"], ["--env", "A"], ["--label", "A"], ["--gpus", "0"], ["--gpus", "x"]])
def test_usage_errors_of_launch(box, arg):
    assert box.run("launch", "m", *arg).code == 2
    assert box.launches.calls == []


def test_rm(box):
    box.launches.add(view(1, state="stopped"))
    box.launches.add(view(2))
    assert box.lines("rm", ONE) == [f"{ONE}  deleted"]
    assert box.run("rm", TWO).code == 1
    box.launches.add(view(1, state="stopped"))
    assert box.run("rm", ONE, "--json").json()["data"][0]["deleted"] is True


# -- errors ---------------------------------------------------------------------------------------------------------


def test_errors_are_one_sentence_or_the_body(box):
    told = box.run("status", ONE)
    assert (told.code, told.out, told.err) == (1, "", f"error: No launch '{ONE}'. (launch_id)\n")
    body = json.loads(box.run("status", ONE, "--json").err)
    assert body["error"]["code"] == "not_found"
    usage = json.loads(box.run("stop", "--json").err)
    assert usage["error"]["code"] == "usage"


def test_nobody_there(box):
    told = box.run("ps", "--url", "http://127.0.0.1:1")
    assert told.code == 1
    assert "No daemon answers at http://127.0.0.1:1 (connection refused)" in told.err
    assert box.run("ps", "--url", "ftp://x").code == 2


def test_a_missing_key_is_explained(tmp_path):
    with Box(tmp_path, make([key("the-key-of-all", "admin")])) as box:
        told = box.run("ps")
        assert told.code == 1
        assert "VLLM_BOOTSTRAP_KEY" in told.err
        assert box.run("ps", "--key", "the-key-of-all").code == 0


def test_help_lists_every_command(box):
    out = box.run("--help").out
    for name in (
        "serve",
        "launch",
        "ps",
        "status",
        "logs",
        "stop",
        "rm",
        "gpus",
        "keys",
        "batch",
        "models",
        "run",
        "chat",
        "demo",
        "version",
    ):
        assert f"\n  {name} " in out
