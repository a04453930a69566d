"""The idle command as a real process, the idle webhook over a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Self

import openai
import pytest

from tests.support.aio import eventually, run
from tests.support.waiting import wait_for
from vllm_bootstrap.batches import posting
from vllm_bootstrap.models.idle_hook import Command, IdleFacts, Webhook, command_environment

FACTS = IdleFacts("evt_1", 601.5, 1_800_000_000.0, 600, 2, "node-a", 4)
ENV = {"PATH": os.environ["PATH"]}


def command(code: str, *args: str, **fields: float) -> Command:
    return Command([sys.executable, "-c", code, *args], ENV, **fields)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_is_run_as_it_is_written_with_the_facts_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = "import json, os, sys; json.dump([sys.argv[2:], dict(os.environ)], open(sys.argv[1], 'w'))"
    assert run(command(told, str(out), "$HOME; rm -rf *").run(FACTS)) is None
    args, environ = json.loads(out.read_text())
    assert args == ["$HOME; rm -rf *"]
    environ.pop("LC_CTYPE", None)  # Python's own
    assert environ == {
        **ENV,
        "VLLM_BOOTSTRAP_IDLE_S": "601",
        "VLLM_BOOTSTRAP_IDLE_SINCE": "2027-01-15T08:00:00Z",
        "VLLM_BOOTSTRAP_IDLE_AFTER_S": "600",
        "VLLM_BOOTSTRAP_IDLE_ATTEMPT": "2",
        "VLLM_BOOTSTRAP_NODE_ID": "node-a",
        "VLLM_BOOTSTRAP_GPUS": "4",
    }


def test_the_landlords_variables_are_passed_on_and_ours_are_not() -> None:
    around = {"RUNPOD_POD_ID": "p1", "AWS_REGION": "eu", "VLLM_ACCESS_KEY": "k", "HF_TOKEN": "t", "OTHER": "o"}
    assert command_environment(ENV, around) == {**ENV, "RUNPOD_POD_ID": "p1", "AWS_REGION": "eu"}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('much', flush=True); sys.exit('no rights')", "ended with status 1: no rights"),
        ("import sys; sys.exit(3)", "ended with status 3"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("print('x' * 1000000 + chr(10) + 'end' + chr(27)); raise SystemExit(1)", "ended with status 1: end"),
    ],
)
def test_a_failure_says_how_it_failed(code: str, said: str) -> None:
    assert run(command(code).run(FACTS)) == f"{sys.executable} {said}"


def test_a_program_that_is_not_there_is_a_failure() -> None:
    assert (
        run(Command(["/no/such/program"], ENV).run(FACTS))
        == "/no/such/program cannot be run: No such file or directory"
    )


def test_what_lasts_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}'); time.sleep(60)"
    )
    error = run(command(code, str(pids), limit_s=1.5).run(FACTS))
    assert error is not None
    assert "did not end within 1.5 s" in error
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()), what="both to end")


def test_a_daemon_that_ends_takes_the_command_along(tmp_path: Path) -> None:
    pids = tmp_path / "pid"

    async def scenario() -> None:
        code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
        task = asyncio.create_task(command(code, str(pids)).run(FACTS))
        await eventually(lambda: pids.exists() and pids.read_text())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not alive(int(pids.read_text()))

    run(scenario())


@pytest.mark.parametrize("status", [0, 1])
def test_what_it_leaves_in_the_background_is_neither_waited_for_nor_ended(tmp_path: Path, status: int) -> None:
    left = tmp_path / "pid"
    code = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '60']);"
        "open(sys.argv[1], 'w').write(str(child.pid)); sys.exit(int(sys.argv[2]))"
    )
    error = run(command(code, str(left), str(status)).run(FACTS))
    pid = int(left.read_text())
    try:
        assert (error is None) is (status == 0)
        assert alive(pid)
    finally:
        os.kill(pid, 9)


class Receiver:
    """Answers every POST with ``status`` and keeps what came."""

    def __init__(self, status: int) -> None:
        self.status, self.got = status, list[tuple[dict[str, str], bytes]]()

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/stop?secret=1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        self.got.append((headers, await reader.readexactly(int(headers["content-length"]))))
        writer.write(f"HTTP/1.1 {self.status} X\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()


def test_the_webhook_is_signed_and_may_go_to_a_private_address() -> None:
    async def scenario() -> None:
        async with Receiver(204) as receiver:
            secret = "a secret of sixteen characters"
            assert await Webhook(receiver.url, secret, posting.post, time.time).run(FACTS) is None
            headers, body = receiver.got[0]
        event = json.loads(body)
        assert (event["id"], event["type"], headers["webhook-id"]) == ("evt_1", "box.idle", "evt_1")
        assert event["data"] == {
            "node_id": "node-a", "idle_s": 601.5, "idle_since": 1_800_000_000, "idle_after_s": 600, "attempt": 2,
            "gpus": 4,
        }  # fmt: skip
        client = openai.OpenAI(api_key="x", webhook_secret=secret)
        client.webhooks.verify_signature(body, headers)

    run(scenario())


def test_without_a_secret_it_goes_unsigned() -> None:
    async def scenario() -> None:
        async with Receiver(200) as receiver:
            assert await Webhook(receiver.url, "", posting.post, time.time).run(FACTS) is None
            assert "webhook-signature" not in receiver.got[0][0]

    run(scenario())


def test_a_refusal_and_a_closed_port_are_failures_that_name_the_host_only() -> None:
    async def scenario() -> None:
        async with Receiver(500) as receiver:
            hook = Webhook(receiver.url, "", posting.post, time.time)
            assert await hook.run(FACTS) == "127.0.0.1 answered 500"
        error = await hook.run(FACTS)
        assert error is not None
        assert error.startswith("127.0.0.1: no connection")
        assert "secret" not in error

    run(scenario())
