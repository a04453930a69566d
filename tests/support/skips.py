"""A pytest plugin that makes skips honest: where CI runs, a skip that is not in the committed list fails the run.

Invariant: outside CI it only reports nothing and changes nothing. The list is ``tests/skips.txt``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import pytest


def parse(text: str) -> dict[str, str]:
    """Node id globs with their reasons. Raises ``ValueError`` for a line without a reason."""
    allowed = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pattern, _, reason = line.partition("  # ")
        if not reason.strip():
            raise ValueError(f"line {number}: 'NODE ID  # reason' expected, not {line!r}")
        allowed[pattern.strip()] = reason.strip()
    return allowed


def unlisted(skipped: list[str], allowed: dict[str, str]) -> list[str]:
    """The skipped node ids that no glob allows. ``[`` of parametrised ids is taken literally."""
    patterns = [pattern.replace("[", "[[]") for pattern in allowed]
    return [node for node in skipped if not any(fnmatchcase(node, pattern) for pattern in patterns)]


@dataclass(eq=False)  # pytest keeps plugins in sets
class SkipList:
    """Registered by ``tests/conftest.py`` when CI is set."""

    path: Path
    skipped: list[str] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.append(report.nodeid)

    def found(self) -> list[str]:
        return unlisted(self.skipped, parse(self.path.read_text(encoding="utf-8")))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.found():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        found = self.found()
        if found:
            terminalreporter.section("skips that are not in tests/skips.txt", red=True)
            for node in found:
                terminalreporter.line(f"not allowed to skip here: {node}")
