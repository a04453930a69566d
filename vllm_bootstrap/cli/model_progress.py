"""How far models are, in words and as bars: on a terminal a bar, in a pipe a line for each step worth telling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from vllm_bootstrap import wording
from vllm_bootstrap.cli import output, progress, text
from vllm_bootstrap.wire_models import DownloadInfo, ModelStatus, PrefetchInfo

STEPS = 10  # lines in a pipe while one thing is done

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Look:
    """What is told of one look: what is done now, how much of it (0 to 1, None: not known), and the rest in words.
    ``over``: nothing is left to tell on the way."""

    doing: str
    fraction: float | None
    rest: str
    over: bool = False


def of_load(status: ModelStatus) -> Look:
    """A model on its way to be loaded. The whole way is measured by earlier loads where there were any."""
    found = status.progress
    if found is not None and found.eta_s is None and found.fraction is None and status.load_est_s:
        found = found.model_copy(update={"eta_s": max(0.0, status.load_est_s - found.elapsed_s)})
    if status.state == "waking":
        doing = "waking up"
    elif status.state in {"unloaded", "asleep"}:
        doing = "waiting"  # it was asked for and has not begun
    elif status.state == "loading" and found is not None and found.phase is not None:
        doing = wording.phase(found.phase)
    else:
        doing = wording.words(status.state)
    times = progress.times_of(found.elapsed_s, found) if found is not None else ""
    rest = ", ".join(part for part in (progress.details_of(found), times, status.why or "") if part)
    return Look(doing, progress.overall(found), rest, status.state in {"loaded", "failed"})


def of_download(info: DownloadInfo) -> Look:
    done = text.size(info.bytes_done) + (f" of {text.size(info.bytes_total)}" if info.bytes_total else "")
    files = f"{info.files_done} of {info.files_total} files" if info.files_total else ""
    rate = f"{text.size(int(info.bytes_per_s))}/s" if info.bytes_per_s else ""
    left = wording.time_left(info.eta_s) if info.eta_s else ""
    rest = ", ".join(part for part in (done, files, rate, left) if part)
    fraction = info.bytes_done / info.bytes_total if info.bytes_total else None
    doing = {"queued": "waiting for another download", "running": "downloading"}.get(info.state, info.state)
    return Look(doing, fraction, rest, info.state not in {"queued", "running"})


def of_prefetch(info: PrefetchInfo) -> Look:
    fraction = info.bytes_done / info.bytes_total if info.bytes_total else None
    rate = f"{text.size(int(info.bytes_done / info.seconds))}/s" if info.seconds > 0 and info.bytes_done else ""
    done = f"{text.size(info.bytes_done)} of {text.size(info.bytes_total)}"
    doing = "reading ahead" if info.state == "running" else info.state
    return Look(doing, fraction, ", ".join(part for part in (done, rate) if part), info.state != "running")


class Lines:
    """For a pipe: a line for each new thing that is done, and for each tenth of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._told: tuple[str, int] | None = None

    def update(self, look: Look) -> None:
        step = (look.doing, int((look.fraction or 0) * STEPS))
        if step != self._told and not look.over:
            self._told = step
            rest = f", {look.rest}" if look.rest else ""
            output.say(f"{self._name}  {look.doing}{rest}")


@contextlib.contextmanager
def shown(name: str, look_at: Callable[[T], Look]) -> Generator[Callable[[T], None]]:
    """Show how far one model is; yields what is to be called with each look at it."""
    if not output.on_terminal():
        lines = Lines(name)
        yield lambda found: lines.update(look_at(found))
        return
    from rich.progress import BarColumn, SpinnerColumn, TextColumn  # noqa: PLC0415 - only on a terminal
    from rich.progress import Progress as RichProgress  # noqa: PLC0415

    doing, rest = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rest]}", markup=False)
    columns = (SpinnerColumn(style="cyan"), doing, BarColumn(bar_width=30, pulse_style="cyan"), rest)
    with RichProgress(*columns, console=output.console(), transient=True) as bars:
        task = bars.add_task("starting", total=None, rest="")

        def update(found: T) -> None:
            look = look_at(found)
            bars.update(
                task,
                description=text.harmless(look.doing, colours=False),
                total=None if look.fraction is None else 1.0,
                completed=look.fraction or 0.0,
                rest=text.harmless(look.rest, colours=False),
            )

        yield update
