"""The layout of a Hugging Face cache folder, read and written. Blocking file-system calls, no network.

``models--ORG--NAME/{blobs,snapshots/COMMIT,refs}`` is huggingface_hub's documented layout: a blob is a file's content
under its checksum, a snapshot has links to blobs under the files' names, a ref holds the commit of a branch.

Invariants: a snapshot's link leads to a whole file only; a ref is written after all its files are there, so that who
reads the cache without network never finds half a model under a branch's name. No path outside of the folder is made
or removed, whatever a repository calls its files.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

INCOMPLETE = ".incomplete"
MAIN = "main"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,95})"
_REPO = re.compile(rf"{_PART}(?:/{_PART})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_repo(source: str) -> bool:
    """Whether ``source`` has the form of a repository's id (``ORG/NAME``, or ``NAME`` alone)."""
    return _REPO.fullmatch(source) is not None and "--" not in source and ".." not in source


def is_revision(text: str) -> bool:
    """Whether ``text`` may name a branch, a tag or a commit."""
    return _REVISION.fullmatch(text) is not None and ".." not in text and "//" not in text


def is_commit(text: str) -> bool:
    return _COMMIT.fullmatch(text) is not None


def hub_folder(hf_home: Path, env: Mapping[str, str]) -> Path:
    """Where repositories are cached, as huggingface_hub finds it."""
    named = env.get("HF_HUB_CACHE")
    return Path(named) if named else hf_home / "hub"


class RepoCache:
    """The cached part of one repository. Nothing is made before something is written. ``source`` must be ``is_repo``;
    raises ``ValueError`` else."""

    def __init__(self, hub: Path, source: str) -> None:
        if not is_repo(source):
            raise ValueError(f"{source!r} is not the id of a repository")
        name = f"models--{source.replace('/', '--')}"
        self.path, self.locks = hub / name, hub / ".locks" / name
        self.blobs, self.snapshots, self.refs = (self.path / part for part in ("blobs", "snapshots", "refs"))

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit means here, None when it is not cached."""
        if is_commit(revision):
            return revision if (self.snapshots / revision).is_dir() else None
        if not is_revision(revision):
            return None
        try:
            commit = (self.refs / revision).read_text().strip()
        except (OSError, ValueError):
            return None
        return commit if is_commit(commit) and (self.snapshots / commit).is_dir() else None

    def write_ref(self, revision: str, commit: str) -> None:
        """Let a branch or tag mean ``commit``. A revision that is a commit has no ref."""
        if revision == commit or not is_revision(revision):
            return
        path = self.refs / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{secrets.token_hex(4)}.tmp")
        part.write_text(commit)
        part.replace(path)

    def blob(self, name: str) -> Path:
        """Raises ``ValueError`` for what cannot be the name of a blob."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}", name):
            raise ValueError(f"{name!r} cannot name a blob")
        return self.blobs / name

    def pointer(self, commit: str, path: str) -> Path:
        """Where the file ``path`` of a snapshot is. Raises ``ValueError`` for a path that leads out of it."""
        parts = path.split("/")
        if not is_commit(commit) or "\0" in path or any(part in {"", ".", ".."} for part in parts):
            raise ValueError(f"{path!r} of {commit!r} is no path in a repository")
        return self.snapshots.joinpath(commit, *parts)

    def point(self, commit: str, path: str, blob: Path) -> None:
        """Give a whole blob its name in a snapshot: a relative link, or where links cannot be made the file itself."""
        pointer = self.pointer(commit, path)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        part = pointer.with_name(f".{secrets.token_hex(4)}.tmp")
        try:
            part.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:
            blob.replace(pointer)
        else:
            part.replace(pointer)

    def files(self, commit: str) -> dict[str, Path]:
        """Files of a snapshot by their path in it, whole ones only. Links that lead nowhere or out of the repository's
        folder are left out."""
        root = self.snapshots / commit
        home = self.path.resolve()
        found = {}
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(OSError):
                    real = path.resolve(strict=True)
                    if real.is_file() and real.is_relative_to(home):
                        found[path.relative_to(root).as_posix()] = real
        return dict(sorted(found.items()))

    def incomplete_bytes(self) -> int:
        """Bytes of files that are not whole yet."""
        return sum(size_of(path) for path in self.unfinished())

    def unfinished(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.blobs) as entries:
            for entry in entries:
                if entry.name.endswith(INCOMPLETE) and entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)

    def remove(self, commit: str | None) -> int:
        """Remove one snapshot with what only it uses, or (None) all of the repository. Returns how many bytes went.

        In an order that leaves a cache that is as good as before, less what was removed, wherever it is interrupted.
        """
        if self.path.is_symlink() or not self.path.is_dir():
            return 0
        before = self._bytes()
        if commit is None or set(self._commits()) <= {commit}:
            gone = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.deleted")
            self.path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            shutil.rmtree(self.locks, ignore_errors=True)
            return before
        if is_commit(commit):
            self._remove_snapshot(commit)
        return before - self._bytes()

    def _remove_snapshot(self, commit: str) -> None:
        for ref in [path for path in self.refs.rglob("*") if path.is_file()]:
            if ref.read_text().strip() == commit:
                ref.unlink()
        mine = set(self.files(commit).values())
        shutil.rmtree(self.snapshots / commit, ignore_errors=True)
        others = {real for other in self._commits() for real in self.files(other).values()}
        home = self.blobs.resolve()
        names = [real.name for real in mine - others if real.parent == home]
        if names:  # through the folder itself, so that no other one is meant when it is exchanged meanwhile
            fd = os.open(self.blobs, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                for name in names:
                    os.unlink(name, dir_fd=fd)
            finally:
                os.close(fd)

    def _commits(self) -> list[str]:
        try:
            return [path.name for path in self.snapshots.iterdir() if is_commit(path.name)]
        except FileNotFoundError:
            return []

    def _bytes(self) -> int:
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(OSError):
                    total += Path(folder, name).lstat().st_size
        return total


def size_of(path: Path) -> int:
    """Bytes of a file, 0 when it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def is_whole(path: Path, size: int) -> bool:
    """Whether a file is there with as many bytes as it should have: after a power cut some are empty."""
    return path.is_file() and size_of(path) == size


def sweep_deleted(hub: Path) -> int:
    """Finish removals that were interrupted. Returns how many there were."""
    found = list(hub.glob(".models--*.deleted"))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return len(found)
