"""``vllm-bootstrap models`` and what docs/models.md shows, word for word, against a running daemon."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support import commands
from tests.support import hub as stand_in
from tests.support.model_box import ModelBox

DOCS = Path(__file__).resolve().parents[2] / "docs/models.md"
EXAMPLE = DOCS.parents[1] / "config/example.models.yaml"
QWEN = "Qwen/Qwen2.5-3B-Instruct"
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256,
    "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip


def tensors(size: int, name: str = "x") -> bytes:
    header = json.dumps({name: {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


@pytest.fixture(scope="module")
def hub() -> Iterator[stand_in.Hub]:
    with stand_in.running() as hub:
        hub.repo(QWEN, {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": tensors(200_000)})
        yield hub


@pytest.fixture(scope="module")
def box(hub: stand_in.Hub) -> Iterator[ModelBox]:
    models = {
        "qwen": {"source": QWEN, "aliases": ["chat"], "args": {"max_model_len": 8192}},
        "llama": {"source": "org/llama", "gpus": {"count": 1}},
        "broken": {"source": "org/broken", "extra_args": {"die-at-boot": "gated_repository"}},
    }
    with ModelBox(models, access_key="k-of-the-operator", env=hub.env()) as made:
        yield made


def run(box: ModelBox, *args: str, **options: Any) -> commands.Result:
    where = {"VLLM_BOOTSTRAP_URL": box.url, "VLLM_BOOTSTRAP_KEY": str(box.key)}
    env = {**where, "VLLM_BOOTSTRAP_STATE_DIR": "/nonexistent"}
    return commands.run("models", *args, env=env, **options)


def test_from_the_hub_to_answers_and_away_again(box: ModelBox, hub: stand_in.Hub) -> None:
    listed = run(box, "list")
    assert listed.code == 0, listed.err
    assert {line.split()[0]: line.split()[1] for line in listed.out.splitlines() if "org/" in line or QWEN in line} == {
        "broken": "unloaded", "llama": "unloaded", "qwen": "unloaded",
    }  # fmt: skip
    pulled = run(box, "pull", "qwen")
    assert pulled.code == 0, pulled.err
    assert "on the disk" in pulled.out
    commit = hub.repos[QWEN].branches["main"]
    assert commit[:12] in pulled.out
    assert run(box, "check", "qwen", "--gpus", "1", "--max-model-len", "8192").code == 0
    assert run(box, "check", "qwen", "--gpus", "1", "--max-model-len", "1000000000").code == 1
    prefetched = run(box, "prefetch", "qwen")
    assert prefetched.code == 0, prefetched.err

    loaded = run(box, "load", "chat")
    assert (loaded.code, loaded.out.splitlines()[-1]) == (0, "qwen  loaded"), loaded
    (launch,) = box.launches_of("qwen")
    assert f"--revision={commit}" in Path(f"/proc/{launch['pid']}/cmdline").read_text().split("\0")
    box.serves("chat")
    assert "qwen" in run(box, "list", "--state", "loaded").out
    assert run(box, "list", "qwen", "--json").json()["state"] == "loaded"
    shown = run(box, "list", "qwen", terminal=True).out
    assert launch["launch_id"] in shown
    assert run(box, "rm", "qwen", "--files").code == 1, "an engine needs them"
    assert run(box, "unload", "qwen").out == "qwen  unloaded\n"
    freed = run(box, "rm", "qwen", "--files")
    assert (freed.code, "freed" in freed.out) == (0, True), freed.err


def test_what_fails_has_exit_code_1_and_says_why(box: ModelBox) -> None:
    for terminal in (False, True):
        failed = run(box, "load", "broken", terminal=terminal)
        assert failed.code == 1
        assert "HF_TOKEN" in failed.err
    assert "failed (gated repository)" in run(box, "list").out
    assert run(box, "pull", "llama").code == 1, "there is no such repository"
    missing = run(box, "load", "nobody")
    assert (missing.code, "'nobody'" in missing.err) == (1, True)
    assert "Traceback" not in missing.err


def test_added_and_removed(box: ModelBox) -> None:
    options = ("--alias", "m", "--gpus", "1", "--max-model-len", "4096", "--ttl", "15m", "--pin")
    assert run(box, "add", "mine", "org/mine", *options).out == "mine\n"
    entry = box.model("m")["entry"]
    assert (entry["source"], entry["gpus"]["count"], entry["ttl"], entry["pin"]) == ("org/mine", 1, 900, True)
    assert entry["args"] == {"max_model_len": 4096}
    assert run(box, "add", "mine", "org/other").code == 1
    box.serves("m")
    assert run(box, "unload", "mine").code == 1, "it is pinned"
    assert run(box, "unload", "mine", "--force").code == 0
    assert run(box, "rm", "mine").out == "mine  removed\n"
    assert run(box, "rm", "llama").code == 1, "it stands in the file"
    given = json.dumps({"source": "org/json", "gpus": {"count": 1}, "defaults": {"temperature": 0.5}})
    assert run(box, "add", "from-json", "--entry", "-", stdin=given).code == 0
    assert box.model("from-json")["entry"]["defaults"] == {"temperature": 0.5}
    assert run(box, "rm", "from-json").code == 0


def test_an_adapter_is_brought_asked_for_and_deleted(box: ModelBox, tmp_path: Path) -> None:
    folder = tmp_path / "my-adapter"
    folder.mkdir()
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "org/llama",
        "target_modules": ["q_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(tensors(64, "a.lora_A.weight"))
    archive = tmp_path / "mine.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, ".")
    brought = run(box, "adapters", "llama", "--add", str(archive), "--as", "support")
    assert brought.out == "support  can be asked for as a model\n", brought.err
    assert "support" in run(box, "adapters", "llama").out
    box.serves("support")
    (launch,) = box.launches_of("llama")
    assert "support" in Path(f"/proc/{launch['pid']}/cmdline").read_text()
    assert run(box, "adapters", "llama", "--rm", "support").code == 1, "an engine serves it"
    assert run(box, "unload", "llama").code == 0
    assert run(box, "adapters", "llama", "--rm", "support").out == "support  deleted\n"
    assert box.complete("support").status == 404


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)


def test_the_commands_of_the_page(box: ModelBox, hub: stand_in.Hub) -> None:
    """Those that stand alone, with curl. Each may be answered with what the page says, or with why not."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    curls = [line.partition("       #")[0] for line in text.splitlines() if line.startswith("curl ")]
    wanted = [line for line in curls if "…" not in line]
    assert len(wanted) >= 7
    statuses = {}
    for command in wanted:
        if "adapters" in command or '"support"' in command:  # see above
            continue
        here = command.replace("localhost:8000", box.url)
        done = subprocess.run(
            ["bash", "-c", f"{here} -sS -w '\\n%{{http_code}}'"],
            env={"PATH": os.environ["PATH"], "KEY": str(box.key)},
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        statuses[command] = (int(done.stdout.splitlines()[-1]), done.stdout)
    for command, (status, said) in statuses.items():
        expected = {200, 202}
        if "llama/prefetch" in command or "-X DELETE" in command:
            expected |= {404, 409}  # nothing of it is on the disk; the download has ended
        assert status in expected, (command, said)
    assert any("data: [DONE]" in said for _, said in statuses.values())


def test_the_python_of_the_page(box: ModelBox) -> None:
    (code,) = blocks("python")
    env = {"VLLM_BOOTSTRAP_URL": box.url, "VLLM_BOOTSTRAP_KEY": str(box.key)}
    with mock.patch.dict(os.environ, env), mock.patch("builtins.print") as said:
        exec(compile(code, str(DOCS), "exec"), {})
    state, names = said.call_args.args
    assert state == "loaded"
    assert {"qwen", "chat"} <= set(names)


def test_the_example_catalogue_works() -> None:
    with ModelBox(models_file=EXAMPLE, devices="mock:4") as box:
        box.wait_model("qwen", "loaded")
        for name in ("chat", "support", "embed", "big"):
            box.serves(name)
        assert box.loaded() == {"qwen", "embed", "big"}
