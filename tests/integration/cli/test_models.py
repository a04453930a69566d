"""Commands about the catalogue, against the real control plane over a made-up catalogue."""

import json
from dataclasses import replace
from unittest import mock

import pytest

from tests.support import commands
from tests.support.listening import StubDaemon
from tests.support.model_desk import LAUNCH, MIB, NOW, OOM, entry, rich
from vllm_bootstrap.cli import model_progress
from vllm_bootstrap.models.types import (
    FitReport,
    GpuNeed,
    ModelLaunch,
    ModelProgress,
    ModelView,
    PrefetchView,
)

CHAT = "org/chat"


class Box:
    """Runs commands against ``daemon``."""

    def __init__(self, daemon):
        self.daemon, self.desk = daemon, daemon.services.models

    def run(self, *args, **options):
        env = {"VLLM_BOOTSTRAP_URL": self.daemon.url, "VLLM_BOOTSTRAP_STATE_DIR": "/nonexistent"}
        return commands.run("models", *args, env=env, **options)

    def lines(self, *args, **options):
        result = self.run(*args, **options)
        assert result.code == 0, result.err
        return result.out.splitlines()


@pytest.fixture
def box(tmp_path):
    with StubDaemon(tmp_path) as daemon:
        made = Box(daemon)
        made.desk.put(rich())
        yield made


def stage(state, fraction=None, eta=None, **fields):
    progress = None if fraction is None else ModelProgress("weights", fraction, 1.0, eta)
    return ModelView(rich(), state, progress=progress, **fields)


# -- list -----------------------------------------------------------------------------------------------------------


def test_the_list_is_a_table_of_plain_lines_in_a_pipe(box):
    running = (ModelLaunch(LAUNCH, "ready", 1),)
    box.desk.put(
        entry("busy"), state="loaded", launches=running, in_flight=1, waiting={"realtime": 2, "batch": 1},
        batch_lines=9, idle_s=0.0, load_est_s=42.0, outdated=True,
    )  # fmt: skip
    box.desk.put(entry("broken"), state="failed", trouble=OOM)
    box.desk.put(entry("coming"), state="loading", progress=ModelProgress("weights", 0.25, 1.0, None))
    header, broken, busy, coming, chat = [line.split("  ") for line in box.lines("list")]
    assert [cell.strip() for cell in header if cell] == ["NAME", "STATE", "REQUESTS", "IDLE", "LOADS IN", "SOURCE"]
    assert [cell.strip() for cell in busy if cell] == [
        "busy", "loaded, outdated", "1 running, 3 waiting, 9 batch lines", "0.0 s", "42 s", "hub/busy",
    ]  # fmt: skip
    assert "failed (oom)" in "  ".join(broken)
    assert "loading 25 %" in "  ".join(coming)
    assert [cell.strip() for cell in chat if cell] == [CHAT, "unloaded", "-", "-", "-", "hub/chat"]


def test_the_list_goes_by_state(box):
    box.desk.put(entry("other"), state="falling_asleep")
    assert [line.split()[0] for line in box.lines("list", "--state", "falling asleep")] == ["NAME", "other"]
    assert box.run("list", "--state", "happy").code == 2


def test_a_list_that_is_not_whole_says_so(box):
    for number in range(1001):
        box.desk.put(entry(f"m{number}"))
    found = box.run("list")
    assert len(found.out.splitlines()) == 1001
    assert "There are more models" in found.err


def test_a_failure_without_hint_and_log(box):
    box.desk.put(entry("broken"), state="failed", trouble=replace(OOM, hint="", launch_id=None))
    assert box.run("list", "broken").err == "  The weights need more than there is.\n"


def test_an_empty_list_says_so_to_people(box):
    assert "No model is loaded." in box.run("list", "--state", "loaded", terminal=True).out
    box.desk.views.clear()
    assert "There is no model in the catalogue." in box.run("list", terminal=True).out
    assert len(box.lines("list")) == 1


def test_a_broken_edit_of_the_file_is_told(box):
    box.desk.note = "line 3: gpu: no such key"
    found = box.run("list")
    assert "not in force: line 3" in found.err
    assert found.code == 0


def test_the_list_as_json(box):
    assert [row["name"] for row in box.run("list", "--json").json()["data"]] == [CHAT]
    assert box.run("list", CHAT, "--json").json()["entry"]["source"] == "hub/chat"


