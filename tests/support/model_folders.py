"""Models on disk as far as fit looks at them: configuration and headers. Their weights are holes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

ELEMENT = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4}


def write_safetensors(path: Path, parameters: int, dtype: str = "BF16", *, name: str = "model.layers.0.x") -> None:
    """A sparse file with one tensor of so many parameters."""
    size = parameters * ELEMENT[dtype]
    header = json.dumps({name: {"dtype": dtype, "shape": [parameters], "data_offsets": [0, size]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def write_model(folder: Path, config: dict[str, Any], parameters: int, *, shards: int = 1, dtype: str = "BF16") -> Path:
    """A folder with a configuration and weights of about that many parameters in all."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", parameters, dtype)
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, parameters // shards, dtype, name=f"model.layers.{number}.x")
        weight_map[f"model.layers.{number}.x"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def cache_model(hf_home: Path, repo: str, config: dict[str, Any], parameters: int, commit: str = "c" * 40) -> Path:
    """The same as a revision ``main`` of a repository in a Hugging Face cache."""
    base = hf_home / "hub" / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs" / "main").write_text(commit)
    return write_model(base / "snapshots" / commit, config, parameters)
