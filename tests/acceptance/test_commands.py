"""The commands and the client against a real daemon, and the demo, which brings its own."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import commands, leftovers
from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for
from vllm_bootstrap import errors
from vllm_bootstrap.client import AsyncClient, LaunchFailed

KEY = "the-admin-key-of-this-test"
DEMO_LIMIT_S = 20.0


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(access_key=KEY) as made:
        yield made


def run(daemon: DaemonProcess, *args: str, stdin: str | None = None) -> commands.Result:
    return commands.run(*args, env={"VLLM_BOOTSTRAP_URL": daemon.url, "VLLM_BOOTSTRAP_KEY": KEY}, stdin=stdin)


def ok(daemon: DaemonProcess, *args: str, stdin: str | None = None) -> str:
    result = run(daemon, *args, stdin=stdin)
    assert result.code == 0, result.err
    return result.out


def test_a_model_from_launch_to_stop(daemon: DaemonProcess) -> None:
    out = ok(daemon, "launch", "org/model", "--gpus", "1", "--wait", "--arg", "boot_delay=1")
    assert "ready after" in out.splitlines()[-1]
    assert "ready" in ok(daemon, "ps")
    assert ok(daemon, "run", "--prompt", "say it again").strip() == "say it again"
    assert ok(daemon, "chat", stdin="hello there\n").strip() == "hello there"
    assert "Application startup complete" in ok(daemon, "logs", "org/model", "--tail", "1")
    assert "org/model" in ok(daemon, "status", "org/model", "--events")
    assert "claimed" in ok(daemon, "gpus")
    assert ok(daemon, "stop", "--all").strip().endswith("stopped")
    assert "claimed" not in ok(daemon, "gpus")


def test_a_failed_start_is_explained(daemon: DaemonProcess) -> None:
    result = run(daemon, "launch", "org/broken", "--gpus", "1", "--wait", "--arg", "die_at_boot=bad_flag")
    assert result.code == 1
    assert "org/broken failed: bad flag" in result.err
    assert "Hint: " in result.err
    assert "    | " in result.err


def test_a_log_is_followed_to_the_end_of_the_launch(daemon: DaemonProcess) -> None:
    ok(daemon, "launch", "org/followed", "--gpus", "1", "--wait")
    timer = threading.Timer(
        0.5, daemon.stop_launch, [daemon.request("GET", "/launches").json()["data"][0]["launch_id"]]
    )
    timer.start()
    out = ok(daemon, "logs", "-f", "org/followed")
    timer.join()
    assert "Application startup complete" in out
    assert out == ok(daemon, "logs", "org/followed")


def test_a_terminal_gets_a_bar(daemon: DaemonProcess) -> None:
    """In a pseudo terminal, as a person sees it."""
    env = {**os.environ, "VLLM_BOOTSTRAP_URL": daemon.url, "VLLM_BOOTSTRAP_KEY": KEY, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "vllm_bootstrap", "launch", "org/tty", "--gpus", "1", "--arg", "boot_delay=1"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*command, "--wait"], env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the last one who had the terminal open is gone
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert process.wait(20) == 0
    assert "━" in seen.decode()
    assert b"\x1b[32mready\x1b[0m after" in seen
    ok(daemon, "stop", "org/tty")


def interrupted(daemon: DaemonProcess, after: str, *args: str) -> tuple[int, str, str]:
    """A command that gets Ctrl-C once it has printed ``after``: exit code, output, error output."""
    env = {**os.environ, "VLLM_BOOTSTRAP_URL": daemon.url, "VLLM_BOOTSTRAP_KEY": KEY}
    command = [sys.executable, "-m", "vllm_bootstrap", *args]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = ""
    for line in process.stdout:
        out += line
        if after in line:
            break
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=20)
    return process.returncode, out + rest, err


def test_ctrl_c_ends_the_waiting_not_the_launch(daemon: DaemonProcess) -> None:
    args = ["launch", "org/slow", "--gpus", "1", "--wait", "--arg", "boot_delay=12"]
    code, out, err = interrupted(daemon, "starting", *args)
    launch_id = out.split()[0]
    assert code == 1
    assert f"It goes on starting. To end it: vllm-bootstrap stop {launch_id}" in err
    assert daemon.status(launch_id)["state"] == "bootstrapping"
    code, out, err = interrupted(daemon, "vLLM server version", "logs", "-f", launch_id)
    assert (code, err.strip()) == (0, "")
    ok(daemon, "stop", launch_id)


def test_the_client_from_launch_to_stop(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        with client.launched("org/sdk", gpu_count=1) as launch, launch.openai() as stock:
            answer = stock.chat.completions.create(
                model=launch.served_model_name, messages=[{"role": "user", "content": "the same again"}]
            )
            assert answer.choices[0].message.content == "the same again"
        assert client.status(launch.id).state == "stopped"
        assert [event.to_state for event in client.events(launch.id)][-1] == "stopped"
        with (
            pytest.raises(LaunchFailed) as caught,
            client.launched("org/broken", gpu_count=1, extra_args={"die_at_boot": "gpu_out_of_memory"}),
        ):
            pytest.fail("it cannot start")
        failure = caught.value.status.failure
        assert failure is not None
        assert failure.failure_class == "gpu_out_of_memory"


def test_the_async_client_from_launch_to_stop(daemon: DaemonProcess) -> None:
    import asyncio  # noqa: PLC0415

    async def main() -> list[str]:
        async with (
            AsyncClient(daemon.url, KEY) as client,
            client.launched("org/async", gpu_count=1) as launch,
            launch.async_openai() as stock,
        ):
            stream = await stock.chat.completions.create(
                model=launch.served_model_name, messages=[{"role": "user", "content": "a b c"}], stream=True
            )
            return [c.choices[0].delta.content or "" async for c in stream if c.choices]

    assert "".join(asyncio.run(main())) == "a b c"


def test_a_conflict_names_the_owner(daemon: DaemonProcess) -> None:
    with daemon.client() as client, client.launched("org/owner", gpu_ids=[0]) as launch:
        with pytest.raises(errors.GpuConflict, match=launch.id):
            client.launch("org/other", gpu_ids=[0])
        assert run(daemon, "launch", "org/other", "--gpu", "0").code == 1


# -- the demo ---------------------------------------------------------------------------------------------------------


def demo(*args: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vllm_bootstrap", "demo", *args]
    return subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("vb-*"))


def test_the_demo_shows_everything_and_leaves_nothing(tmp_path: Path) -> None:
    """Whatever is set in the environment: it has settings of its own."""
    before, began = folders(), time.monotonic()
    foreign = {"VLLM_BOOTSTRAP_PORT": "1", "VLLM_ACCESS_KEY": "of-the-user", "HOST": "my-machine", "MODEL_ID": "x"}
    process = demo("--load-seconds", "1", **foreign, VLLM_BOOTSTRAP_STATE_DIR=str(tmp_path / "state"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert time.monotonic() - began < DEMO_LIMIT_S
    for said in (
        "ready after",
        "claimed",
        "a simulated model repeats what it hears",
        "startup complete",
        "without force",
    ):
        assert said in out
    assert folders() == before
    assert not (tmp_path / "state").exists()


def test_a_demo_that_is_interrupted_leaves_nothing() -> None:
    before = folders()
    process = demo("--load-seconds", "10")
    (folder,) = wait_for(lambda: folders() - before, 20)
    wait_for(lambda: any((folder / "run").glob("*/*")) if (folder / "run").exists() else False, 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert folders() == before
    assert leftovers.processes_referring_to(folder) == []
