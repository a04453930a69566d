"""Finding the daemon and the key to it."""

import json
import os
import subprocess
import sys

import pytest

from vllm_bootstrap import instance
from vllm_bootstrap.sdk import discovery

LOCAL = "http://127.0.0.1:8123"


@pytest.fixture
def state(tmp_path):
    """The state directory of a daemon that runs and has made a key."""
    instance.announce(tmp_path, LOCAL)
    (tmp_path / "access_key").write_text("vb-generated\n")
    return {"VLLM_BOOTSTRAP_STATE_DIR": str(tmp_path)}


def dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_arguments_win_over_the_environment_and_that_over_the_local_daemon(state):
    env = {**state, "VLLM_BOOTSTRAP_URL": "https://box:1/", "VLLM_BOOTSTRAP_KEY": "from-env"}
    assert discovery.find("http://other:2", "said", env) == discovery.Target("http://other:2", "said")
    assert discovery.find(environ=env) == discovery.Target("https://box:1", "from-env")
    assert discovery.find(environ=state) == discovery.Target(LOCAL, "vb-generated")


def test_without_anything_it_is_the_default_without_a_key(tmp_path):
    env = {"VLLM_BOOTSTRAP_STATE_DIR": str(tmp_path)}
    assert discovery.find(environ=env) == discovery.Target(discovery.DEFAULT_URL, None)


@pytest.mark.parametrize("url", ["http://localhost:8123", "127.0.0.1:8123", "http://[::1]:8123/"])
def test_the_generated_key_goes_to_the_daemon_that_made_it_however_it_is_called(state, url):
    assert discovery.find(url, environ=state).key == "vb-generated"


@pytest.mark.parametrize("url", ["http://127.0.0.1:8124", "https://127.0.0.1:8123", "http://box.example.com:8123"])
def test_the_generated_key_goes_nowhere_else(state, url):
    assert discovery.find(url, environ=state).key is None


def test_a_daemon_that_was_killed_is_not_believed(state, tmp_path):
    facts = {"pid": dead_pid(), "url": LOCAL}
    (tmp_path / "daemon.json").write_text(json.dumps(facts))
    assert discovery.find(environ=state) == discovery.Target(discovery.DEFAULT_URL, None)
    assert discovery.find(LOCAL, environ=state).key is None


@pytest.mark.parametrize("content", ["", "{}", '{"pid": "x", "url": "y"}', "[]", '{"pid": 1, "url": "ftp://x"}'])
def test_a_broken_announcement_is_none(tmp_path, content):
    (tmp_path / "daemon.json").write_text(content)
    assert discovery.announced(tmp_path) is None


def test_a_daemon_of_another_user_is_alive_too(tmp_path):
    if os.geteuid() == 0:
        assert discovery._is_alive(1)
    (tmp_path / "daemon.json").write_text(json.dumps({"pid": 1, "url": LOCAL}))
    assert discovery.announced(tmp_path) == LOCAL


def test_where_no_daemon_can_run_none_is_believed(state, monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    assert not discovery._is_alive(os.getpid())


def test_an_unreadable_key_file_is_no_key(state, tmp_path):
    (tmp_path / "access_key").unlink()
    assert discovery.find(environ=state).key is None


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:99999", "http://x/?key=1", "http://me:secret@x"])
def test_unusable_addresses_are_refused_without_showing_secrets(url):
    with pytest.raises(ValueError) as caught:
        discovery.clean_url(url)
    assert "secret" not in str(caught.value)
