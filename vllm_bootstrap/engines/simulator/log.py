"""The simulator's log: lines on stdout as vLLM writes them, each with the process it speaks for.

Not the logging module: importing it costs time, and a child between fork and exit must not touch its locks.
"""

from __future__ import annotations

import os
import time


def write(text: str) -> None:
    """Write whole lines to stdout at once, so that lines of several processes do not mix. May block on a full pipe.

    A closed stdout is ignored: an engine goes on without its log.
    """
    data = text.encode("utf-8", "backslashreplace")
    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError:
        return


class Log:
    """Lines of one process."""

    def __init__(self, process: str, pid: int) -> None:
        self._prefix = f"({process} pid={pid})"

    def say(self, place: str, message: str) -> None:
        self._line("INFO", place, message)

    def warn(self, place: str, message: str) -> None:
        self._line("WARNING", place, message)

    def fail(self, place: str, message: str) -> None:
        self._line("ERROR", place, message)

    def raw(self, text: str) -> None:
        """A line without level and time, as tracebacks and progress bars have it."""
        write("".join(f"{self._prefix} {line}\n" for line in text.splitlines()))

    def _line(self, level: str, place: str, message: str) -> None:
        now = time.strftime("%m-%d %H:%M:%S")
        write(f"{self._prefix} {level} {now} [{place}] {message}\n")
