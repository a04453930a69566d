"""What of a model lies on this machine, and removing it. Blocking; run in threads.

Invariants: nothing outside of the hub's cache folder is ever removed, and a model's own path never. What is removed was
not needed by a launch when it was asked.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_bootstrap.models.choosing import INDEXES, is_complete
from vllm_bootstrap.models.hubcache import MAIN, RepoCache, is_repo, size_of
from vllm_bootstrap.models.residency import cached_bytes
from vllm_bootstrap.models.types import DiskFile, OnDisk

MAX_INDEX_BYTES = 64 * 1024**2
MAX_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Found:
    """Where a model's files are. ``paths``: by their name in the model."""

    folder: Path | None
    commit: str | None
    paths: Mapping[str, Path]
    incomplete_bytes: int = 0


def find(hub: Path, source: str, revision: str | None, pinned: str | None = None) -> Found:
    """The files of a repository in the cache, or of a folder. ``pinned``: the commit that was downloaded, which counts
    where the revision is a branch."""
    if source.startswith("/"):
        return _folder(Path(source))
    if not is_repo(source):
        return Found(None, None, {})
    cache = RepoCache(hub, source)
    commit = (cache.commit_of(pinned) if pinned else None) or cache.commit_of(revision or MAIN)
    paths = cache.files(commit) if commit is not None else {}
    folder = cache.snapshots / commit if commit is not None else None
    return Found(folder, commit, paths, cache.incomplete_bytes())


def look(source: str, found: Found, wanted: Mapping[str, int] | None, *, residency: bool) -> OnDisk:
    """What was found, with sizes. ``wanted``: bytes of each file of the commit, where the hub once said so.
    ``residency``: also how much of it is in the page cache."""
    files = [
        DiskFile(name, size_of(path), cached_bytes(path) if residency else None) for name, path in found.paths.items()
    ]
    cached = [file.cached_bytes for file in files]
    known = [part for part in cached if part is not None]
    return OnDisk(
        source=source,
        path=str(found.folder) if found.folder is not None else None,
        commit=found.commit,
        bytes=sum(file.bytes for file in files),
        complete=_complete(found, {file.path: file.bytes for file in files}, wanted),
        files=tuple(files),
        incomplete_bytes=found.incomplete_bytes,
        cached_bytes=sum(known) if known and len(known) == len(cached) else None,
    )


def _complete(found: Found, sizes: Mapping[str, int], wanted: Mapping[str, int] | None) -> bool | None:
    if wanted is not None:
        return all(sizes.get(path) == size for path, size in wanted.items())
    indexed = {}
    for name in INDEXES:
        path = found.paths.get(name)
        parts = _parts(path) if path is not None else None
        if parts is not None:
            indexed[name] = parts
    return is_complete(sizes, indexed)


def _parts(index: Path) -> set[str] | None:
    """The files that an index names, None for what is no index."""
    try:
        with index.open("rb") as file:
            table = json.loads(file.read(MAX_INDEX_BYTES))["weight_map"]
        return {str(part) for part in table.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _folder(root: Path) -> Found:
    """A folder of the operator's: links in it are followed, the order is that of names."""
    if root.is_file():
        return Found(root, None, {root.name: root})
    if not root.is_dir():
        return Found(None, None, {})
    paths: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            with contextlib.suppress(OSError):
                if not name.startswith(".") and path.is_file() and len(paths) < MAX_FILES:
                    paths[path.relative_to(root).as_posix()] = path
    return Found(root, None, paths)
