"""Making, listing and checking keys, on real files."""

import json
import stat
from pathlib import Path

import pytest

from tests.support import commands
from vllm_bootstrap.auth import keyfile

EXAMPLE = Path(__file__).resolve().parents[3] / "config" / "example.keys.json"


@pytest.fixture
def run(tmp_path):
    def in_own_state(*args, env=None, **options):
        return commands.run("keys", *args, env={"VLLM_BOOTSTRAP_STATE_DIR": str(tmp_path), **(env or {})}, **options)

    return in_own_state


def test_a_token_for_the_shared_key(run):
    result = run("new")
    assert (result.code, result.err) == (0, "")
    assert keyfile.token_problem(result.out.strip()) is None
    assert run("new", "--json").json()["token"] != result.out.strip()


def test_a_new_key_is_added_to_the_file_with_its_hash_only(run, tmp_path):
    path = tmp_path / "keys.json"
    token = run("new", "ci", "--scope", "realtime", "--scope", "monitor", "--file", str(path)).out.strip()
    run("new", "other", "--scope", "admin", "--file", str(path))
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    entries = keyfile.read(path, allow_examples=False)[0].entries
    assert [entry.name for entry in entries] == ["ci", "other"]
    assert entries[0].digest() == keyfile.digest(token)
    assert entries[0].scopes == ["realtime", "monitor"]


