"""One real vLLM under several names: its own, an alias, and a LoRA adapter whose rank was read from its files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import run
from tests.support.world import World
from vllm_bootstrap.engines import probe
from vllm_bootstrap.engines.environment import base_environment
from vllm_bootstrap.engines.interpreter import Locator
from vllm_bootstrap.engines.vllm import VllmEngine
from vllm_bootstrap.engines.vllm_command import VllmOptions
from vllm_bootstrap.gpus.cpu import CpuInventory
from vllm_bootstrap.models.orders import order_of
from vllm_bootstrap.models.types import AdapterEntry, ModelEntry

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
RANK = 20  # no rank that vLLM has kernels for: it must be rounded up, and is above vLLM's own default


@pytest.fixture(scope="module")
def adapter(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "support"
    script = Path(__file__).with_name("make_tiny_adapter.py")
    subprocess.run([engine_python, script, folder, str(RANK)], check=True, capture_output=True, timeout=120)
    return folder


async def ask(world: World, launch_id: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    instance = world.adverts[launch_id].instance
    assert instance is not None
    data = None if body is None else json.dumps(body).encode()
    reply = await probe.EngineClient(instance.endpoint).request(method, path, data, timeout_s=60)
    assert reply.status == 200, reply.body
    return reply.json()


def test_a_model_of_the_catalogue_answers_to_all_its_names(
    engine_python: Path, tiny_model: Path, adapter: Path
) -> None:
    entry = ModelEntry(
        "tiny", str(tiny_model), engine="vllm", aliases=("chat",), max_parallel=3, args={"max_model_len": 512},
        adapters=(AdapterEntry("support", str(adapter), ("help",)),),
    )  # fmt: skip
    locator = Locator(engine_python=engine_python, engine_command=None, environ=base_environment(os.environ))

    async def main() -> None:
        world = World(engines={"vllm": VllmEngine(locator, VllmOptions())}, start_timeout_s=200)
        world.inventory = CpuInventory(1)  # type: ignore[assignment]  # another kind of device
        async with world:
            view = await world.supervisor.launch(order_of(entry), "tester")
            found = await world.until(view.launch_id, "ready", "failed", timeout=200)
            assert found.state == "ready", found.failure
            assert found.capacity == 3
            listed = await ask(world, view.launch_id, "GET", "/v1/models")
            assert {model["id"] for model in listed["data"]} == {"tiny", "chat", "support", "help"}
            said = {}
            for name in ("tiny", "chat", "support", "help"):
                body = {"model": name, "prompt": "Tell me", "max_tokens": 8, "temperature": 0}
                said[name] = (await ask(world, view.launch_id, "POST", "/v1/completions", body))["choices"][0]["text"]
            assert said["tiny"] == said["chat"]
            assert said["support"] == said["help"] != said["tiny"]

    run(main())
