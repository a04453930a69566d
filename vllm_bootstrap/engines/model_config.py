"""What a model's ``config.json`` (and a LoRA adapter's ``adapter_config.json``) says, when it is at hand locally: a
model's folder or the Hugging Face cache.

Blocking, but only for one small file. Never downloads; nothing found means None, never a guess.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 4 * 1024 * 1024
# Where multimodal models keep the part that is split among GPUs.
_INNER = ("text_config", "llm_config", "language_config", "thinker_config")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def attention_heads(model: str, hf_home: Path | None, revision: str | None = None) -> int | None:
    """Number of attention heads of ``model`` (a path or a repository id), None where it cannot be told."""
    config = read_config(model, hf_home, revision)
    return _heads(config) if config is not None else None


def lora_rank(adapter: str, hf_home: Path | None) -> int | None:
    """The rank of a LoRA adapter (a path or a repository id), None where it cannot be told."""
    config = read_config(adapter, hf_home, file="adapter_config.json")
    rank = config.get("r") if config is not None else None
    return rank if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 else None


def read_config(
    model: str, hf_home: Path | None, revision: str | None = None, *, file: str = "config.json"
) -> dict[str, Any] | None:
    """The model's ``file`` as it lies on this machine, None where it does not or cannot be read."""
    folder = local_folder(model, hf_home, revision)
    if folder is None:
        return None
    path = folder / file
    try:
        with path.open("rb") as found:
            config = json.loads(found.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def local_folder(model: str, hf_home: Path | None, revision: str | None = None) -> Path | None:
    """Where a model's files would be: its own folder, or that of a cached revision (``refs/NAME`` holds the commit that
    ``snapshots/COMMIT`` is called after). It need not exist."""
    if model.startswith("/"):
        return Path(model)
    if hf_home is None:
        return None
    repository = hf_home / "hub" / f"models--{model.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = (repository / "refs" / wanted).read_text().strip()
    except (OSError, ValueError):
        commit = wanted
    return repository / "snapshots" / commit


def _heads(config: dict[str, Any], depth: int = 0) -> int | None:
    for name in _HEADS:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    for name in _INNER:
        inner = config.get(name)
        if isinstance(inner, dict) and depth < 3:
            found = _heads(inner, depth + 1)
            if found is not None:
                return found
    return None