def test_the_files_mode_stays(run, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text('{"keys": []}')
    path.chmod(0o640)
    assert run("new", "ci", "--scope", "logs", "--file", str(path)).code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_limits_and_expiry(run):
    made = run(
        "new", "ci", "--scope", "batch", "--model", "org/*", "--max-class", "batch", "--requests-per-minute", "60",
        "--tokens-per-minute", "9000", "--max-parallel", "4", "--max-sequences", "8", "--max-enqueued-tokens", "5000",
        "--cold-start-hold", "0", "--expires-in", "30d", "--json",
    ).json()  # fmt: skip
    entry = keyfile.parse(json.dumps({"keys": [made["entry"]]}), allow_examples=False).entries[0]
    assert (entry.models, entry.max_class, entry.requests_per_minute) == (["org/*"], "batch", 60)
    assert (entry.max_parallel, entry.max_sequences) == (4, 8)
    assert (entry.tokens_per_minute, entry.max_enqueued_tokens) == (9000, 5000)
    assert entry.cold_start_hold_s == 0
    assert entry.expires_at is not None


@pytest.mark.parametrize(
    "args",
    [
        ["new", "ci"],
        ["new", "--scope", "admin"],
        ["new", "ci", "--scope", "emperor"],
        ["new", "a b", "--scope", "admin"],
        ["new", "ci", "--scope", "admin", "--expires-in", "tomorrow"],
        ["new", "ci", "--scope", "admin", "--expires-in", "0d"],
        ["new", "ci", "--scope", "admin", "--max-class", "fast"],
        ["check"],
        [],
    ],
)
def test_usage_errors_leave_nothing_behind(run, tmp_path, args):
    result = run(*args)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", '{"keys": [{"name": "ci", "token": "t", "scopes": ["admin"]}]}'])
def test_a_file_that_cannot_take_the_key_is_left_alone(run, tmp_path, content):
    path = tmp_path / "keys.json"
    path.write_text(content)
    result = run("new", "ci", "--scope", "admin", "--file", str(path))
    assert result.code == 1
    assert "Nothing was changed" in result.err
    assert path.read_text() == content
    assert [found.name for found in tmp_path.iterdir()] == ["keys.json"]


def test_a_folder_that_is_not_there(run, tmp_path):
    assert run("new", "ci", "--scope", "admin", "--file", str(tmp_path / "no" / "keys.json")).code == 1


def test_on_a_terminal_it_is_explained(run, tmp_path):
    shown = run("new", "ci", "--scope", "eval", terminal=True)
    assert "shown only now" in shown.out
    assert "token_sha256" in shown.out
    assert "not built yet" in shown.err
    assert "takes it up" in run(
        "new", "ci", "--scope", "admin", "--file", str(tmp_path / "k.json"), terminal=True
    ).out  # fmt: skip


def test_list_never_shows_tokens(run):
    result = run("list", str(EXAMPLE))
    assert "example-realtime" in result.out
    assert "-token" not in result.out
    assert "600 requests/min, 500000 tokens/min, 32 parallel, 8 sequences" in result.out
    assert [line.split()[-1] for line in result.out.splitlines()[1:]].count("disabled") == 1
    as_json = run("list", str(EXAMPLE), "--json")
    assert "-token" not in as_json.out
    assert '"token"' not in as_json.out
    assert "token_sha256" not in as_json.out


def test_list_tells_where_keys_come_from(run, tmp_path):
    assert run("list").err == "No key file.\n"
    (tmp_path / "access_key").write_text("vb-x\n")
    told = run("list", env={"VLLM_ACCESS_KEY": "x", "AUTH_KEYS_FILE": str(EXAMPLE)})
    assert "VLLM_ACCESS_KEY is set" in told.err
    assert str(tmp_path / "access_key") in told.err
    assert "vb-x" not in told.err + told.out
    assert run("list", "--json").json()["generated"] == str(tmp_path / "access_key")


LIMITS = {
    "requests_per_minute": 60, "tokens_per_minute": 9000, "max_parallel": 4, "max_sequences": 8,
    "max_enqueued_tokens": 5000, "max_class": "batch", "cold_start_hold_s": 90,
}  # fmt: skip


def test_list_tells_every_limit_that_a_key_can_have(run, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": "a", "token": "t" * 20, "scopes": ["batch"], **LIMITS}]}))
    line = run("list", str(path)).out.splitlines()[1]
    limits = line.partition("60 requests/min")[2]
    assert limits.startswith(", 9000 tokens/min, 4 parallel, 8 sequences, 5000 enqueued tokens, 90 s cold start, batch")
    assert run("check", str(path)).out == f"{path}: valid, 1 key\n"
    known = {"name", "token", "token_sha256", "scopes", "models", "expires_at", "disabled"}
    assert keyfile.Entry.model_fields.keys() - known == LIMITS.keys()


def test_expired_keys_are_marked(run, tmp_path):
    path = tmp_path / "keys.json"
    entry = {"name": "old", "token": "t" * 20, "scopes": ["logs"], "expires_at": "2020-01-01T00:00:00Z"}
    path.write_text(json.dumps({"keys": [entry]}))
    assert run("list", str(path)).out.splitlines()[1].split()[-3:] == ["2020-01-01", "00:00Z", "expired"]
    path.write_text('{"keys": []}')
    assert "holds no keys" in run("list", str(path)).err


def test_check(run, tmp_path):
    good = run("check", str(EXAMPLE))
    assert (good.code, good.out) == (0, f"{EXAMPLE}: valid, 8 keys\n")
    assert "example tokens" in good.err
    assert run("check", str(EXAMPLE), "--json").json()["keys"] == 8
    path = tmp_path / "keys.json"
    path.write_text('{"keys": [{"name": "a", "token": "secret-token", "scopes": ["emperor"]}]}')
    bad = run("check", str(path))
    assert bad.code == 1
    assert "keys[0] ('a')" in bad.err
    assert "secret-token" not in bad.err + bad.out
    assert run("check", str(tmp_path / "none.json")).code == 1


def test_show_prints_the_generated_key(run, tmp_path):
    nothing = run("show")
    assert nothing.code == 1
    assert "There is no" in nothing.err
    (tmp_path / "access_key").write_text("vb-made-at-first-start\n")
    assert run("show").out == "vb-made-at-first-start\n"
    assert run("show", "--json").json()["file"] == str(tmp_path / "access_key")