def test_one_model_in_detail(box):
    full = replace(
        rich(), revision="v2", engine="vllm", gpus=GpuNeed(2, None, None, 0.5), replicas=2, ttl_s=900, pin=True,
        priority=3, extra_args={"swap-space": 4},
    )  # fmt: skip
    launches = (ModelLaunch(LAUNCH, "ready", 1),)
    box.desk.put(
        full, state="failed", why="It is tried again soon.", launches=launches, trouble=OOM, loaded_at=NOW,
        load_est_s=42.0, wake_est_s=2.0,
    )  # fmt: skip
    found = box.run("list", "chat")
    for words in (
        "failed (oom)", "It is tried again soon.", f"{LAUNCH} (ready)", "2027-01-15 08:00:00Z", "hub/chat at v2",
        "the catalogue's file", "chat, gpt-4o", "sql", "max_model_len=8192, swap-space=4", "50 %", "15 m 0 s", "pinned",
        "For talk.",
    ):  # fmt: skip
        assert words in found.out, words
    assert f"Log:  vllm-bootstrap logs {LAUNCH}" in found.err
    assert "Hint: Give it more GPUs." in found.err
    box.desk.put(
        replace(rich(), gpus=GpuNeed(ids=("GPU-0", 1))), state="loading", progress=ModelProgress(None, None, 3.0, 4.0)
    )
    assert "3.0 s, about 4.0 s left" in box.run("list", CHAT).out
    assert "GPU-0, 1" in box.run("list", CHAT).out


def test_a_name_that_stands_for_nothing(box):
    found = box.run("list", "no/such")
    assert (found.code, "does not exist" in found.err) == (1, True)
    assert json.loads(box.run("pull", "no/such", "--json").err)["error"]["code"] == "model_not_found"


# -- pull -----------------------------------------------------------------------------------------------------------


def fetching(box, *steps):
    """Let the download of the model be something else at each look."""
    left = list(steps)
    get = box.desk.get_download

    def look(name):
        if left:
            box.desk.fetched[name] = replace(box.desk.fetched[name], **left.pop(0))
        return get(name)

    box.desk.get_download = look


def test_pull_tells_each_step_in_a_pipe(box):
    fetching(
        box,
        {"bytes_done": 5 * MIB, "bytes_total": 10 * MIB, "files_done": 1, "files_total": 2, "rate": MIB, "eta_s": 5.0},
        {"bytes_done": 10 * MIB, "state": "completed", "commit": "c0ffee0123456789"},
    )  # fmt: skip
    assert box.lines("pull", CHAT) == [
        f"{CHAT}  downloading, 0 B",
        f"{CHAT}  downloading, 5.0 MiB of 10.0 MiB, 1 of 2 files, 1.0 MiB/s, about 5.0 s left",
        f"{CHAT}  on the disk, 10.0 MiB (c0ffee012345)",
    ]


def test_pull_draws_a_bar_on_a_terminal(box):
    fetching(box, {"bytes_done": 5, "bytes_total": 10}, {"bytes_done": 10, "state": "completed"})
    found = box.run("pull", CHAT, terminal=True)
    assert "downloading" in found.out
    assert "on the disk" in found.out.splitlines()[-1]


def test_pull_that_fails_has_exit_code_1(box):
    fetching(box, {"state": "failed", "error": "The repository is gated.", "hint": "Set HF_TOKEN."})
    found = box.run("pull", CHAT)
    assert (found.code, found.err) == (
        1, f"error: The download of {CHAT} failed: The repository is gated. Set HF_TOKEN.\n",
    )  # fmt: skip


def test_pull_without_waiting_giving_it_up_and_json(box):
    assert box.lines("pull", CHAT, "--no-wait") == [f"{CHAT}  running"]
    assert box.lines("pull", CHAT, "--cancel") == [f"{CHAT}  cancelled"]
    assert box.run("pull", CHAT, "--cancel", "--json").json()["state"] == "cancelled"
    box.desk.fetched[CHAT] = replace(box.desk.fetched[CHAT], state="completed")
    assert box.run("pull", CHAT, "--json").json()["state"] == "completed"


