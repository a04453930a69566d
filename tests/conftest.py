"""What holds for every test run: one temp folder of its own, nothing left behind in it, and honest skips."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests.support import leftovers
from tests.support.skips import SkipList
from vllm_bootstrap import compiled

HERE = Path(__file__).resolve().parent
GRACE_S = 10.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.compiled:
        left = [one for one in items if one.get_closest_marker("interpreted") is not None]
        config.hook.pytest_deselected(items=left)
        items[:] = [one for one in items if one not in left]


class OwnTempFolder:
    """All of a run's files, sockets and processes live below one short folder, so that what is left can be found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[leftovers.Leftover] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.found = leftovers.wait_until_none(self.folder, GRACE_S)
        if self.found:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            leftovers.kill(self.found)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.found:
            terminalreporter.section("processes left behind by the tests (killed now)", red=True)
            for left in self.found:
                terminalreporter.line(f"pid {left.pid} ({left.because}): {left.command}")

    def pytest_unconfigure(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compiled", action="store_true", help="test the compiled data plane (make compiled)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.compiled:
        compiled.use()  # raises where there is nothing to test
    from tests.support import daemon  # noqa: PLC0415 - not before, since that imports some of what is compiled

    daemon.FORM["compiled"] = compiled.in_use()
    # Short: paths of Unix sockets end after 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="v"))
    tempfile.tempdir = str(folder)
    os.environ["TMPDIR"] = str(folder)
    if config.option.basetemp is None:
        config.option.basetemp = str(folder / "t")
    # A shell that starts a run in the background has it ignore Ctrl-C, and so would all that the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(OwnTempFolder(folder), "own-temp-folder")
    if os.environ.get("CI"):
        config.pluginmanager.register(SkipList(HERE / "skips.txt"), "skip-list")
