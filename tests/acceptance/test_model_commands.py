"""``vllm-bootstrap models`` against a running daemon and simulated engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import commands
from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as made:
        yield made


def run(daemon: DaemonProcess, *args: str) -> commands.Result:
    return commands.run(*args, env={"VLLM_BOOTSTRAP_URL": daemon.url, "VLLM_BOOTSTRAP_KEY": daemon.key or ""})


def state(daemon: DaemonProcess, name: str) -> str:
    return str(run(daemon, "models", "list", name, "--json").json()["state"])


def test_a_model_is_added_loaded_asked_unloaded_and_removed(daemon: DaemonProcess) -> None:
    assert run(daemon, "models", "add", "org/tiny", "sim/tiny", "--alias", "tiny", "--ttl", "15m").code == 0
    loaded = run(daemon, "models", "load", "tiny")
    assert loaded.code == 0, loaded.err
    assert loaded.out.splitlines()[-1] == "org/tiny  loaded"
    with daemon.client() as client:
        shown = {info.id: (info.status, info.alias_of) for info in client.models().data}
    assert shown == {"org/tiny": ("loaded", None), "tiny": ("loaded", "org/tiny")}
    assert run(daemon, "run", "--prompt", "Hi").code == 0
    assert run(daemon, "models", "unload", "tiny").out == "org/tiny  unloaded\n"
    assert run(daemon, "models", "rm", "tiny").code == 0
    assert run(daemon, "models", "list", "tiny").code == 1


def test_an_unloaded_model_is_loaded_by_a_question(daemon: DaemonProcess) -> None:
    assert run(daemon, "models", "add", "asked", "sim/asked").code == 0
    assert state(daemon, "asked") == "unloaded"
    assert run(daemon, "run", "--prompt", "Hi").code == 0
    wait_for(lambda: state(daemon, "asked") == "loaded", 20)


def test_what_was_added_is_there_after_a_restart(daemon: DaemonProcess) -> None:
    assert run(daemon, "models", "add", "kept", "sim/kept").code == 0
    daemon.restart()
    assert state(daemon, "kept") in {"unloaded", "loaded"}
    refused = run(daemon, "models", "add", "kept", "sim/other")
    assert (refused.code, "already" in refused.err) == (1, True)
