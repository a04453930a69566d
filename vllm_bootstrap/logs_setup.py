"""The daemon's own log: text or JSON lines to stderr or to a file. Engine logs are not its business."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TextIO


class TextFormatter(logging.Formatter):
    """``time level message``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def plain(self, created: float, level: str, logger: str, message: str) -> str:  # noqa: ARG002 - as for JSON
        """A line that is one, with nothing to be filled in."""
        return f"{_local_second(int(created))},{int(created % 1 * 1000):03d} {level} {message}\n"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, ``exception``."""

    def plain(self, created: float, level: str, logger: str, message: str) -> str:
        """A line with nothing to be filled in."""
        stamp = f"{_utc_second(int(created))}.{int(created % 1 * 1000):03d}Z"
        return json.dumps({"time": stamp, "level": level, "logger": logger, "message": message}) + "\n"

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{_utc_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up_logging(level: str, kind: str, path: Path | None) -> None:
    """Configure the root logger once. Raises ``OSError`` when the file cannot be opened."""
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = WatchedFileHandler(path)  # reopened when it was moved away, so that logrotate needs no signal
    if kind == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("asyncio", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(max(logging.getLevelName(level), logging.WARNING))


def write_lines(logger: logging.Logger, lines: Sequence[tuple[float, str]]) -> None:
    """Log many INFO lines (unix seconds, message) at little more than the cost of one: where the log is ours, they are
    put down in one write."""
    for handler in logging.getLogger().handlers:
        formatter = handler.formatter
        if isinstance(handler, logging.StreamHandler) and isinstance(formatter, TextFormatter | JsonFormatter):
            _write_at_once(handler, [formatter.plain(created, "INFO", logger.name, line) for created, line in lines])
            continue
        for created, line in lines:
            record = logging.LogRecord(logger.name, logging.INFO, "", 0, line, None, None)
            record.created = created
            handler.handle(record)


def _write_at_once(handler: logging.StreamHandler[TextIO], lines: list[str]) -> None:
    handler.acquire()
    try:
        if isinstance(handler, WatchedFileHandler):
            handler.reopenIfNeeded()
        handler.stream.write("".join(lines))
        handler.flush()
    except Exception:  # noqa: BLE001 - as logging does: a log that cannot be written ends nobody's request
        handler.handleError(logging.LogRecord(__name__, logging.INFO, "", 0, lines[0], None, None))
    finally:
        handler.release()


@lru_cache(maxsize=4)
def _local_second(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


@lru_cache(maxsize=4)
def _utc_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
