"""Secrets through a whole life of the daemon: in no answer, no log, no command line, no stranger's environment."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.support import leftovers, orphans
from tests.support.daemon import DaemonProcess

SECRETS = {
    "hf_token": "hf_SecretOfTheHub0123456789",
    "access_key": "sk-access-0123456789abcdef",
    "orchestrator_token": "sk-orchestrator-0123456789",
}
KEYS = {"keys": [{"name": "someone", "token": "sk-of-a-key-file-0123456789", "scopes": ["monitor"]}]}
INTERNAL = b"VLLM_API_KEY="


def environ(pid: int) -> dict[bytes, bytes]:
    pairs = [entry.split(b"=", 1) for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A daemon that has launched, served, failed, been refused, restarted, with engines that print what they know."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps(KEYS))
    with DaemonProcess(devices="mock:3", auth_keys_file=keys, log_level="DEBUG", **SECRETS) as daemon:
        first, second = (daemon.ready(gpu_ids=[gpu], knobs={"log-secret": True}) for gpu in (0, 1))
        dead = daemon.launch(gpu_ids=[2], knobs={"log-secret": True, "die-at-boot": "engine_died"})
        daemon.wait_state(dead, "failed")
        for secret in (*SECRETS.values(), KEYS["keys"][0]["token"]):
            daemon.request("GET", f"/status/{first['launch_id']}", key=secret)
            daemon.request("GET", f"/?key={secret}", key="")
            daemon.request("GET", "/gpus", key=secret + "x")
        asked = {"model": "sim", "prompt": "a", "max_tokens": 1}
        daemon.request("POST", "/v1/completions", asked)
        forbidden = {"model": "x", "engine": "simulator", "env": {"HF_TOKEN": SECRETS["hf_token"]}}
        assert daemon.request("POST", "/launch", forbidden).status == 400
        daemon.restart()
        daemon.request("POST", f"/proxy/{second['launch_id']}/v1/completions", asked)
        yield daemon, first, second, dead


def internal_keys(*statuses: dict) -> list[str]:
    found = [environ(status["pid"])[INTERNAL[:-1]].decode() for status in statuses]
    assert all(len(key) > 20 for key in found)
    return found


def all_secrets(first: dict, second: dict) -> list[str]:
    return [*SECRETS.values(), KEYS["keys"][0]["token"], *internal_keys(first, second)]


def test_no_answer_holds_one(lived):
    daemon, first, second, dead = lived
    paths = ["/launches?all=true", "/gpus", "/stats", "/metrics", "/openapi.json", "/v1/models", "/version"]
    for launch_id in (first["launch_id"], second["launch_id"], dead):
        paths += [f"/status/{launch_id}", f"/status/{launch_id}/events", f"/logs/{launch_id}?offset=0&limit=1000000"]
    for path in paths:
        answer = daemon.request("GET", path)
        assert answer.status == 200, path
        shown = answer.body.decode() + repr(answer.headers)
        assert [secret for secret in all_secrets(first, second) if secret in shown] == [], path
    for path in (f"/proxy/{first['launch_id']}/{inner}" for inner in ("version", "metrics", "health", "v1/models")):
        shown = daemon.request("GET", path).body.decode()
        assert [secret for secret in all_secrets(first, second) if secret in shown] == [], path
    assert "***" in daemon.engine_log(first["launch_id"])


def test_neither_the_daemons_log_nor_any_file_holds_one(lived):
    daemon, first, second, _ = lived
    wanted = [secret.encode() for secret in all_secrets(first, second)]
    for path in sorted(daemon.root.rglob("*")):
        if path.is_file():
            text = path.read_bytes()
            assert [secret for secret in wanted if secret in text] == [], path
    assert len(re.findall("launch ", daemon.log)) > 3  # there was something to look at


def test_no_command_line_holds_one(lived):
    daemon, first, second, _ = lived
    wanted = [secret.encode() for secret in all_secrets(first, second)]
    pids = [left.pid for left in leftovers.processes_referring_to(daemon.root)]
    assert len(pids) >= 7
    for pid in pids:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert [secret for secret in wanted if secret in line] == []


def test_a_process_knows_only_what_it_needs(lived):
    """The shim nothing; an engine its own internal key and the hub's token; never a key of ours."""
    daemon, first, second, _ = lived
    ours = [SECRETS["access_key"], SECRETS["orchestrator_token"], KEYS["keys"][0]["token"]]
    key_of = dict(zip((first["launch_id"], second["launch_id"]), internal_keys(first, second), strict=True))
    assert len(set(key_of.values())) == 2
    shims = {first["shim_pid"], second["shim_pid"]}
    for pid in orphans.marked(daemon.state_id):
        known = environ(pid)
        launch_id = known[b"VBS_LAUNCH"].decode().split("/")[1]
        text = b"\0".join(known.values()).decode()
        others = [key for owner, key in key_of.items() if owner != launch_id]
        assert [secret for secret in [*ours, *others] if secret in text] == []
        assert not [name for name in known if name.startswith(b"VLLM_BOOTSTRAP_")]
        if pid in shims:
            assert SECRETS["hf_token"] not in text
            assert key_of[launch_id] not in text
        else:
            assert known[b"HF_TOKEN"].decode() == SECRETS["hf_token"]


def test_the_daemon_itself_can_not_be_read_by_its_own_user(lived):
    """Not dumpable: its environment and memory belong to root, and it leaves no core."""
    daemon, *_ = lived
    assert Path(f"/proc/{daemon.pid}/environ").stat().st_uid == 0
    assert (daemon.state_dir.stat().st_mode & 0o077) == 0
    if os.geteuid() != 0:
        with pytest.raises(PermissionError):
            Path(f"/proc/{daemon.pid}/environ").read_bytes()
