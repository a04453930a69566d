"""The key file on disk: what happens when it changes, breaks, disappears and comes back."""

import json
import os
from pathlib import Path

import pytest

from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.guard import ANY_KEY, Guard
from vllm_bootstrap.auth.keyfile import KeyFileError
from vllm_bootstrap.auth.keys import CHECK_INTERVAL_S, KeyRing, shared_key
from vllm_bootstrap.auth.sessions import Sessions
from vllm_bootstrap.auth.types import RequestHead

TOKEN, OTHER = "first-token-for-the-tests", "second-token-for-the-tests"


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pass_the_interval(self):
        self.now += CHECK_INTERVAL_S


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def write(path, *entries, mode=0o600):
    # As editors and configuration tools do: a new file under the old name.
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"keys": list(entries)}))
    fresh.chmod(mode)
    fresh.replace(path)


def entry(name="ci", token=TOKEN, **fields):
    return {"name": name, "token": token, "scopes": ["monitor"], **fields}


def load(path, clock, **options):
    return KeyRing(options.pop("shared", ()), path, monotonic=clock, **options)


def test_a_revoked_key_stops_at_the_next_look(path, clock):
    write(path, entry(), entry("b", OTHER))
    keys = load(path, clock)
    principal = keys.lookup(TOKEN.encode())
    assert principal is not None
    changes = []
    keys.on_change(lambda: changes.append(1))
    write(path, entry("b", OTHER))
    clock.pass_the_interval()
    assert keys.lookup(TOKEN.encode()) is None
    assert not keys.is_current(principal)
    assert keys.lookup(OTHER.encode())
    assert changes == [1]


@pytest.mark.parametrize("change", [{"disabled": True}, {"expires_at": 1}, {"scopes": ["logs"]}])
def test_a_changed_key_is_no_longer_what_was_admitted(path, clock, change):
    write(path, entry())
    keys = load(path, clock)
    principal = keys.lookup(TOKEN.encode())
    assert principal is not None
    write(path, entry(**change))
    clock.pass_the_interval()
    assert not keys.is_current(principal)


def test_a_pass_does_not_outlive_a_key_that_was_revoked_while_it_was_written(path, clock):
    write(path, entry())
    keys = load(path, clock)
    guard = Guard(keys, Sessions(keys, lifetime_s=60), open_access=False)
    head = RequestHead("POST", "/x", ((b"host", b"localhost"), (b"x-api-key", TOKEN.encode())))
    principal = guard.admit(head, ANY_KEY)
    assert principal is not None
    write(path)
    clock.pass_the_interval()
    permit = guard.remember(head, principal)
    assert permit is not None
    assert guard.readmit(permit) is None


def test_the_file_is_looked_at_once_a_second_at_most(path, clock):
    write(path, entry())
    keys = load(path, clock)
    write(path)
    assert keys.lookup(TOKEN.encode())
    clock.pass_the_interval()
    assert keys.lookup(TOKEN.encode()) is None


def test_an_edit_in_place_is_seen(path, clock):
    write(path, entry())
    keys = load(path, clock)
    os.utime(path, ns=(1, 1))
    path.write_text(json.dumps({"keys": [entry("renamed")]}))
    clock.pass_the_interval()
    found = keys.lookup(TOKEN.encode())
    assert found is not None
    assert found.name == "renamed"


@pytest.mark.parametrize("broken", ["{", '{"keys": [{"name": "x"}]}', ""])
def test_a_broken_edit_keeps_the_old_keys_and_says_so_until_it_is_mended(path, clock, broken, caplog):
    write(path, entry())
    keys = load(path, clock)
    path.write_text(broken)
    clock.pass_the_interval()
    assert keys.lookup(TOKEN.encode())
    assert keys.problem is not None
    assert str(path) in keys.problem
    assert "stay in force" in caplog.text
    clock.pass_the_interval()
    keys.lookup(b"")
    assert caplog.text.count("stay in force") == 1
    write(path, entry("mended", OTHER))
    clock.pass_the_interval()
    assert keys.lookup(OTHER.encode())
    assert keys.problem is None


def test_a_vanished_file_keeps_the_old_keys_until_it_is_back(path, clock):
    write(path, entry())
    keys = load(path, clock)
    path.unlink()
    clock.pass_the_interval()
    assert keys.lookup(TOKEN.encode())
    assert "No such file" in (keys.problem or "")
    write(path)
    clock.pass_the_interval()
    assert keys.lookup(TOKEN.encode()) is None


def test_reload_now_tells_whether_it_worked(path, clock):
    write(path, entry())
    keys = load(path, clock)
    path.write_text("{")
    assert not keys.reload()
    write(path, entry("b", OTHER))
    assert keys.reload()
    assert [principal.name for principal in keys.principals()] == ["b"]


def test_a_daemon_does_not_start_with_a_broken_or_missing_file(path, clock):
    with pytest.raises(KeyFileError, match="No such file"):
        load(path, clock)
    path.write_text("{")
    with pytest.raises(KeyFileError, match=str(path)):
        load(path, clock)


def test_example_tokens_work_only_where_nobody_else_can_reach(path, clock):
    write(path, entry(token="example-monitor-token"))
    assert load(path, clock, allow_examples=True).lookup(b"example-monitor-token")
    with pytest.raises(KeyFileError, match="example token"):
        load(path, clock)


def test_a_token_may_not_be_both_a_setting_and_a_limited_key(path, clock):
    write(path, entry())
    with pytest.raises(KeyFileError, match="same token as the 'root' setting") as refused:
        load(path, clock, shared=[shared_key("root", TOKEN)])
    assert TOKEN not in str(refused.value)


def test_shared_keys_and_file_work_together(path, clock):
    write(path, entry(disabled=True))
    keys = load(path, clock, shared=[shared_key("root", OTHER)])
    assert keys.lookup(OTHER.encode())
    assert keys.lookup(TOKEN.encode()) is None
    assert [principal.name for principal in keys.principals()] == ["root"]


def test_a_file_of_tokens_that_everybody_can_read_is_remarked(path, clock):
    write(path, entry(), mode=0o644)
    assert "everybody on this machine can read it" in load(path, clock).notes[-1]


def test_the_example_file_is_valid_and_has_every_scope():
    example = Path(__file__).resolve().parents[3] / "config" / "example.keys.json"
    keys = KeyRing((), example, allow_examples=True)
    for name in scopes.ALL:
        found = keys.lookup(f"example-{name}-token".encode())
        assert found is not None
        assert name in found.scopes
    with pytest.raises(KeyFileError):
        KeyRing((), example)
