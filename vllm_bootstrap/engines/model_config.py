"""What a model's ``config.json`` says, when it is at hand locally: a model's folder or the Hugging Face cache.

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


def read_config(model: str, hf_home: Path | None, revision: str | None = None) -> dict[str, Any] | None:
    """The model's ``config.json`` as it lies on this machine, None where it does not or cannot be read."""
    folder = Path(model) if model.startswith("/") else _snapshot(model, hf_home, revision)
    if folder is None:
        return None
    path = folder / "config.json"
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _snapshot(model: str, hf_home: Path | None, revision: str | None) -> Path | None:
    """The folder of a cached revision: ``refs/NAME`` holds the commit that ``snapshots/COMMIT`` is called after."""
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
