"""Runs the tests in several processes at once: four that mostly wait for processes and clocks, one that only computes.

``python scripts/run_tests.py [--coverage] [pytest arguments]``. Tests below ``tests/acceptance`` and
``tests/integration``, each in two halves, need a quarter of a core; the others keep one busy, and yield to those that
have deadlines. So all together take the time of the longest. With arguments that name tests, or with one core, there is
one process as usual. The output of the first is shown as it comes, that of the others after it; the last line sums up
all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[1]
WAITING = ("tests/acceptance", "tests/integration")
HALVES = 2
NICENESS = 10
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|xpassed|warnings?)")


def main(arguments: Sequence[str]) -> int:
    """The worst of the exit codes."""
    options = [argument for argument in arguments if argument != "--coverage"]
    runner = [sys.executable, "-m"]
    runner += ["coverage", "run", "-m", "pytest"] if "--coverage" in arguments else ["pytest"]
    if any(not option.startswith("-") for option in options) or (os.cpu_count() or 1) < 2:
        return subprocess.run([*runner, *options], cwd=ROOT, check=False).returncode
    parts = {
        f"{folder}, {number + 1} of {HALVES}": [*runner, *options, *half]
        for folder in WAITING
        for number, half in enumerate(halves(ROOT / folder))
    }
    ignored = [f"--ignore={folder}" for folder in WAITING]
    parts["all other tests"] = ["nice", "-n", str(NICENESS), *runner, *options, *ignored]
    (_, first), *others = parts.items()
    began = time.monotonic()
    with ExitStack() as running:
        beside = {name: running.enter_context(Beside(command)) for name, command in others}
        code, text = followed(first)
        outputs = {name: one.output() for name, one in beside.items()}
        codes = [code, *(one.process.returncode for one in beside.values())]
    for name, output in outputs.items():
        print(f"\n--- {name} ---\n{output}")
    print(summed([text, *outputs.values()], time.monotonic() - began), flush=True)
    return max(codes, key=abs)


def halves(folder: Path) -> list[list[str]]:
    """The test files below a folder, every other one in each half, so that neighbours, which are alike, part."""
    files = sorted(str(path.relative_to(ROOT)) for path in folder.rglob("test_*.py"))
    return [files[number::HALVES] for number in range(HALVES)]


class Beside:
    """A command that runs beside others, its output kept in a file. Leaving ends it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self._file, stderr=self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._file.close()

    def output(self) -> str:
        """Wait for its end; all it has said."""
        self.process.wait()
        self._file.seek(0)
        return self._file.read().decode(errors="replace")


def followed(command: Sequence[str]) -> tuple[int, str]:
    """Run a command, pass its output on as it comes, and keep it."""
    kept: list[bytes] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None  # noqa: S101 - it was asked for
        while piece := os.read(process.stdout.fileno(), 65536):
            kept.append(piece)
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    return process.returncode, b"".join(kept).decode(errors="replace")


def summed(outputs: Sequence[str], seconds: float) -> str:
    """A line as the test runner's own, with the counts of both."""
    counts: Counter[str] = Counter()
    for output in outputs:
        last = next((line for line in reversed(output.splitlines()) if " in " in line and _COUNT.search(line)), "")
        for number, what in _COUNT.findall(last.rpartition(" in ")[0]):
            counts[what.removesuffix("s")] += int(number)
    order = ["failed", "error", "passed", "skipped", "deselected", "xfailed", "xpassed", "warning"]
    parts = [f"{counts[what]} {what}" for what in order if counts[what]]
    return f"{', '.join(parts)} in {seconds:.2f}s ({timedelta(seconds=int(seconds))})"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
