"""The lines of one batch that go to one lane, read ahead a little.

Invariant: of the lines that have no record, each is given out at most once until it is returned; memory holds at most
``READ_LINES`` lines and ``READ_BYTES`` of them beyond those given out, whatever the size of the batch. Must not know:
engines, why a line ends as it does, states of batches.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_bootstrap.batches.types import Line
from vllm_bootstrap.batches.work import Ending, Job
from vllm_bootstrap.errors import ApiError

log = logging.getLogger(__name__)

READ_LINES, READ_BYTES = 512, 8 * 1024**2
READ_AGAIN_BELOW = 128
AGAIN_S = 1.0


class LinesBehind(Protocol):
    """Where lines are read from."""

    async def next(
        self, model_no: int, after_pos: int, most: int, max_bytes: int
    ) -> tuple[Sequence[Line], int | None]: ...


class Owner(Protocol):
    """The batch whose lines these are."""

    @property
    def may_take(self) -> bool:
        """Whether more may be begun: not while too many records wait for the disk."""

    def line_ended(self, job: Job, custom_id: str, ending: Ending) -> None: ...

    def line_noted(self, job: Job) -> None: ...


class LineSource:
    """A ``work.Source``. ``ready`` is called when there is something to take after there was nothing; ``problem`` says
    why lines cannot be read, when they cannot."""

    def __init__(
        self,
        batch_id: str,
        model_no: int,
        path: str,
        lines: LinesBehind,
        owner: Owner,
        *,
        key_name: str,
        priority: int,
        deadline: float,
        left: int,
    ) -> None:
        self.id = f"{batch_id}.{model_no}"
        self.owner, self.priority, self.deadline = key_name, priority, deadline
        self.ready: Callable[[], None] = lambda: None
        self.problem: str | None = None
        self._model_no, self._path, self._lines, self._batch = model_no, path, lines, owner
        self.left = left
        self._returned: deque[Job] = deque()
        self._ahead: deque[Job] = deque()
        self._custom_ids: dict[int, str] = {}
        self._after: int | None = 0
        self._reading: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        """Whether all its lines have ended."""
        return self._after is None and not self._custom_ids

    def start(self) -> None:
        """Begin to read ahead."""
        self._read_more()

    def take(self) -> Job | None:
        if not self._batch.may_take:
            return None
        if self._returned:
            return self._returned.popleft()
        job = self._ahead.popleft() if self._ahead else None
        if len(self._ahead) < READ_AGAIN_BELOW:
            self._read_more()
        return job

    def ended(self, job: Job, ending: Ending) -> None:
        self.left -= 1
        self._batch.line_ended(job, self._custom_ids.pop(job.number), ending)

    def returned(self, job: Job) -> None:
        self._returned.append(job)
        self.ready()

    def noted(self, job: Job) -> None:
        self._batch.line_noted(job)

    def close(self) -> None:
        """Read no more. Idempotent."""
        self._after = None
        if self._reading is not None:
            self._reading.cancel()

    def _read_more(self) -> None:
        if self._after is not None and self._reading is None:
            self._reading = asyncio.create_task(self._read(self._after), name=f"read lines of {self.id}")

    async def _read(self, after: int) -> None:
        try:
            while True:
                try:
                    found, following = await self._lines.next(self._model_no, after, READ_LINES, READ_BYTES)
                    break
                except Exception as error:
                    why = error.message if isinstance(error, ApiError) else repr(error)
                    said = f"its lines cannot be read: {why}"
                    if said != self.problem:
                        log.exception("Batch lines of %s cannot be read", self.id)
                    self.problem = said
                    await asyncio.sleep(AGAIN_S)
        finally:
            self._reading = None
        self._after, self.problem = following, None
        for line in found:
            self._custom_ids[line.number] = line.custom_id
            self._ahead.append(Job(self, line.number, self._path, line.body, line.attempts, line.deaths))
        if found:
            self.ready()
        elif following is not None:
            self._read_more()
