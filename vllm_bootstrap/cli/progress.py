"""Watching a launch become ready: a bar on a terminal, a line for each phase in a pipe, and how a failure is told."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from types import TracebackType
from typing import Self

from vllm_bootstrap import wording
from vllm_bootstrap.cli import output, text
from vllm_bootstrap.sdk.waiting import OnProgress
from vllm_bootstrap.wire import LaunchStatus, Progress

READY_SOON = 0.99
DOWNLOADING = ("load", "download")  # vLLM fetches what is missing when it starts to load


def phase_of(status: LaunchStatus) -> str:
    """What a launch is doing, in words."""
    if status.state == "bootstrapping":
        if status.next_attempt_at is not None:
            return f"waiting for attempt {status.attempt}"
        return wording.phase(status.progress.phase if status.progress is not None else None)
    if status.state == "stopping":
        return f"stopping ({wording.reason(status.stopping_because)})"
    return status.state


def details_of(progress: Progress | None) -> str:
    """What is known about a phase: its fraction, or bytes downloaded so far."""
    if progress is None:
        return ""
    if progress.fraction is not None:
        return text.percent(progress.fraction)
    if progress.downloaded_bytes and progress.phase in DOWNLOADING:
        total = f" of {text.size(progress.download_total_bytes)}" if progress.download_total_bytes else ""
        return f"{text.size(progress.downloaded_bytes)}{total} in the cache"
    return ""


def overall(progress: Progress | None) -> float | None:
    """How far the whole start is: by earlier starts where there were any, else by the phase's own fraction."""
    if progress is None:
        return None
    if progress.eta_s is not None and progress.elapsed_s + progress.eta_s > 0:
        return min(READY_SOON, progress.elapsed_s / (progress.elapsed_s + progress.eta_s))
    return progress.fraction


def times_of(elapsed: float, progress: Progress | None) -> str:
    """How long it took so far, and how much longer it may."""
    left = f", {wording.time_left(progress.eta_s)}" if progress is not None and progress.eta_s is not None else ""
    return text.duration(elapsed) + left


class PhaseLog:
    """Notices new phases: ``seen`` gives the line for one, or None while nothing changed."""

    def __init__(self) -> None:
        self._phase: tuple[int, str] | None = None

    def seen(self, status: LaunchStatus) -> str | None:
        now = (status.attempt, phase_of(status))
        if now == self._phase or status.state == "ready":
            return None
        again = self._phase is not None and self._phase[0] != status.attempt
        self._phase = now
        details = details_of(status.progress)
        attempt = f"attempt {status.attempt}: " if again else ""
        return f"{attempt}{now[1]}{f' ({details})' if details else ''}"


class Lines:
    """For a pipe: one line for each new phase, of each launch."""

    def __init__(self) -> None:
        self._phases: dict[str, PhaseLog] = {}

    def update(self, status: LaunchStatus) -> None:
        line = self._phases.setdefault(status.launch_id, PhaseLog()).seen(status)
        if line is not None:
            output.say(f"{status.launch_id}  {line}")


class Bar:
    """For a terminal: the phase, a bar, and the time; finished phases stay above it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn  # noqa: PLC0415 - only on a terminal
        from rich.progress import Progress as RichProgress  # noqa: PLC0415

        self._console = output.console()
        spinner, bar = SpinnerColumn(style="cyan"), BarColumn(bar_width=30, pulse_style="cyan")
        phase, times = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[times]}", markup=False)
        self._bar = RichProgress(spinner, phase, bar, times, console=self._console, transient=True)
        self._task = self._bar.add_task("starting", total=None, times="")
        self._phase, self._phase_began = "", 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, status: LaunchStatus) -> None:
        phase, progress = phase_of(status), status.progress
        elapsed = progress.elapsed_s if progress is not None else self._phase_began
        self._finish(phase, elapsed)
        details = details_of(progress)
        fraction = overall(progress)
        self._bar.update(
            self._task,
            description=text.harmless(f"{phase} {details}".rstrip(), colours=False),
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
            times=times_of(elapsed, progress),
        )

    def _finish(self, phase: str, elapsed: float) -> None:
        if phase == self._phase:
            return
        if self._phase:
            took = text.duration(max(0.0, elapsed - self._phase_began))
            self._console.print(f"  [green]✓[/] {self._phase} [dim]{took}[/]")
        self._phase, self._phase_began = ("" if phase == "ready" else phase), elapsed


@contextlib.contextmanager
def shown() -> Generator[OnProgress]:
    """Show the progress of one launch; yields what ``wait_ready`` calls."""
    if output.on_terminal():
        with Bar() as bar:
            yield bar.update
    else:
        yield Lines().update


def tell_failure(status: LaunchStatus) -> None:
    """How a launch ended, on standard error: class, message, telling lines, hint, and where to look further."""
    failure = status.failure
    if failure is None:
        output.note(f"{status.model} was stopped before it was ready.")
        return
    output.note(f"{status.model} failed: {wording.words(failure.failure_class)}")
    output.note(f"  {failure.message}")
    for line in failure.lines or ():
        output.note(f"    | {text.harmless(line, colours=False)}")
    if failure.hint:
        output.note(f"  Hint: {failure.hint}")
    output.note(f"  Log:  vllm-bootstrap logs {status.launch_id}")
