"""What vLLM is told, by version, as it was agreed on: written by ``python -m tests.support.golden_commands``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support import engines
from vllm_bootstrap.engines import vllm_command
from vllm_bootstrap.engines.base import LaunchSpec, Placement
from vllm_bootstrap.engines.capabilities import capabilities
from vllm_bootstrap.engines.versions import parse
from vllm_bootstrap.engines.vllm_command import VllmOptions

FOLDER = Path(__file__).resolve().parent.parent / "fixtures/engine_commands"
RECORDED = ("0.8.5", "0.9.2", "0.10.2", "0.12.0", "0.15.1", "0.18.1", "0.20.0", "0.26.0", "0.32.0", "0.33.0")
BETWEEN = ("0.8.0", "0.11.1", "0.19.0", "0.29.0", "0.34.1")

SCENARIOS: Mapping[str, tuple[LaunchSpec, Placement]] = {
    "two GPUs, everything given": (
        engines.spec(
            "/models/llama",
            served="llama",
            max_model_len=8192,
            max_num_seqs=64,
            max_num_batched_tokens=4096,
            quantization="fp8",
            kv_cache_dtype="fp8",
            revision="main",
            tokenizer="org/tokenizer",
            seed=7,
            enforce_eager=True,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.8,
            extra={"enable-lora": True, "lora-modules": ["a=/lora/a", "b=/lora/b"], "max-loras": 2},
            env={"VLLM_LOGGING_LEVEL": "DEBUG"},
        ),
        engines.cuda(2, tp=2),
    ),
    "half of an old GPU": (engines.spec(), engines.cuda(capability=(7, 5), share=500)),
    "four GPUs in a pipeline": (engines.spec(), engines.cuda(4, tp=2, pp=2)),
    "cpu": (engines.spec(max_model_len=1024), engines.cpu()),
}


def command(version: str, spec: LaunchSpec, placement: Placement) -> dict[str, Any]:
    """Flags and environment of one launch, without what the interpreter adds."""
    can, context, options = capabilities(parse(version)), engines.context(), VllmOptions(hf_home="/hf")
    flags = vllm_command.flags(spec, placement, can, options) + vllm_command.listen_flags(context, can)
    return {"argv": flags, "env": vllm_command.environment(spec, placement, context, can, options, "/opt/engine/bin")}


def golden(version: str) -> dict[str, Any]:
    return {name: command(version, *wish) for name, wish in SCENARIOS.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for number in (*RECORDED, *BETWEEN):
        (FOLDER / f"{number}.json").write_text(json.dumps(golden(number), indent=1) + "\n")
