"""What an operator says about an idle box, from settings and the docs to what is done."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.aio import run
from vllm_bootstrap.configure import StartError, idle_actions
from vllm_bootstrap.models.idle_hook import IdleFacts
from vllm_bootstrap.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FACTS = IdleFacts("evt_1", 601.5, 1_800_000_000.0, 600, 1, "node-a", 4)


def names(**fields: Any) -> list[str]:
    return [action.name for action in idle_actions(Settings(idle_after_s=60, **fields), lambda: 0.0)]


def test_nothing_is_done_unless_it_is_said() -> None:
    assert names() == []
    assert names(idle_command="true", idle_webhook="http://10.0.0.1/off") == ["command", "webhook"]


@pytest.mark.parametrize("fields", [{"idle_command": "true"}, {"idle_webhook": "http://10.0.0.1/"}])
def test_a_hook_without_a_time_is_refused_and_zero_turns_it_off(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="IDLE_AFTER_S must say after how long"):
        Settings(**fields)
    assert Settings(idle_after_s=0, **fields).idle_after_s == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"idle_command": "sh -c 'oops"}, "IDLE_COMMAND: No closing quotation"),
        ({"idle_command": "  "}, "IDLE_COMMAND: there is no program"),
        ({"idle_command": "no-such-program-here now"}, "there is no program 'no-such-program-here'"),
        ({"idle_webhook": "ftp://10.0.0.1/"}, "IDLE_WEBHOOK: not an http"),
        ({"idle_webhook": "http://10.0.0.1/", "webhook_secret": "whsec_!"}, "IDLE_WEBHOOK: what follows whsec_"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(StartError, match=re.escape(said)):
        names(**fields)


def documented() -> list[str]:
    text = (ROOT / "docs/operations.md").read_text()
    block = text.split("<!-- idle commands -->")[1].split("```")[1]
    lines = [line for line in block.splitlines()[1:] if not line.startswith("#")]
    return [shlex.split(line)[0].removeprefix("VLLM_BOOTSTRAP_IDLE_COMMAND=") for line in lines]


@pytest.mark.parametrize(
    ("number", "program", "argv"),
    [
        (0, "runpodctl", ["stop", "pod", "p o d"]),
        (1, "gcloud", ["compute", "instances", "stop", "my-gpu-box", "--zone", "europe-west4-a", "--quiet"]),
        (2, "aws", ["ec2", "stop-instances", "--instance-ids", "i-0123456789abcdef0"]),
        (3, "sudo", ["shutdown", "-h", "now"]),
    ],
)
def test_the_documented_commands_call_what_they_mean_to(
    number: int, program: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / program
    out = tmp_path / "out"
    stand_in.write_text(f'#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open("{out}", "w"))\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RUNPOD_POD_ID", "p o d")
    commands = documented()
    assert len(commands) == 4
    [action] = idle_actions(Settings(idle_after_s=60, idle_command=commands[number]), lambda: 0.0)
    assert run(action.run(FACTS)) is None
    assert json.loads(out.read_text()) == argv
