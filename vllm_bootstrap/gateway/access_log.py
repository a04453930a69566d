"""The access log: one line for each finished request of the data plane, written many at a time.

Invariant: a line is written at most ``FLUSH_S`` after its request ended, lines in the order in which requests ended,
none twice; ``flush`` writes what waits. Only a daemon that is killed takes the lines of its last moment along. A line
holds no keys, queries or content. Must not know: where the log goes.
"""

from __future__ import annotations

import asyncio
import logging

from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.logs_setup import write_lines

FLUSH_S = 0.1
MOST_LINES = 256

_log = logging.getLogger("vllm_bootstrap.access")


class AccessLog:
    """Lines that wait to be written. One timer for all of them."""

    def __init__(self) -> None:
        self._waiting: list[RequestRecord] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, record: RequestRecord) -> None:
        """Note a finished request."""
        waiting = self._waiting
        waiting.append(record)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        elif len(waiting) >= MOST_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what waits. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        if waiting and _log.isEnabledFor(logging.INFO):
            write_lines(_log, _lines(waiting))


def _lines(records: list[RequestRecord]) -> list[tuple[float, str]]:
    """Each with the time it is about."""
    found = []
    for one in records:
        code = f" {one.code}" if one.code else ""
        line = (
            f"{one.request_id} {one.method} {one.path} -> {one.status}{code} in {one.duration_s:.3f} s, "
            f"owner {one.owner}, launch {one.launch_id or '-'}"
        )
        found.append((one.started_at + one.duration_s, line))
    return found
