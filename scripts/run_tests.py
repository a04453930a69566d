"""Runs the tests in two processes at once: what only computes beside what waits for processes and clocks.

``python scripts/run_tests.py [--coverage] [pytest arguments]``. Most tests below ``tests/integration`` and
``tests/acceptance`` wait for something; the others keep a core busy. Side by side they take the time of the longer
half, and those that compute yield to those that have deadlines. With arguments that name tests, or with one core, there
is one process as usual. The output of the second comes when the first has ended; the last line sums up both.
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
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAITING = ("tests/acceptance", "tests/integration")
NICENESS = 10
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|xpassed|warnings?)")


def main(arguments: Sequence[str]) -> int:
    """The worse of the two exit codes."""
    options = [argument for argument in arguments if argument != "--coverage"]
    runner = [sys.executable, "-m"]
    runner += ["coverage", "run", "-m", "pytest"] if "--coverage" in arguments else ["pytest"]
    if any(not option.startswith("-") for option in options) or (os.cpu_count() or 1) < 2:
        return subprocess.run([*runner, *options], cwd=ROOT, check=False).returncode
    ignored = [f"--ignore={folder}" for folder in WAITING]
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        computing = subprocess.Popen(
            ["nice", "-n", str(NICENESS), *runner, *ignored, *options], cwd=ROOT, stdout=output, stderr=output
        )
        try:
            code, text = followed([*runner, *options, *WAITING])
            other = computing.wait()
        finally:
            computing.kill()
            computing.wait()
        output.seek(0)
        beside = output.read().decode(errors="replace")
    print(f"\n--- {' and '.join(WAITING)} are above, all other tests below ---\n{beside}")
    print(summed([text, beside], time.monotonic() - began), flush=True)
    return code or other


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
