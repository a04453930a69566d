"""``demo``: everything once, in seconds, with nothing installed: its own daemon, pretended GPUs, a simulated model.

Invariant: it touches nothing of the user's own: a temp folder, a free port, a random key, settings from nowhere else.
Whatever happens, its daemon and its launches are ended and the folder is gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Annotated

import typer

from vllm_bootstrap.cli import output, progress, talking, text
from vllm_bootstrap.cli.launching import gpus_of
from vllm_bootstrap.cli.options import Failure
from vllm_bootstrap.cli.viewing import users_of
from vllm_bootstrap.client import Client, DaemonUnreachable
from vllm_bootstrap.sdk import discovery
from vllm_bootstrap.wire import LaunchStatus

MODEL = "demo/Chatty-0.5B"
PROMPT = "Say this once more: a simulated model repeats what it hears, word by word, at the speed of a real one."
START_LIMIT_S, END_LIMIT_S = 15.0, 12.0
LOG_LINES = 6


def demo(
    *, seconds: Annotated[float, typer.Option("--load-seconds", min=0, max=10, help="How long loading takes.")] = 4.0
) -> None:
    """Show a launch, a streamed chat and a stop. Needs no GPU and no vLLM, takes about ten seconds."""
    if platform.system() != "Linux":
        raise Failure("The daemon runs on Linux only, and so does this demo.")
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="vb-"))
    try:
        with daemon(folder) as client:
            _title("1", "A daemon with two pretended GPUs")
            output.say(f"  {client.version().version} at {client.target.url}, started in {_since(began)}")
            _show(client, seconds)
        output.say("  the daemon has ended too, nothing is left")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    output.say()
    output.say(output.styled(f"Done in {_since(began)}.", "green") + " The real thing, on a machine with vLLM:")
    output.say("  vllm-bootstrap                                    # the daemon, http://127.0.0.1:8000")
    output.say("  vllm-bootstrap launch Qwen/Qwen3-0.6B --wait")
    output.say("  vllm-bootstrap chat")


def _show(client: Client, seconds: float) -> None:
    _title("2", f"Launch {MODEL}")
    launch = client.launch(MODEL, gpu_count=1, extra_args={"boot_delay": seconds, "tokens_per_second": 30})
    with progress.shown() as on_progress:
        ready = client.wait_ready(launch.launch_id, timeout_s=60, on_progress=on_progress)
    took = text.duration((ready.state_changed_at - ready.created_at).total_seconds())
    output.say(f"  {output.styled('ready', 'green')} after {took} on {gpus_of(ready)}, {client.target.url}/v1")
    _gpus(client)
    _title("3", "Ask it, streamed")
    _chat(client, ready)
    _title("4", "The end of its log")
    for line in client.logs(ready.launch_id, tail=LOG_LINES).content.splitlines():
        output.say("  " + output.styled(text.harmless(line, colours=False), "dim"))
    _title("5", "Stop it")
    asked = time.monotonic()
    stopped = client.stop(ready.launch_id)
    how = "by force" if stopped.forced else "without force"
    output.say(f"  {stopped.state} {how} in {_since(asked)}, its processes are seen dead")
    _gpus(client)


def _chat(client: Client, ready: LaunchStatus) -> None:
    output.say(f"  {output.styled('you', 'bold')}    {PROMPT}")
    output.raw(f"  {output.styled('model', 'bold')}  ")
    column, began, count = 9, time.monotonic(), 0
    messages = [{"role": "user", "content": PROMPT}]
    for piece in talking.answer(client, ready.served_model_name, messages, {"max_tokens": 60}):
        if column + len(piece) > 100:
            output.raw("\n         ")
            column, piece = 9, piece.lstrip()  # noqa: PLW2901 - it begins a line now
        output.raw(piece)
        column, count = column + len(piece), count + 1
    rate = count / max(0.001, time.monotonic() - began)
    output.say("\n" + output.styled(f"         {count} pieces, {rate:.0f} a second", "dim"))


def _gpus(client: Client) -> None:
    for gpu in client.gpus().data:
        state = output.styled(gpu.state.ljust(8), output.style_of(gpu.state))
        owner = users_of(gpu)
        output.say(f"  GPU {gpu.index}  {state}{'' if owner == '-' else f' by {owner}'}")


def _title(number: str, what: str) -> None:
    output.say()
    output.say(output.styled(f"{number}  {what}", "bold"))


def _since(began: float) -> str:
    return text.duration(time.monotonic() - began)


@contextlib.contextmanager
def daemon(folder: Path) -> Generator[Client]:
    """A daemon of our own below ``folder``; ended, with all it started, at the end. Raises ``Failure``."""
    key = f"demo-{secrets.token_urlsafe(24)}"
    (folder / "env").touch()
    command = [sys.executable, "-m", "vllm_bootstrap", "serve", "--port", "0", "--env-file", str(folder / "env")]
    with (folder / "daemon.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(folder, key),
            start_new_session=True,  # Ctrl-C is for us: we end it in order
        )
    try:
        with Client(_address(process, folder), key) as client:
            yield client
    finally:
        _end(process)


def environment(folder: Path, key: str) -> dict[str, str]:
    """The environment of that daemon: ours without any setting, so that nothing of the user's own is touched."""
    from vllm_bootstrap.cli.serve import known_names  # noqa: PLC0415 - only the demo needs all settings
    from vllm_bootstrap.settings import PREFIX  # noqa: PLC0415

    settings = known_names()
    inherited = {k: v for k, v in os.environ.items() if k.upper() not in settings and not k.upper().startswith(PREFIX)}
    return {
        **inherited,
        "VLLM_ACCESS_KEY": key,
        "VLLM_BOOTSTRAP_DEVICES": "mock:2",
        "VLLM_BOOTSTRAP_STATE_DIR": str(folder / "state"),
        "VLLM_BOOTSTRAP_RUNTIME_DIR": str(folder / "run"),
        "VLLM_BOOTSTRAP_LOCK_DIR": str(folder / "lock"),
        "VLLM_BOOTSTRAP_PROBE_INTERVAL_S": "0.2",
        "HF_HOME": str(folder / "cache"),
        "VLLM_BOOTSTRAP_MODELS_FILE": os.devnull,  # no catalogue of the user's
    }


def _address(process: subprocess.Popen[bytes], folder: Path) -> str:
    """Where the daemon listens, once it does."""
    deadline = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        found = discovery.announced(folder / "state")
        if found is not None:
            with contextlib.suppress(DaemonUnreachable), Client(found) as client:
                client.healthz()
                return found
        time.sleep(0.05)
    said = (folder / "daemon.log").read_text(encoding="utf-8", errors="replace")[-2000:]
    raise Failure(f"The demo's daemon did not start.\n{said}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask twice (the second time without grace), then insist."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_LIMIT_S)
