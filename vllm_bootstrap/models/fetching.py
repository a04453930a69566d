"""A program of its own: brings the files of one repository into the Hugging Face cache.

``python -m vllm_bootstrap.models.fetching`` reads a ``Task`` as one JSON object from standard input, tells how far it
is in JSON lines on standard output, and says with the last of them how it ended. It runs beside the daemon with low
priority, may be killed at any moment, and dies with the daemon. Token, endpoint and proxies are in its environment.

Invariants: what has arrived is on disk as soon as it has arrived, under ``BLOB.incomplete``, and the next run goes on
behind it. A file gets its name only when its checksum is right and it is synced. Only one process writes a file: the
lock is huggingface_hub's own, so that an engine that downloads the same model waits.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from vllm_bootstrap.launches.shim import syscalls
from vllm_bootstrap.models.choosing import NothingToLoad, RepoFile, choose
from vllm_bootstrap.models.hub import ONLY_IN_CHUNKS_BYTES, Hub, HubTrouble
from vllm_bootstrap.models.hubcache import INCOMPLETE, RepoCache, is_whole, size_of
from vllm_bootstrap.models.space import free_bytes, is_lack_of_room
from vllm_bootstrap.models.transfer import Stopped, Transfer, locked

NICENESS = 10
TELL_EVERY_S = 0.5
WORKERS = 4
READ_TIMEOUT_S = 30.0
"""So long nothing may arrive before a connection counts as cut. HF_HUB_DOWNLOAD_TIMEOUT is obeyed as well."""


@dataclass(frozen=True, slots=True)
class Task:
    """``plan``: find out what is to be fetched; ``fetch``: do it. ``hub``: the cache folder. ``commit`` None: whatever
    ``revision`` is at now. ``reserve_bytes`` stay free on the disk. ``uid``, ``gid``: become this user first, who shall
    own the files. ``parent``: the process to die with."""

    mode: Literal["plan", "fetch"]
    repo: str
    revision: str
    hub: str
    commit: str | None = None
    files: list[tuple[str, int, str | None]] = field(default_factory=list)
    load_format: str | None = None
    reserve_bytes: int = 0
    uid: int | None = None
    gid: int | None = None
    parent: int | None = None


Tell = Callable[[dict[str, Any]], None]


def plan(task: Task, tell: Tell) -> None:
    """Say which commit and which files, how many bytes are still missing, and how many are free."""
    hub, cache = Hub(task.repo), RepoCache(Path(task.hub), task.repo)
    commit = task.commit or hub.commit_of(task.revision)
    try:
        files = choose(hub.files(commit), task.load_format)
    except NothingToLoad as exc:
        raise HubTrouble("no_weights", str(exc)) from exc
    missing = sum(_missing(cache, commit, file) for file in files)
    tell({"commit": commit, "files": files, "missing": missing, "free": free_bytes(Path(task.hub))})


def _missing(cache: RepoCache, commit: str, file: RepoFile) -> int:
    """Bytes of a file that are still to come."""
    if is_whole(cache.pointer(commit, file.path), file.size):
        return 0
    if file.blob is None:
        return file.size
    blob = cache.blob(file.blob)
    return 0 if is_whole(blob, file.size) else max(0, file.size - size_of(blob.with_name(blob.name + INCOMPLETE)))


class Fetching:
    """One run that fetches."""

    def __init__(self, task: Task, commit: str, tell: Tell) -> None:
        self._task, self._tell, self._commit = task, tell, commit
        self._files = [RepoFile(*file) for file in task.files]
        self._hub, self._cache = Hub(task.repo), RepoCache(Path(task.hub), task.repo)
        self._arrived = {file.path: file.size - _missing(self._cache, commit, file) for file in self._files}
        self._whole: set[str] = set()
        self._stop = threading.Event()
        timeout = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or READ_TIMEOUT_S)
        self._client = httpx.Client(timeout=timeout, follow_redirects=True)

    def run(self) -> None:
        """Raises ``HubTrouble`` and ``OSError``; then what has arrived is there for the next run."""
        largest_first = sorted(self._files, key=lambda file: -file.size)
        with self._client, ThreadPoolExecutor(WORKERS) as pool:
            work = [pool.submit(self._one, file) for file in largest_first]
            missing = set(work)
            while missing:
                done, missing = wait(missing, TELL_EVERY_S, FIRST_EXCEPTION)
                self._say()
                if any(future.exception() for future in done):
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
                    break
        for future in work:
            if not future.cancelled() and (exc := future.exception()) and not isinstance(exc, Stopped):
                raise exc
        self._cache.write_ref(self._task.revision, self._commit)
        self._say()

    def _say(self) -> None:
        self._tell({"bytes": sum(self._arrived.values()), "files": len(self._whole)})

    def _one(self, file: RepoFile) -> None:
        pointer = self._cache.pointer(self._commit, file.path)
        if not is_whole(pointer, file.size):
            self._bring(file)
        self._arrived[file.path] = pointer.stat().st_size
        self._whole.add(file.path)

    def _bring(self, file: RepoFile) -> None:
        origin = self._hub.origin(self._commit, file)
        if origin.size > ONLY_IN_CHUNKS_BYTES:
            self._hub.fetch_whole(self._commit, file, Path(self._task.hub))
            return
        blob = self._cache.blob(origin.blob)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._cache.locks / f"{origin.blob}.lock", self._stop):
            if not is_whole(blob, origin.size):
                part = blob.with_name(blob.name + INCOMPLETE)
                arrived = _Counter(self._arrived, file.path)
                Transfer(self._client, origin, part, self._stop, arrived, self._task.reserve_bytes).run()
                part.replace(blob)
            self._cache.point(self._commit, file.path, blob)


class _Counter:
    """Tells how much of one file there is."""

    def __init__(self, counts: dict[str, int], path: str) -> None:
        self._counts, self._path = counts, path

    def __call__(self, arrived: int) -> None:
        self._counts[self._path] = arrived


def _print(said: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def _settle_in(task: Task) -> bool:
    """Become who it is done as, and modest. False: the daemon has gone already. Raises ``HubTrouble`` when that user
    cannot even read this program."""
    if task.uid is not None and task.gid is not None:
        os.setgroups([])
        os.setgid(task.gid)
        os.setuid(task.uid)
        if not os.access(os.__file__, os.R_OK) or not os.access(__file__, os.R_OK):
            raise HubTrouble("user", f"({Path(os.__file__).parent})")
    if task.parent is not None:  # after the change of user, which the kernel takes as a reason to forget it
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != task.parent:
            return False
    os.nice(NICENESS)
    return True


def work(task: Task, tell: Tell) -> int:
    """Returns 0 when how it ended was told, whatever it is."""
    try:
        if not _settle_in(task):
            return 1
        if task.mode == "plan" or task.commit is None:
            plan(task, tell)
        else:
            Fetching(task, task.commit, tell).run()
            tell({"done": True})
    except HubTrouble as exc:
        tell({"trouble": exc.name, "detail": exc.detail})
    except OSError as exc:
        tell({"trouble": "full" if is_lack_of_room(exc) else "disk", "detail": str(exc)})
    return 0


def main() -> int:
    return work(Task(**json.load(sys.stdin)), _print)


if __name__ == "__main__":
    sys.exit(main())
