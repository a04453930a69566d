"""How many bytes of a model lie in the Hugging Face cache right now. Blocking file-system reads, nothing else.

vLLM shows no download bar, so the cache is measured instead: finished blobs plus ``*.incomplete`` ones. The layout
(``hub/models--ORG--NAME/blobs``) is huggingface_hub's documented cache layout.
"""

from __future__ import annotations

import os
from pathlib import Path


def blobs_dir(model: str, hf_home: Path) -> Path | None:
    """The cache folder of a repository id, or None when ``model`` is a local path."""
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        return None
    return hf_home / "hub" / f"models--{model.replace('/', '--')}" / "blobs"


def cached_bytes(blobs: Path) -> int | None:
    """Bytes in the folder; None while it does not exist. Sparse files count by what is allocated on disk."""
    try:
        entries = list(os.scandir(blobs))
    except OSError:
        return None
    total = 0
    for entry in entries:
        try:
            stat = entry.stat()
        except OSError:
            continue  # renamed from *.incomplete to its final name between listing and stat
        total += min(stat.st_size, stat.st_blocks * 512)
    return total
