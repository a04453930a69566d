"""A batch in progress: its lines given to lanes, their records to the disk.

Invariant: a line leaves by a record only, and the record goes through one ``Recorder``; after ``stop`` nothing of the
batch is under way, after ``drain`` everything that is known is on disk. Must not know: states of batches.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_bootstrap.batches import outcomes, output
from vllm_bootstrap.batches.line_source import LineSource
from vllm_bootstrap.batches.linestore import LineStore, Totals
from vllm_bootstrap.batches.records import Recorder
from vllm_bootstrap.batches.run_deps import RunDeps
from vllm_bootstrap.batches.types import BatchRow, Record
from vllm_bootstrap.batches.work import Answered, Ending, Job
from vllm_bootstrap.errors import StorageFailed

GATHER_S = 0.02


class Working:
    """``written(totals)`` is called after each write, ``failed()`` when no more can be written."""

    def __init__(self, row: BatchRow, deps: RunDeps, lines: LineStore, written: Callable[[Totals], None]) -> None:
        self._row, self._deps, self._lines = row, deps, lines
        self._paused, self._priority = row.paused, row.priority
        self._recorder = Recorder(lines, clock=deps.clock, written=written, freed=self._freed, gather_s=GATHER_S)
        self._sources: dict[str, LineSource] = {}

    async def start(self) -> None:
        """Begin with all lines that have no record."""
        row, lanes = self._row, self._deps.lanes
        models = await self._lines.models()
        left = (await self._lines.totals()).counts.left
        for model_no, model, lines in models:
            source = LineSource(
                row.id,
                model_no,
                row.endpoint,
                self._lines,
                self,
                key_name=row.owner,
                priority=self._priority,
                deadline=row.expires_at,
                left=min(lines, left),
            )
            self._sources[source.id] = source
            source.ready = lanes.add(source, model, row.launch_id)
            if self._paused:
                lanes.pause(source.id)
            source.start()

    def stop(self) -> None:
        """Begin nothing more, end what is under way. Idempotent."""
        for source_id, source in self._sources.items():
            self._deps.lanes.withdraw(source_id)
            source.close()
        self._sources = {}

    async def drain(self) -> None:
        """Return when all records there are are on disk. Raises ``StorageFailed``."""
        await self._recorder.drain()

    async def close(self) -> None:
        """Stop, without waiting for the disk. Idempotent."""
        self.stop()
        await self._recorder.close()

    # Steering

    def pause(self, paused: bool) -> None:
        self._paused = paused
        lanes = self._deps.lanes
        for source_id in self._sources:
            if paused:
                lanes.pause(source_id)
            else:
                lanes.resume(source_id)

    def change(self, priority: int) -> None:
        self._priority = priority
        for source_id in self._sources:
            self._deps.lanes.change(source_id, priority)

    # Looking

    @property
    def failed(self) -> StorageFailed | None:
        return self._recorder.failed

    @property
    def in_flight(self) -> int:
        return sum(self._deps.lanes.under_way(source_id) for source_id in self._sources)

    def waits_for(self) -> str | None:
        """Why none of its lines is under way, None where one is."""
        if self._recorder.problem is not None:
            return self._recorder.problem
        lanes, unfinished = self._deps.lanes, [source for source in self._sources.values() if not source.over]
        reasons = [source.problem or lanes.waits_for(source.id) for source in unfinished]
        return reasons[0] if reasons and all(reasons) else None

    # From sources

    @property
    def may_take(self) -> bool:
        return not self._recorder.full

    def line_ended(self, job: Job, custom_id: str, ending: Ending) -> None:
        """A line is over; its record is on its way to the disk."""
        record_id = output.record_id(self._row.id, job.number)
        if isinstance(ending, Answered):
            made = output.answer_line(record_id, custom_id, ending.status, ending.request_id, ending.body)
        else:
            made = output.Rendered(False, output.error_line(record_id, custom_id, ending.code, ending.message))
        self._deps.tally.ended(ok=made.ok, attempts=job.executions, isolated=outcomes.isolated(ending))
        self._recorder.add(Record(job.number, made.ok, job.executions, made.data, made.usage))

    def line_noted(self, job: Job) -> None:
        """A line goes on, with more behind it."""
        self._recorder.note(job.number, job.attempts, job.deaths)

    def _freed(self) -> None:
        for source in self._sources.values():
            source.ready()
