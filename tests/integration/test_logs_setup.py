"""The daemon's own log: text or JSON, to stderr or to a file that logrotate may move away."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_bootstrap.logs_setup import set_up_logging, write_lines


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:], root.level = before, level


def test_json_lines_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "daemon.log"
    set_up_logging("INFO", "json", path)
    log = logging.getLogger("vllm_bootstrap.x")
    log.debug("not this")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("it %s", "failed")
    (line,) = path.read_text().splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == ("ERROR", "vllm_bootstrap.x", "it failed")
    assert entry["time"].endswith("Z")
    assert "ValueError: broken" in entry["exception"]


def test_text_goes_on_in_a_fresh_file_after_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "daemon.log"
    set_up_logging("INFO", "text", path)
    logging.getLogger().info("before")
    path.rename(tmp_path / "daemon.log.1")
    logging.getLogger().info("after")
    assert path.read_text().endswith("INFO after\n")


def test_stderr_is_the_default(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("WARNING", "text", None)
    logging.getLogger().warning("seen")
    logging.getLogger().info("unseen")
    said = capfd.readouterr().err
    assert "seen" in said
    assert "unseen" not in said


@pytest.mark.parametrize("kind", ["text", "json"])
def test_many_lines_at_once_look_as_one_by_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "daemon.log"
    set_up_logging("INFO", kind, path)
    log = logging.getLogger("vllm_bootstrap.access")
    for second, message in ((1_700_000_000.25, "one"), (1_700_000_001.5, "two")):
        record = logging.LogRecord(log.name, logging.INFO, "", 0, message, None, None)
        record.created, record.msecs = second, second % 1 * 1000
        log.handle(record)
    path.rename(tmp_path / "one-by-one.log")
    write_lines(log, [(1_700_000_000.25, "one"), (1_700_000_001.5, "two")])
    assert path.read_text() == (tmp_path / "one-by-one.log").read_text()


def test_many_lines_reach_a_handler_of_somebody_else(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        write_lines(logging.getLogger("vllm_bootstrap.access"), [(1.0, "one"), (2.0, "two")])
    assert [(one.name, one.created, one.message) for one in caplog.records] == [
        ("vllm_bootstrap.access", 1.0, "one"), ("vllm_bootstrap.access", 2.0, "two"),
    ]  # fmt: skip