def test_ctrl_c_leaves_a_download_running(box):
    with mock.patch.object(model_progress.Lines, "update", side_effect=KeyboardInterrupt):
        found = box.run("pull", CHAT)
    assert found.code == 1
    assert f"It goes on. To look again: vllm-bootstrap models pull {CHAT}" in found.err
    assert box.desk.fetched[CHAT].state == "running"


# -- load, unload, check --------------------------------------------------------------------------------------------


def test_load_tells_each_phase_in_a_pipe(box):
    box.desk.steps = [stage("loading", 0.52), stage("loading", 0.58), stage("waking"), stage("loaded")]
    lines = box.lines("load", "chat")
    assert lines[0].startswith("chat  loading weights, 50 %, 3.0 s, about 4.0 s left")
    assert lines[-2:] == ["chat  waking up", f"{CHAT}  loaded"]
    assert len(lines) == 4, "steps within a tenth are not told again"


def test_load_draws_a_bar_on_a_terminal(box):
    box.desk.steps = [stage("loading", why="Waits for room."), stage("loaded")]
    found = box.run("load", CHAT, terminal=True)
    assert "loading" in found.out
    assert "loaded" in found.out.splitlines()[-1]


def test_load_that_fails_has_exit_code_1_and_the_hint(box):
    box.desk.trouble = OOM
    found = box.run("load", CHAT)
    assert (found.code, "Give it more GPUs." in found.err) == (1, True)


def test_load_without_waiting_and_json(box):
    assert box.lines("load", CHAT, "--no-wait")[0].startswith(f"{CHAT}  loading")
    box.desk.put(rich())
    box.desk.steps = [stage("loaded")]
    assert box.run("load", CHAT, "--json").json()["state"] == "loaded"


def test_unload(box):
    box.desk.put(entry(pin=True), state="loaded")
    assert box.run("unload", CHAT).code == 1
    assert box.lines("unload", CHAT, "--force") == [f"{CHAT}  unloaded"]
    assert box.run("unload", CHAT, "--force", "--json").json()["state"] == "unloaded"


def test_check_that_fits(box):
    box.desk.fit = FitReport(
        fits=True, why="It fits.", weights_bytes=8 * MIB, kv_bytes_per_token=1024, overhead_bytes=MIB,
        budget_bytes=20 * MIB, free_bytes=30 * MIB, gpu_count=2, max_model_len=4096, max_tokens_in_cache=9000,
    )  # fmt: skip
    out = "\n".join(box.lines("check", CHAT, "--gpus", "2", "--max-model-len", "4096"))
    assert f"{CHAT}  fits: It fits." in out
    assert "9000 tokens at once, 1.0 KiB each" in out
    assert box.desk.calls == [("check", CHAT, 2, 4096)]


def test_check_that_does_not_fit_has_exit_code_1_and_says_what_would(box):
    box.desk.fit = FitReport(fits=False, why="Too long.", suggestions=({"message": "2 GPUs would do."},))
    found = box.run("check", CHAT)
    assert (found.code, found.out) == (1, f"{CHAT}  does not fit: Too long.\n")
    assert "2 GPUs would do." in found.err
    as_json = box.run("check", CHAT, "--json")
    assert (as_json.code, as_json.json()["fits"]) == (1, False)


def test_check_that_cannot_be_told_is_no_failure(box):
    box.desk.fit = FitReport(fits=None, why="Nothing is on the disk.")
    assert box.lines("check", CHAT) == [f"{CHAT}  unclear: Nothing is on the disk."]


# -- prefetch -------------------------------------------------------------------------------------------------------


def test_prefetch(box):
    assert box.run("prefetch", CHAT).code == 1
    box.desk.store(CHAT)
    assert box.lines("prefetch", CHAT, "--no-wait") == [f"{CHAT}  reading ahead, 1.0 MiB"]
    assert box.lines("prefetch", CHAT, "--cancel") == [f"{CHAT}  cancelled, 1.0 MiB"]
    box.desk.warmed[CHAT] = PrefetchView(CHAT, "completed", MIB, MIB, 0.5)
    assert box.lines("prefetch", CHAT) == [f"{CHAT}  completed, 1.0 MiB in 0.5 s"]
    assert box.run("prefetch", CHAT, "--json").json()["state"] == "completed"


