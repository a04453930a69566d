"""How far batches are, in words and as bars: on a terminal a bar, in a pipe a line for each step worth telling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

from vllm_bootstrap import wording
from vllm_bootstrap.cli import output, text
from vllm_bootstrap.sdk.batch_calls import ENDED_BATCH
from vllm_bootstrap.sdk.transfers import OnBytes
from vllm_bootstrap.wire_batches import BatchObject

STEPS = 10  # lines in a pipe while one state lasts


def is_over(batch: BatchObject) -> bool:
    return batch.status in ENDED_BATCH


def went_well(batch: BatchObject) -> bool:
    """Whether every line has its answer."""
    return batch.status == "completed" and batch.request_counts.failed == 0


def state_of(batch: BatchObject) -> str:
    """What a batch is doing, in words."""
    if batch.paused and not is_over(batch):
        return f"{batch.status} (paused)"
    return batch.status


def lines_of(batch: BatchObject) -> str:
    """How many lines have ended, and how."""
    counts = batch.request_counts
    if batch.status == "validating":
        done, total = batch.progress.validated_bytes, batch.progress.input_bytes
        return f"{text.size(done)} of {text.size(total)} checked" if done is not None and total else ""
    if not counts.total:  # it was refused, or given up before they were known
        return ""
    failed = f", {counts.failed} failed" if counts.failed else ""
    return f"{counts.completed + counts.failed} of {counts.total} lines{failed}"


def pace_of(batch: BatchObject) -> str:
    """How fast it goes and how long it may take, or why it stands still."""
    progress = batch.progress
    if is_over(batch):
        return ""
    if progress.waits_for:
        return f"waits: {progress.waits_for}"
    rate = f"{progress.lines_per_s:.3g} lines/s" if progress.lines_per_s else ""
    left = wording.time_left(progress.eta_s) if progress.eta_s else ""
    return ", ".join(part for part in (rate, left) if part)


def fraction_of(batch: BatchObject) -> float:
    """How much of the present state is done, 0 to 1."""
    progress = batch.progress
    if batch.status == "validating":
        return (progress.validated_bytes or 0) / progress.input_bytes if progress.input_bytes else 0.0
    return progress.percent / 100


def summary_of(batch: BatchObject) -> str:
    """How far it is, in one line."""
    parts = (state_of(batch), lines_of(batch), pace_of(batch))
    return ", ".join(part for part in parts if part)


class Lines:
    """For a pipe: a line for each new state, each new reason to wait, and each tenth of the way."""

    def __init__(self) -> None:
        self._told: tuple[object, ...] = ()

    def update(self, batch: BatchObject) -> None:
        step = (state_of(batch), batch.progress.waits_for, int(fraction_of(batch) * STEPS))
        if step != self._told and not is_over(batch):
            self._told = step
            output.say(f"{batch.id}  {summary_of(batch)}")


@contextlib.contextmanager
def shown() -> Generator[Callable[[BatchObject], None]]:
    """Show the progress of one batch; yields what is to be called with each look at it."""
    if not output.on_terminal():
        yield Lines().update
        return
    from rich.progress import BarColumn, SpinnerColumn, TextColumn  # noqa: PLC0415 - only on a terminal
    from rich.progress import Progress as RichProgress  # noqa: PLC0415

    state, rest = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rest]}", markup=False)
    columns = (SpinnerColumn(style="cyan"), state, BarColumn(bar_width=30, pulse_style="cyan"), rest)
    with RichProgress(*columns, console=output.console(), transient=True) as bars:
        task = bars.add_task("waiting", total=1.0, rest="")

        def update(batch: BatchObject) -> None:
            said = ", ".join(part for part in (lines_of(batch), pace_of(batch)) if part)
            bars.update(
                task,
                description=state_of(batch),
                completed=fraction_of(batch),
                rest=text.harmless(said, colours=False),
            )

        yield update


@contextlib.contextmanager
def transferring(what: str) -> Generator[OnBytes | None]:
    """A bar for a file on its way, on a terminal; in a pipe nothing is said."""
    if not output.on_terminal():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn  # noqa: PLC0415 - as above
    from rich.progress import Progress as RichProgress  # noqa: PLC0415

    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn())
    with RichProgress(*columns, console=output.console(), transient=True) as bars:
        task = bars.add_task(text.harmless(what, colours=False), total=None)

        def update(done: int, total: int | None) -> None:
            bars.update(task, completed=done, total=total)

        yield update
