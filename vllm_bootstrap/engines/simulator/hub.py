"""A pretended download into the Hugging Face cache, laid out as the real one: blobs that grow, then a snapshot.

It touches a cache only when the environment names one: a simulation must not write into a user's real cache.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

STEPS_PER_SECOND = 20


def cache_dir(env: Mapping[str, str]) -> Path | None:
    """The hub cache the environment names, or None."""
    if env.get("HF_HUB_CACHE"):
        return Path(env["HF_HUB_CACHE"])
    return Path(env["HF_HOME"]) / "hub" if env.get("HF_HOME") else None


def download(model: str, cache: Path, *, size: int, seconds: float) -> bool:
    """Let ``size`` bytes arrive within ``seconds``. Blocks. False when the model was there already."""
    repo = cache / f"models--{model.strip('/').replace('/', '--')}"
    commit = hashlib.sha1(model.encode(), usedforsecurity=False).hexdigest()
    blob = repo / "blobs" / hashlib.sha256(model.encode()).hexdigest()
    if blob.exists():
        return False
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.incomplete")
    steps = max(1, round(seconds * STEPS_PER_SECOND))
    with partial.open("wb", buffering=0) as file:
        for step in range(1, steps + 1):
            file.write(b"\0" * (size * step // steps - file.tell()))
            time.sleep(seconds / steps)
    partial.rename(blob)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / blob.name)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    return True
