"""How commands speak of groups of replicas: launched together, shown together."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Annotated, Literal

import typer

from vllm_bootstrap.cli import loads, output, progress, text
from vllm_bootstrap.cli.options import UsageError
from vllm_bootstrap.client import Client, LaunchFailed
from vllm_bootstrap.sdk.waiting import OnProgress
from vllm_bootstrap.wire import GpuClaim, LaunchGroup, LaunchStatus

PER_GPU: Literal["per_gpu"] = "per_gpu"
ReplicasOption = Annotated[
    str | None,
    typer.Option("--replicas", metavar="N", help="So many engines with a copy of the model each; 'per_gpu' for one on "
                 "each free GPU."),
]  # fmt: skip


def as_replicas(written: str | None) -> int | Literal["per_gpu"] | None:
    """The value of ``--replicas``. Raises ``UsageError``."""
    if written is None or written == PER_GPU:
        return None if written is None else PER_GPU
    if not written.isdecimal() or int(written) < 1:
        raise UsageError(f"--replicas {written!r}: give a number, or {PER_GPU}")
    return int(written)


def tell_launched(client: Client, started: LaunchGroup, *, wait: bool, timeout: float | None, as_json: bool) -> None:
    """Say what was launched and, with ``wait``, how it goes until every replica is ready."""
    if wait:
        _wait(client, started, timeout, as_json=as_json)
    elif as_json:
        output.emit(started)
    elif output.on_terminal():
        output.say(_launching(started))
        output.say(f"  vllm-bootstrap status {started.group_id}")
    else:
        output.say(started.group_id)


def _launching(started: LaunchGroup) -> str:
    count = len(started.replicas)
    what = f"{count} replicas" if count > 1 else "1 replica"
    return f"Launching {what} of {started.model} on {devices_of(started.gpus)}: {started.group_id}"


def _wait(client: Client, started: LaunchGroup, timeout: float | None, *, as_json: bool) -> None:
    try:
        if as_json:
            output.emit(client.wait_group(started.group_id, timeout_s=timeout))
            return
        if output.on_terminal():
            output.say(_launching(started))
        with _shown() as on_progress:
            ready = client.wait_group(started.group_id, timeout_s=timeout, on_progress=on_progress)
    except LaunchFailed as exc:
        if as_json:
            output.emit(client.group(started.group_id))
        else:
            progress.tell_failure(exc.status)
            output.note(f"  The other replicas go on. To end them: vllm-bootstrap stop {started.group_id}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        output.note(f"\nThey go on starting. To end them: vllm-bootstrap stop {started.group_id}")
        raise typer.Exit(1) from None
    took = text.duration((ready.state_changed_at - ready.created_at).total_seconds())
    where = f"{client.target.url}/v1 (model {ready.served_model_name!r})"
    prefix = "" if output.on_terminal() else f"{ready.group_id}  "
    output.say(f"{prefix}{output.styled('ready', 'green')}, {ready.ready} replicas after {took} at {where}")


@contextlib.contextmanager
def _shown() -> Generator[OnProgress]:
    """Show the progress of several launches; yields what ``wait_group`` calls with the status of each."""
    if not output.on_terminal():
        yield progress.Lines().update
        return
    from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn  # noqa: PLC0415 - only on a terminal
    from rich.progress import Progress as RichProgress  # noqa: PLC0415

    spinner, bar = SpinnerColumn(style="cyan", finished_text="[green]✓[/]"), BarColumn(bar_width=30, pulse_style="cyan")
    phase, times = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[times]}", markup=False)
    tasks: dict[str, TaskID] = {}
    with RichProgress(spinner, phase, bar, times, console=output.console()) as bars:

        def update(status: LaunchStatus) -> None:
            if status.launch_id not in tasks:
                tasks[status.launch_id] = bars.add_task("starting", total=None, times="")
            ready = status.state == "ready"
            done = 1.0 if ready else progress.overall(status.progress)
            said = f"{devices_of(status.gpus)}  {progress.phase_of(status)} {progress.details_of(status.progress)}"
            elapsed = (status.state_changed_at - status.created_at).total_seconds()
            if status.progress is not None:
                elapsed = status.progress.elapsed_s
            bars.update(
                tasks[status.launch_id],
                description=text.harmless(said.rstrip(), colours=False),
                total=None if done is None else 1.0,
                completed=done or 0.0,
                times=progress.times_of(elapsed, status.progress),
            )

        yield update


def devices_of(claims: Sequence[GpuClaim]) -> str:
    """Where a launch or a group runs, each device once."""
    if not claims:
        return "-"
    if all(claim.uuid == "cpu" for claim in claims):
        return "CPU"
    names = [str(claim.index) if claim.index is not None else claim.uuid for claim in claims]
    share = claims[0].share
    return f"GPU {', '.join(dict.fromkeys(names))}" + (f" ({text.percent(share)})" if share < 1 else "")


def together(launches: Sequence[LaunchStatus]) -> list[list[LaunchStatus]]:
    """Launches by their group, in the order in which groups appear; of one group, oldest first."""
    found: dict[str, list[LaunchStatus]] = {}
    for launch in launches:
        found.setdefault(launch.group_id, []).append(launch)
    return [sorted(group, key=lambda launch: launch.launch_id) for group in found.values()]


def as_lines(group: Sequence[LaunchStatus], rows: Sequence[list[str]]) -> list[list[str]]:
    """The lines of ``ps`` for a group: its sum, then each of its launches, whose own lines are ``rows``."""
    first, name = group[0], rows[0][1]
    ready = sum(launch.state == "ready" for launch in group)
    state = f"{'ready' if ready else first.state}, {ready} of {first.group_size}"
    devices = devices_of([claim for launch in group for claim in launch.gpus])
    running = sum(sum(launch.load.in_flight.values()) for launch in group)
    queued = max(sum(launch.load.queued.values()) for launch in group)
    batch = loads.batch_share(*(launch.load for launch in group))
    summed = [first.group_id, name, state, devices, rows[0][4], str(running), str(queued), batch]
    return [summed, *([f"  {row[0]}", *row[1:]] for row in rows)]


def show(found: LaunchGroup, base: str, rows: Sequence[list[str]]) -> None:
    """A group and its launches, whose lines of ``ps`` are ``rows``."""
    state = f"{found.state}, {found.ready} of {len(found.replicas)}"
    output.say(f"{output.styled(found.model, 'bold')}  {output.styled(state, output.style_of(found.state))}")
    output.pairs([
        ("group", found.group_id),
        ("served as", found.served_model_name),
        ("engine", found.engine),
        ("devices", devices_of(found.gpus)),
        ("owner", found.owner),
        ("url", f"{base}{found.proxy_url}/v1"),
        ("labels", ", ".join(f"{name}={value}" for name, value in found.labels.items())),
        ("restart", found.restart),
        ("requests", loads.requests_of(found.load)),
        ("started", f"{found.created_at:%Y-%m-%d %H:%M:%S}Z, {text.age(found.created_at)} ago"),
    ])  # fmt: skip
    output.table(
        ["REPLICA", "STATE", "GPUS", "RUNNING", "QUEUED", "BATCH"], [[r[0], *r[2:4], *r[5:]] for r in rows],
        state_column=1, spare=("BATCH", "GPUS"),
    )  # fmt: skip
    if found.failure is not None:
        output.say(f"\nLast failure: {found.failure.message}")
        if found.failure.hint:
            output.say(f"Hint: {found.failure.hint}")
