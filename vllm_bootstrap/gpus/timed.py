"""Blocking work in a thread of its own, with a time limit on each of its steps.

A call into a driver cannot be interrupted. So the work says when it begins a step, the event loop watches how long
that step lasts, and a thread that takes too long is left behind and replaced. Invariant: at most ``HUNG_MAX`` threads
hang at any time; beyond that, work is refused at once until one of them comes back.

Nothing here knows what the work is.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Step = Callable[[str], None]

HUNG_MAX = 3
CLOSE_WAIT_S = 1.0


class StepTimeout(Exception):
    """A step did not come back in time; the message names it."""


class TimedThread:
    """One thread at a time, started when first needed. Use from one event loop; one ``run`` at a time."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._worker: _Worker | None = None
        self._hung: list[_Worker] = []

    async def run(self, work: Callable[[Step], T]) -> T:
        """Run ``work(step)`` in the thread; it calls ``step(name)`` before each thing that may hang.

        Raises ``StepTimeout``; the work is then left to itself and its result is dropped. Cancelling the caller does
        not stop the work either.
        """
        worker = self._worker = self._worker or self._new_worker()
        waiting = asyncio.wrap_future(worker.submit(work))
        while True:
            finished, _ = await asyncio.wait({waiting}, timeout=worker.time_left(self._timeout_s))
            if finished:
                return waiting.result()
            if worker.time_left(self._timeout_s) <= 0:
                waiting.cancel()
                self._leave_behind(worker)
                raise StepTimeout(f"{worker.step} did not come back within {self._timeout_s:g} s")

    def close(self) -> None:
        """Let the thread end after its work; waits for it a moment. Idempotent."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()
            worker.thread.join(CLOSE_WAIT_S)

    def _new_worker(self) -> _Worker:
        self._hung = [worker for worker in self._hung if worker.thread.is_alive()]
        if len(self._hung) >= HUNG_MAX:
            raise StepTimeout(f"{self._hung[-1].step} is hanging, in {len(self._hung)} threads")
        return _Worker(self._name)

    def _leave_behind(self, worker: _Worker) -> None:
        worker.end()
        self._hung.append(worker)
        self._worker = None


class _Worker:
    """A thread with its queue. ``step`` and ``since`` say what it is doing; written by it, read by the loop."""

    def __init__(self, name: str) -> None:
        self.step = "its start"
        self.since = time.monotonic()
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[Step], Any]] | None] = SimpleQueue()
        # A daemon thread: one that hangs must not keep the process from ending.
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def submit(self, work: Callable[[Step], T]) -> Future[T]:
        future: Future[T] = Future()
        self._mark(self.step)
        self._queue.put((future, work))
        return future

    def time_left(self, timeout_s: float) -> float:
        return max(0.0, self.since + timeout_s - time.monotonic())

    def end(self) -> None:
        self._queue.put(None)

    def _mark(self, step: str) -> None:
        self.step, self.since = step, time.monotonic()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            future, work = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work(self._mark)
            except BaseException as exc:  # noqa: BLE001 - it belongs to the caller, and this thread must go on
                future.set_exception(exc)
            else:
                future.set_result(result)
