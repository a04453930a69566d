"""Downloads of repositories: one at a time (or as many as are allowed), each in a helper process, over every cut.

Invariants: two requests for the same revision of a repository are one download. The commit is settled once, before the
first byte, and what comes is of that commit, also after restarts. A download that has not ended has a row and is gone
on with at the next start. Its state is on disk before anybody is told of an end. Nothing here blocks the loop.

Must not know: HTTP, the catalogue, how the cache folder is laid out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_bootstrap import ids
from vllm_bootstrap.errors import ApiError, NotFound, StorageFull
from vllm_bootstrap.models import helper
from vllm_bootstrap.models.download_rows import DownloadRows, Row
from vllm_bootstrap.models.troubles import ATTEMPTS_WITHOUT_PROGRESS, Rate, Trouble, backoff_s, trouble
from vllm_bootstrap.models.types import DownloadView

log = logging.getLogger(__name__)

PROGRAM = "vllm_bootstrap.models.fetching"
DOWNLOAD_PREFIX = "download_"
PLAN_TIMEOUT_S = 60.0
ANSWER_WITHIN_S = 10.0
"""So long somebody who asks for a download waits to hear that it cannot be; later it is told in its state."""

TELL_EVERY_S = 0.5
_UNFINISHED = frozenset({"queued", "running"})

Downloaded = Callable[[str, str, str], None]
"""Called with repository, revision and commit."""


@dataclass(frozen=True, slots=True)
class DownloadConfig:
    """``env``: what helpers inherit, with the token. ``hub``: the cache folder. ``at_once``: so many fetch at a time.
    ``reserve_bytes`` stay free on the disk. ``uid``, ``gid``: who owns the files, None: the daemon's user."""

    hub: Path
    env: Mapping[str, str]
    at_once: int = 1
    reserve_bytes: int = 0
    uid: int | None = None
    gid: int | None = None
    node_id: str = "local"