def test_prefetch_tells_how_far_it_is(box):
    box.desk.store(CHAT)
    get, looks = box.desk.get_prefetch, []

    def look(name):
        looks.append(name)
        if len(looks) == 2:
            box.desk.warmed[name] = PrefetchView(name, "completed", 8 * MIB, 8 * MIB, 2.0)
        return get(name)

    box.desk.get_prefetch = look
    assert box.lines("prefetch", CHAT) == [
        f"{CHAT}  reading ahead, 1.0 MiB of 8.0 MiB, 2.0 MiB/s",
        f"{CHAT}  completed, 8.0 MiB in 2.0 s",
    ]


# -- add, rm --------------------------------------------------------------------------------------------------------


def test_add_sends_what_the_options_say(box):
    args = (
        "--alias",
        "a",
        "--alias",
        "b",
        "--revision",
        "v2",
        "--gpus",
        "2",
        "--max-model-len",
        "4096",
        "--ttl",
        "15m",
    )
    assert box.lines("add", "new", "hub/new", *args, "--pin") == ["new"]
    ((_, sent, _),) = box.desk.calls
    assert sent == {
        "name": "new", "source": "hub/new", "aliases": ["a", "b"], "revision": "v2", "gpus": {"count": 2},
        "args": {"max_model_len": 4096}, "ttl": "15m", "pin": True,
    }  # fmt: skip


def test_add_says_what_to_do_next_on_a_terminal_and_gives_json(box):
    assert "vllm-bootstrap models pull new" in box.run("add", "new", "hub/new", terminal=True).out
    assert box.run("add", "newer", "hub/new", "--json").json()["origin"] == "runtime"


def test_add_takes_an_entry_as_json(box, tmp_path):
    path = tmp_path / "entry.json"
    path.write_text(json.dumps({"source": "hub/new", "gpus": {"share": 0.5}, "strip": ["seed"]}))
    box.lines("add", "new", "--entry", str(path), "--gpus", "1")
    box.lines("add", "newer", "--entry", "-", stdin='{"source": "hub/newer"}')
    box.lines("add", "hub/self")
    assert [call[1] for call in box.desk.calls] == [
        {"name": "new", "source": "hub/new", "gpus": {"share": 0.5, "count": 1}, "strip": ["seed"]},
        {"name": "newer", "source": "hub/newer"},
        {"name": "hub/self", "source": "hub/self"},
    ]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"gpus": 2}'])
def test_an_entry_that_is_none_is_a_usage_error(box, content):
    assert box.run("add", "new", "--entry", "-", stdin=content).code == 2
    assert box.run("add", "new", "--entry", "/no/such/file").code == 2


def test_rm_forgets_a_model_or_deletes_its_files(box):
    box.desk.put(entry("mine", origin="runtime"))
    assert box.lines("rm", "mine") == ["mine  removed"]
    box.desk.store(CHAT)
    assert box.lines("rm", CHAT, "--files") == [f"{CHAT}  8.0 MiB freed"]
    assert box.run("rm", CHAT, "--files", "--json").json()["bytes"] == 0
    refused = box.run("rm", CHAT)
    assert (refused.code, "take it out there" in refused.err) == (1, True)


# -- adapters -------------------------------------------------------------------------------------------------------


def test_adapters(box, tmp_path):
    archive = tmp_path / "lora-9.tar.gz"
    archive.write_bytes(b"x" * 2048)
    assert "No adapter was uploaded" in box.run("adapters", CHAT, terminal=True).out
    assert box.lines("adapters", CHAT, "--add", str(archive)) == ["lora-9  can be asked for as a model"]
    assert box.run("adapters", "chat", "--add", str(archive), "--as", "nine", "--json").json()["name"] == "nine"
    header, first, second = box.lines("adapters", CHAT)
    assert header.split() == ["NAME", "BASE", "RANK", "SIZE", "OWNER", "AGE"]
    assert [first.split()[0], second.split()[:5]] == ["lora-9", ["nine", CHAT, "8", "2.0", "KiB"]]
    assert box.lines("adapters", CHAT, "--rm", "nine") == ["nine  deleted"]
    assert [row["name"] for row in box.run("adapters", CHAT, "--json").json()["data"]] == ["lora-9"]


@pytest.mark.parametrize("args", [("--as", "x"), ("--add", __file__, "--rm", "x")])
def test_options_of_adapters_that_do_not_go_together(box, args):
    assert box.run("adapters", CHAT, *args).code == 2
