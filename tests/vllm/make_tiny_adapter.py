# ruff: noqa: PLC0415 - the engine's libraries take seconds to import, the usage message should not
"""Make a LoRA adapter for the tiny model, for tests against a real engine. Nothing is downloaded.

Run it with the engine's interpreter: ``make_tiny_adapter.py OUTPUT_DIR RANK``. Its weights are random and large: it
answers differently from its base.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HIDDEN, LAYERS = 256, 2
TARGETS = ("q_proj", "v_proj")


def main(argv: list[str]) -> int:
    if len(argv) != 3:
        print("usage: make_tiny_adapter.py OUTPUT_DIR RANK", file=sys.stderr)
        return 2
    import torch
    from safetensors.torch import save_file

    out, rank = Path(argv[1]), int(argv[2])
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(11)
    weights = {}
    for layer in range(LAYERS):
        for target in TARGETS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            weights[f"{name}.lora_A.weight"] = torch.randn(rank, HIDDEN)
            weights[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, rank)
    save_file(weights, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": list(TARGETS), "base_model_name_or_path": "tiny",
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
