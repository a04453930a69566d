"""vLLM's log lines without their decoration. PURE.

A record looks like ``(EngineCore pid=12) ERROR 11-21 08:24:21 [core.py:1510] text``; continuation lines of tracebacks
carry the decoration again, progress bars and plain prints do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LINE = 4000

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PROCESS = re.compile(r"\(([A-Za-z][\w.-]*)(?: pid=\d+)?\) ?")
_RECORD = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:,.]+ \[[^\]]*\] ?")
_BARE_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL):\s+")
_OTHER_WORKER = re.compile(r"_(?:TP|PP|DP|EP|PCP|DCP)[1-9]\d*")


@dataclass(frozen=True, slots=True)
class LogLine:
    """``process`` as the engine names it (``APIServer``, ``Worker_TP0``), ``level`` where the line has one."""

    text: str
    process: str | None = None
    level: str | None = None

    @property
    def is_calm(self) -> bool:
        """Information that explains no death. Its text may quote anything, even the name of an error."""
        return self.level in {"DEBUG", "INFO", "WARNING"}

    @property
    def is_source(self) -> bool:
        """A line of a traceback that quotes source code or its place."""
        return self.text.startswith(("    ", '  File "'))

    @property
    def is_repetition(self) -> bool:
        """Said by a worker that repeats what the first one says."""
        return self.process is not None and _OTHER_WORKER.search(self.process) is not None


def parse(raw: str) -> LogLine:
    """Take the decoration off one line."""
    text = _ANSI.sub("", raw[:MAX_LINE]).rstrip()
    process = level = None
    match = _PROCESS.match(text)
    if match is not None:
        process, text = match[1], text[match.end() :]
    match = _RECORD.match(text) or _BARE_LEVEL.match(text)
    if match is not None:
        level, text = match[1], text[match.end() :]
    return LogLine(text, process, level)
