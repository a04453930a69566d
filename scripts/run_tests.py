"""Runs the tests in several processes at once: four that mostly wait for processes and clocks, one that only computes.

``python scripts/run_tests.py [--coverage] [--again N] [pytest arguments]``. Tests below ``tests/acceptance`` and
``tests/integration``, each in two halves, need a quarter of a core; the others keep one busy, and yield to those that
have deadlines. So all together take the time of the longest. With arguments that name tests, or with one core, there is
one process as usual. The output of the first is shown as it comes, that of the others after it; the last line sums up
all.

``--again N``: when at most N tests have failed beside all the others, they are run once more with the machine to
themselves, and that counts. What passes then is named as unsteady: a fault of the test or a race, to be looked into.
"""

from __future__ import annotations

import argparse
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
PATIENCE_S = 600
"""Time for one of the tests that yield to all others."""
_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+\.py(?:::[^\[\s]+(?:\[.*?\])?)?)(?: - .*)?$", re.MULTILINE)
_FAILURES = re.compile(r"\b\d+ (?:failed|errors?)(?:, )?(?=.* in )")
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|xpassed|warnings?)")


def main(arguments: Sequence[str]) -> int:
    """The worst of the exit codes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--again", type=int, default=0)
    own, options = parser.parse_known_args(arguments)
    runner = [sys.executable, "-m"]
    runner += ["coverage", "run", "-m", "pytest"] if own.coverage else ["pytest"]
    if any(not option.startswith("-") for option in options) or (os.cpu_count() or 1) < 2:
        return subprocess.run([*runner, *options], cwd=ROOT, check=False).returncode
    began = time.monotonic()
    codes, outputs = side_by_side([*runner, *options])
    failed = worth_again(codes, outputs)
    if 0 < len(failed) <= own.again:
        print(f"\n--- once more, alone: {', '.join(failed)} ---", flush=True)
        code, again = followed([*runner, *options, *failed])
        codes, outputs = [code], [*map(without_failures, outputs), again]
        steady = set(failures(again))
        print(
            "\n".join(f"UNSTEADY {test}: failed beside others, passes alone" for test in failed if test not in steady)
        )
    print(summed(outputs, time.monotonic() - began), flush=True)
    return max(codes, key=abs)


def side_by_side(runner: Sequence[str]) -> tuple[list[int], list[str]]:
    """Run all parts at once: their exit codes and outputs, which are also printed."""
    parts = {
        f"{folder}, {number + 1} of {HALVES}": [*runner, *half]
        for folder in WAITING
        for number, half in enumerate(halves(ROOT / folder))
    }
    ignored = [f"--ignore={folder}" for folder in WAITING]
    parts["all other tests"] = ["nice", "-n", str(NICENESS), *runner, f"--timeout={PATIENCE_S}", *ignored]
    (_, first), *others = parts.items()
    with ExitStack() as running:
        beside = {name: running.enter_context(Beside(command)) for name, command in others}
        code, text = followed(first)
        outputs = {name: one.output() for name, one in beside.items()}
        codes = [code, *(one.process.returncode for one in beside.values())]
    for name, output in outputs.items():
        print(f"\n--- {name} ---\n{output}")
    return codes, [text, *outputs.values()]


def worth_again(codes: Sequence[int], outputs: Sequence[str]) -> list[str]:
    """The tests that failed, if that is all that went wrong: each failure of each part is known by its name."""
    for code, output in zip(codes, outputs, strict=True):
        counts = counted(output)
        if code not in (0, 1) or len(failures(output)) != counts["failed"] + counts["error"] or not counts["passed"]:
            return []
        if code == 1 and not failures(output):
            return []
    return [test for output in outputs for test in failures(output)]


def failures(output: str) -> list[str]:
    """The tests that a runner's closing summary names as failed or broken."""
    return list(dict.fromkeys(_FAILED.findall(output)))


def without_failures(output: str) -> str:
    """That output as far as its counts go, for a sum in which the second run of its failures is counted instead."""
    return _FAILURES.sub("", output)


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
    counts = sum(map(counted, outputs), Counter[str]())
    order = ["failed", "error", "passed", "skipped", "deselected", "xfailed", "xpassed", "warning"]
    parts = [f"{counts[what]} {what}" for what in order if counts[what]]
    return f"{', '.join(parts)} in {seconds:.2f}s ({timedelta(seconds=int(seconds))})"


def counted(output: str) -> Counter[str]:
    """What a runner's last line says."""
    last = next((line for line in reversed(output.splitlines()) if " in " in line and _COUNT.search(line)), "")
    return Counter({what.removesuffix("s"): int(n) for n, what in _COUNT.findall(last.rpartition(" in ")[0])})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
