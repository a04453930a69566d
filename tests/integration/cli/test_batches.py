"""Commands about batches, against the real control plane with real files and made-up batches."""

import json
from unittest import mock

import pytest

from tests.support import commands
from tests.support.batch_box import batch_box
from tests.support.batch_desks import batch_id
from vllm_bootstrap.batches import jobs
from vllm_bootstrap.batches.types import Counts, LineError, Progress, TokenUsage
from vllm_bootstrap.cli import batch_progress
from vllm_bootstrap.cli.options import connect

ONE, TWO = batch_id(1), batch_id(2)
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": "x"}}
ANSWERS = b'{"custom_id": "a"}\n{"custom_id": "\xc3\xa4"}\n'


class Box:
    """Runs commands against ``at``."""

    def __init__(self, at, folder):
        self.at, self.batches, self.folder = at, at.batches, folder

    def run(self, *args, **options):
        env = {"VLLM_BOOTSTRAP_URL": self.at.url, "VLLM_BOOTSTRAP_STATE_DIR": "/nonexistent", **options.pop("env", {})}
        return commands.run("batch", *args, env=env, **options)

    def lines(self, *args, **options):
        result = self.run(*args, **options)
        assert result.code == 0, result.err
        return result.out.splitlines()

    def written(self, text=None, name="in.jsonl"):
        path = self.folder / name
        path.write_text(json.dumps(LINE) + "\n" if text is None else text)
        return str(path)

    def stored(self, content):
        """The id of a file with this content."""
        path = self.folder / "stored"
        path.write_bytes(content)
        sent = self.run("submit", str(path), "--endpoint", "/v1/completions", "--json")
        return sent.json()["input_file_id"]

    def ends_after(self, looks, **fields):
        """Let the first batch be something else after so many looks at it."""
        get, seen = self.batches.get, []

        async def counting(wanted, owner):
            seen.append(wanted)
            if len(seen) == looks:
                self.batches.put(1, "local", **fields)
            return await get(wanted, owner)

        self.batches.get = counting


@pytest.fixture
def box(tmp_path):
    with batch_box(tmp_path) as at:
        yield Box(at, tmp_path)


# -- submit ---------------------------------------------------------------------------------------------------------


def test_submit_prints_the_id_and_guesses_the_route(box):
    assert box.lines("submit", box.written()) == [ONE]
    asked = box.batches.accepted[ONE]
    assert (asked.endpoint, asked.completion_window, asked.priority, asked.webhook) == (
        "/v1/embeddings",
        "24h",
        0,
        None,
    )


def test_submit_sends_what_the_options_say(box):
    box.lines(
        "submit", box.written(), "--endpoint", "/v1/completions", "--window", "7d", "--priority", "-3",
        "--metadata", "a=b", "--metadata", "launch_id=l1", "--webhook", "https://example.com/h",
        env={"VLLM_BOOTSTRAP_WEBHOOK_SECRET": "a secret of some length"},
    )  # fmt: skip
    asked = box.batches.accepted[ONE]
    assert (asked.endpoint, asked.completion_window, asked.priority) == ("/v1/completions", "7d", -3)
    assert (asked.metadata, asked.launch_id) == ({"a": "b", "launch_id": "l1"}, "l1")
    assert (asked.webhook.url, asked.webhook.secret) == ("https://example.com/h", "a secret of some length")


def test_submit_on_a_terminal_says_what_to_do_next(box):
    out = box.run("submit", box.written(), terminal=True).out
    assert f"Batch {ONE} over /v1/embeddings" in out
    assert f"vllm-bootstrap batch status {ONE}" in out


def test_submit_gives_json(box):
    assert box.run("submit", box.written(), "--json").json()["id"] == ONE


@pytest.mark.parametrize("text", ["\n \n" + json.dumps(LINE), "\ufeff" + json.dumps(LINE) + "\r\n"])
def test_the_first_line_is_found_behind_empty_ones_and_marks(box, text):
    box.lines("submit", box.written(text))
    assert box.batches.accepted[ONE].endpoint == "/v1/embeddings"


@pytest.mark.parametrize("text", ["", "\n", " \n\n"])
def test_a_file_without_a_line_is_called_empty(box, text):
    result = box.run("submit", box.written(text))
    assert (result.code, "is empty" in result.err) == (2, True)


def test_what_was_uploaded_for_a_batch_that_is_refused_is_not_left_behind(box):
    assert box.run("submit", box.written(), "--window", "soon").code == 1
    with connect(box.at.url, None) as client:
        assert client.files.list().data == []