class _Job:
    """One download while it is known here. ``row`` is what is stored, ``view`` what readers see."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.rate = Rate()
        self.missing = row.bytes_total - row.bytes_done
        self.settled = asyncio.Event()
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self.lacks_room: StorageFull | None = None

    @property
    def under_way(self) -> bool:
        return self.row.state in _UNFINISHED

    def tell(self) -> None:
        """Let those who watch look again."""
        if not self.under_way:
            self.settled.set()
        told, self.changed = self.changed, asyncio.Event()
        told.set()

    def view(self) -> DownloadView:
        row = self.row
        total = row.bytes_total if row.commit is not None else None
        running = row.state == "running"
        return DownloadView(
            id=row.id,
            model=row.model,
            repo=row.repo,
            revision=row.revision,
            owner=row.owner,
            state=row.state,
            commit=row.commit,
            bytes_total=total,
            bytes_done=row.bytes_done,
            files_total=len(row.files) if row.commit is not None else None,
            files_done=row.files_done,
            rate=self.rate.per_second() if running else None,
            eta_s=self.rate.eta_s(total - row.bytes_done) if running and total is not None else None,
            error=row.error,
            hint=row.hint,
            created_at=row.created_at,
            ended_at=row.ended_at,
        )


@dataclass(slots=True)
class _Attempt:
    """What one run of the helper came to."""

    said: dict[str, Any] = field(default_factory=dict)
    trouble: Trouble | None = None


class Downloads:
    """All downloads of this daemon. ``start`` first, ``close`` at the end: what is under way then is gone on with at
    the next start."""

    def __init__(
        self,
        config: DownloadConfig,
        rows: DownloadRows,
        *,
        on_done: Downloaded = lambda *_: None,
        on_bytes: Callable[[int], None] = lambda _count: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._rows, self._on_done, self._clock = config, rows, on_done, clock
        self._on_bytes = on_bytes
        self._jobs: dict[str, _Job] = {}
        self._slots = asyncio.Semaphore(config.at_once)
        self._asking = asyncio.Lock()

    async def start(self) -> None:
        """Take up what an earlier run of the daemon did not finish, and know again what it did."""
        for row in await self._rows.all():
            job = self._jobs[row.id] = _Job(row)
            if job.under_way:
                job.row = replace(row, state="queued", error=None, hint=None)
                self._begin(job)
            elif row.state == "completed" and row.commit is not None:
                self._on_done(row.repo, row.revision, row.commit)

    async def close(self) -> None:
        """Kill the helpers. Idempotent."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def download(
        self, model: str, repo: str, revision: str, owner: str, *, load_format: str | None = None
    ) -> DownloadView:
        """Fetch a revision of a repository, or join who fetches it already. Returns as soon as it is settled what is
        to be fetched, at the latest after ten seconds.

        Raises ``StorageFull`` when the disk has no room for it.
        """
        async with self._asking:
            job = self.current(repo, revision)
            if job is None:
                now = self._clock()
                number = ids.new_id(DOWNLOAD_PREFIX, int(now * 1000), os.urandom(ids.RANDOM_BYTES))
                row = Row(number, owner, model, repo, revision, load_format, created_at=now)
                for gone in await self._rows.insert(row, self._config.node_id):
                    self._jobs.pop(gone, None)
                job = self._jobs[number] = _Job(row)
                self._begin(job)
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await job.settled.wait()
        if job.lacks_room is not None:
            raise StorageFull(job.lacks_room.message, should_retry=False, details=job.lacks_room.details)
        return job.view()

    def current(self, repo: str, revision: str | None = None) -> _Job | None:
        """The download of a repository that is under way, of any revision where none is given."""
        for job in self._jobs.values():
            if job.under_way and job.row.repo == repo and revision in {None, job.row.revision}:
                return job
        return None

    def wanted(self, repo: str, commit: str) -> dict[str, int] | None:
        """Bytes of each file that an engine needs of a commit, None where that was never asked for here."""
        for job in self._jobs.values():
            if job.row.repo == repo and job.row.commit == commit and job.row.files:
                return {path: size for path, size, _ in job.row.files}
        return None

    def all(self) -> list[DownloadView]:
        """The newest first."""
        return [job.view() for job in sorted(self._jobs.values(), key=lambda job: job.row.id, reverse=True)]

    def get(self, download_id: str) -> DownloadView:
        """Raises ``NotFound``."""
        return self._job(download_id).view()

    async def cancel(self, download_id: str) -> DownloadView:
        """Stop a download; what has arrived stays, and another download goes on with it. One that has ended stays as
        it is. Raises ``NotFound``."""
        job = self._job(download_id)
        if job.under_way and job.task is not None:
            job.cancelled = True
            job.task.cancel()
            await asyncio.wait({job.task})
        return job.view()

    async def watch(self, download_id: str) -> AsyncGenerator[DownloadView, None]:
        """How it is now, then each change, at most twice a second; ends with the download, and when the daemon ends.
        Raises ``NotFound``."""
        job = self._job(download_id)
        while True:
            changed = job.changed
            yield job.view()
            if not job.under_way or job.task is None or job.task.done():
                return
            await changed.wait()
            if job.under_way and not job.task.done():
                await asyncio.sleep(TELL_EVERY_S)  # what changes meanwhile is told as one

    async def forget(self, repo: str, commit: str | None) -> None:
        """What was downloaded is deleted: it does not count as there any more."""
        for gone in await self._rows.forget(repo, commit):
            self._jobs.pop(gone, None)

    # -- one download -------------------------------------------------------------------------------------------

    def _job(self, download_id: str) -> _Job:
        job = self._jobs.get(download_id)
        if job is None:
            raise NotFound(f"There is no download {download_id!r}.", param="id")
        return job

    def _begin(self, job: _Job) -> None:
        job.task = asyncio.create_task(self._run(job), name=f"download {job.row.repo}")
        job.task.add_done_callback(lambda _: job.tell())  # the daemon ends: nobody waits for more

    async def _run(self, job: _Job) -> None:
        try:
            found = await self._to_its_end(job)
            if found is None:
                await self._keep(job, state="completed", error=None, hint=None)
                self._on_done(job.row.repo, job.row.revision, job.row.commit or "")
            else:
                await self._keep(job, state="failed", error=found.message, hint=found.hint)
        except ApiError as exc:  # the database: the row stays as it is, and is taken up at the next start
            log.warning("Download of %s stops: %s", job.row.repo, exc.message)
            job.row = replace(job.row, state="failed", error=exc.message, ended_at=self._clock())
            job.tell()

    async def _to_its_end(self, job: _Job) -> Trouble | None:
        """As ``_over_cuts``, and somebody may cancel it."""
        try:
            return await self._over_cuts(job)
        except asyncio.CancelledError:
            if not job.cancelled:
                raise  # the daemon ends: the row says that there is more to do
            await self._keep(job, state="cancelled", error=None, hint=None)
            raise

    async def _over_cuts(self, job: _Job) -> Trouble | None:
        """Until all is there (None), or it is settled that it will not be."""
        failures = 0
        while True:
            before = job.row.bytes_done
            found = await self._attempt(job)
            if found is None or found.permanent:
                return found
            failures = 1 if job.row.bytes_done > before else failures + 1
            if failures >= ATTEMPTS_WITHOUT_PROGRESS:
                return found
            log.info("Download of %s: %s Next attempt follows.", job.row.repo, found.message)
            job.row = replace(job.row, error=found.message, hint=found.hint)
            job.tell()
            await asyncio.sleep(backoff_s(failures, random.random()))  # noqa: S311 - spreads load, guards nothing

    async def _attempt(self, job: _Job) -> Trouble | None:
        if job.row.commit is None and (found := await self._plan(job)) is not None:
            return found
        job.settled.set()
        async with self._slots:
            if job.row.state != "running":
                await self._keep(job, state="running")
            return (await self._help(job, "fetch")).trouble

    async def _plan(self, job: _Job) -> Trouble | None:
        try:
            async with asyncio.timeout(PLAN_TIMEOUT_S):
                attempt = await self._help(job, "plan")
        except TimeoutError:
            return trouble("connection", f"It said nothing for {PLAN_TIMEOUT_S:.0f} seconds.")
        if attempt.trouble is not None:
            return attempt.trouble
        said = attempt.said
        job.missing = said["missing"]
        if (lack := self._lack_of_room(job, said["free"])) is not None:
            return lack
        files = tuple((path, size, blob) for path, size, blob in said["files"])
        here = sum(size for _, size, _ in files) - job.missing
        await self._keep(job, commit=said["commit"], files=files, bytes_done=here)
        return None

    def _lack_of_room(self, job: _Job, free: int) -> Trouble | None:
        """What others still have to fetch is promised to them."""
        promised = sum(other.missing for other in self._jobs.values() if other is not job and other.under_way)
        room = free - promised - self._config.reserve_bytes
        if job.missing <= room:
            return None
        details = {
            "needed_bytes": job.missing,
            "free_bytes": free,
            "promised_bytes": promised,
            "reserve_bytes": self._config.reserve_bytes,
        }
        numbers = (
            f"{job.missing} bytes are to be fetched, {free} are free, {promised} of them promised to other downloads "
            f"and {self._config.reserve_bytes} kept in reserve (VLLM_BOOTSTRAP_DISK_RESERVE_BYTES)."
        )
        found = trouble("full", numbers)
        job.lacks_room = StorageFull(f"{found.message} {found.hint}", details=details)
        return found

    async def _help(self, job: _Job, mode: str) -> _Attempt:
        """Run the helper once."""
        config, row = self._config, job.row
        task = {
            "mode": mode,
            "repo": row.repo,
            "revision": row.revision,
            "hub": str(config.hub),
            "commit": row.commit,
            "files": row.files,
            "load_format": row.load_format,
            "reserve_bytes": config.reserve_bytes,
            "uid": config.uid,
            "gid": config.gid,
            "parent": os.getpid(),
        }
        try:
            ended = await helper.run(PROGRAM, task, config.env, lambda said: self._said(job, said))
        except OSError as exc:
            return _Attempt(trouble=trouble("died", f"It could not be started: {exc}"))
        said = ended.said
        if "trouble" in said:
            return _Attempt(said, trouble(str(said["trouble"]), str(said.get("detail", ""))))
        if ended.complaint is not None or not ("done" in said or "commit" in said):
            log.warning("The helper that downloads %s ended: %s", row.repo, ended.complaint)
            return _Attempt(said, trouble("died", f"({ended.complaint})"))
        return _Attempt(said)

    def _said(self, job: _Job, said: dict[str, Any]) -> None:
        if "bytes" in said:
            job.rate.saw(time.monotonic(), said["bytes"])
            moved = said["bytes"] > job.row.bytes_done
            if moved:
                self._on_bytes(said["bytes"] - job.row.bytes_done)
            job.missing = max(0, job.row.bytes_total - said["bytes"])
            job.row = replace(
                job.row,
                bytes_done=said["bytes"],
                files_done=said["files"],
                error=None if moved else job.row.error,
                hint=None if moved else job.row.hint,
            )
            job.tell()

    async def _keep(self, job: _Job, **changes: Any) -> None:
        """Store a change, then tell it."""
        row = replace(job.row, **changes)
        if row.state not in _UNFINISHED:
            row = replace(row, ended_at=self._clock())
        await self._rows.update(row)
        job.row = row
        job.tell()