def test_a_batch_that_was_refused_has_no_lines_to_speak_of(box):
    box.batches.put(1, "local", phase=jobs.FAILED, counts=Counts(), errors=(LineError("invalid", "wrong", 3),))
    assert "0 of 0" not in "".join(box.lines("status"))


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"url": 5}', '{"url": "http://x/"}', "\x00"])
def test_a_file_that_names_no_route_needs_the_option(box, text):
    result = box.run("submit", box.written(text))
    assert (result.code, "--endpoint" in result.err) == (2, True)
    assert box.batches.accepted == {}


@pytest.mark.parametrize("args", [["/no/such/file"], ["FILE", "--metadata", "a"], ["FILE", "--priority", "101"], []])
def test_what_is_not_understood(box, args):
    assert box.run("submit", *[box.written() if arg == "FILE" else arg for arg in args]).code == 2


def test_refusals_of_the_daemon_are_told(box):
    result = box.run("submit", box.written(), "--endpoint", "/v1/audio")
    assert result.code == 1
    assert "/v1/chat/completions" in result.err
    assert box.run("submit", box.written(), "--webhook", "http://127.0.0.1/").code == 1


def test_submit_and_wait_shows_how_far_it_is(box):
    def on_create():
        box.ends_after(3, phase=jobs.COMPLETED, counts=Counts(4, 4, 0), output_file_id="file-x",
                       stamps={"completed": 1_800_000_060.0})  # fmt: skip

    on_create()
    progress = Progress(lines_per_s=2.5, eta_s=60)
    create = box.batches.create

    async def running(new):
        made = await create(new)
        return box.batches.put(1, made.row.owner, counts=Counts(4, 1, 0), progress=progress)

    box.batches.create = running
    result = box.run("submit", box.written(), "--wait")
    assert result.code == 0, result.err
    assert result.out.splitlines() == [
        f"{ONE}  in_progress, 1 of 4 lines, 2.5 lines/s, about 1 m 0 s left",
        f"{ONE}  completed after 1 m 0 s: 4 of 4 lines",
    ]
    assert f"vllm-bootstrap batch results {ONE} -o" in result.err


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"phase": jobs.COMPLETED, "counts": Counts(4, 4, 0)}, 0, "completed"),
        ({"phase": jobs.COMPLETED, "counts": Counts(4, 3, 1), "error_file_id": "file-e"}, 1, "4 of 4 lines, 1 failed"),
        ({"phase": jobs.EXPIRED, "counts": Counts(4, 1, 3)}, 1, "expired"),
        ({"phase": jobs.CANCELLED, "counts": Counts(4, 1, 3)}, 1, "cancelled"),
        ({"phase": jobs.FAILED, "errors": (LineError("x", "no such model", 3),)}, 1, "line 3: no such model"),
    ],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_the_exit_code_says_how_it_went(box, fields, code, said, terminal):
    box.ends_after(2, **fields)
    result = box.run("submit", box.written(), "--wait", terminal=terminal)
    assert result.code == code
    assert said in result.out + result.err


def test_wait_gives_json(box):
    box.ends_after(2, phase=jobs.COMPLETED, counts=Counts(2, 1, 1))
    result = box.run("submit", box.written(), "--wait", "--json")
    assert (result.code, result.json()["status"]) == (1, "completed")


def test_ctrl_c_leaves_the_batch_running(box):
    with mock.patch.object(batch_progress.Lines, "update", side_effect=KeyboardInterrupt):
        result = box.run("submit", box.written(), "--wait")
    assert result.code == 1
    assert f"The batch goes on. To look again: vllm-bootstrap batch status {ONE}" in result.err
    assert box.batches.views[ONE].row.phase == jobs.VALIDATING


def test_the_help_says_what_the_exit_code_means(box):
    assert "exit code is 1" in " ".join(box.run("submit", "--help").out.split())


# -- status ---------------------------------------------------------------------------------------------------------


def test_status_lists_batches(box):
    assert "There is no batch." in box.run("status", terminal=True).out
    waits = Progress(waits_for="no launch serves 'm'")
    box.batches.put(1, "local", counts=Counts(10, 3, 1), progress=waits, models={"m": 10})
    box.batches.put(2, "local", phase=jobs.VALIDATING, progress=Progress(validated_bytes=512, input_bytes=1024))
    header, two, one = box.lines("status")
    assert header.split() == ["ID", "STATUS", "LINES", "PROGRESS", "PRIORITY", "OWNER", "MODEL", "AGE"]
    assert two.startswith(f"{TWO}  validating")
    assert "512 B of 1.0 KiB checked" in two
    for said in (ONE, "in_progress", "4 of 10 lines, 1 failed", "waits: no launch serves 'm'"):
        assert said in one
    assert "There are more" in box.run("status", "--limit", "1").err
    assert [found["id"] for found in box.run("status", "--json").json()["data"]] == [TWO, ONE]


def test_status_of_one(box):
    usage = TokenUsage(prompt=7, completion=9)
    box.batches.put(
        1, "local", counts=Counts(10, 10, 0), phase=jobs.COMPLETED, metadata={"team": "a"}, models={"m": 10},
        output_file_id="file-out", usage=usage, stamps={"completed": 1_800_000_100.0},
    )  # fmt: skip
    box.batches.put(2, "local", paused=True)
    out = box.run("status", ONE).out
    for said in ("completed", "10 of 10 lines", "m (10)", "team=a", "file-out", "7 in, 9 out", "24h, until", "ended"):
        assert said in out
    assert "in_progress (paused)" in box.run("status", TWO).out
    assert box.run("status", ONE[-6:], "--json").json()["id"] == ONE


def test_names_that_mean_no_batch_or_several(box):
    assert box.run("status", "nothing").code == 1
    assert box.run("status", batch_id(9)).code == 1
    box.batches.put(1, "local")
    box.batches.put(2, "local")
    assert box.run("status", "batch_0").code == 2


# -- results --------------------------------------------------------------------------------------------------------


def test_results_go_to_standard_output_or_a_file(box, tmp_path):
    file_id = box.stored(ANSWERS)
    box.batches.put(1, "local", phase=jobs.COMPLETED, counts=Counts(3, 2, 1), output_file_id=file_id)
    result = box.run("results", ONE)
    assert (result.code, result.out) == (0, ANSWERS.decode())
    assert "1 lines failed" in result.err
    target = tmp_path / "answers.jsonl"
    for options in ([], ["--json"]):
        done = box.run("results", ONE, "-o", str(target), *options, terminal=not options)
        assert done.code == 0
        assert target.read_bytes() == ANSWERS
        target.unlink()
    assert done.json() == {"batch_id": ONE, "file": str(target), "bytes": len(ANSWERS)}
    assert not list(tmp_path.glob("*.part"))
    assert box.run("results", ONE, "-o", str(tmp_path / "no" / "such")).code == 1


def test_results_that_are_cut_go_on(box):
    file_id = box.stored(ANSWERS)
    box.batches.put(1, "local", phase=jobs.COMPLETED, output_file_id=file_id)
    box.at.cuts = [5, 7]
    assert box.run("results", ONE).out == ANSWERS.decode()
    assert box.at.ranges[-2:] == ["bytes=5-", "bytes=12-"]


def test_errors_instead_of_answers(box):
    file_id = box.stored(b'{"error": 1}\n')
    box.batches.put(1, "local", phase=jobs.COMPLETED, counts=Counts(1, 0, 1), error_file_id=file_id)
    result = box.run("results", ONE, "--errors")
    assert (result.code, result.out, result.err) == (0, '{"error": 1}\n', "")
    assert box.run("results", ONE).out == ""


def test_a_batch_that_runs_gives_its_results_only_when_asked_for_a_part(box):
    box.batches.put(1, "local", counts=Counts(3, 1, 0))
    box.batches.pieces = {False: [b'{"a": 1}\n'], True: [b'{"b": 1}\n']}
    refused = box.run("results", ONE)
    assert (refused.code, refused.out) == (1, "")
    assert "1 of 3 lines. What there is so far: --partial" in refused.err
    assert box.run("results", ONE, "--partial").out == '{"a": 1}\n'
    assert box.run("results", ONE, "--partial", "--errors").out == '{"b": 1}\n'


# -- changes --------------------------------------------------------------------------------------------------------


def test_pause_resume_priority_cancel(box):
    box.batches.put(1, "local", counts=Counts(3, 1, 0))
    assert box.lines("pause", ONE) == [f"{ONE}  in_progress (paused), 1 of 3 lines"]
    assert box.lines("resume", ONE) == [f"{ONE}  in_progress, 1 of 3 lines"]
    assert box.lines("priority", ONE, "-7") == [f"{ONE}  priority -7"]
    assert box.run("priority", ONE, "100", "--json").json()["priority"] == 100
    assert box.run("priority", ONE, "101").code == 2
    assert box.run("cancel", ONE, "--json").json()["status"] == "cancelling"


def test_retry(box):
    box.batches.put(1, "local", counts=Counts(3, 1, 2), phase=jobs.COMPLETED)
    assert box.lines("retry", ONE) == [f"{ONE}  in_progress, 1 of 3 lines"]
    assert box.run("retry", ONE).code == 1
