"""Commands that look at logs and at the box: ``logs``, ``gpus``, ``version``."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from vllm_bootstrap import __version__
from vllm_bootstrap.cli import output, text
from vllm_bootstrap.cli.options import AsJson, Key, LaunchName, Url, UsageError, connect, resolve
from vllm_bootstrap.client import ApiError, Client, ClientError
from vllm_bootstrap.sdk.waiting import is_over
from vllm_bootstrap.wire import GpuInfo

NEXT_ATTEMPT_POLL_S = 0.5


def logs(
    launch_id: LaunchName,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows, until the launch ends.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", metavar="LINES", min=0, help="Only the last lines.")] = None,
    offset: Annotated[int | None, typer.Option("--offset", metavar="BYTES", min=0, help="From this byte on.")] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", metavar="N", min=1, help="Of an earlier attempt.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show the log of an engine."""
    if tail is not None and offset is not None:
        raise UsageError("Give either --tail or --offset.")
    with connect(url, key) as client:
        wanted = resolve(client, launch_id)
        if follow:
            _follow(client, wanted, tail=tail, offset=offset, attempt=attempt, as_json=as_json)
        elif as_json:
            output.emit(client.logs(wanted, tail=tail, offset=offset, attempt=attempt))
        else:
            _print_all(client, wanted, tail=tail, offset=offset, attempt=attempt)


def _print_all(client: Client, launch_id: str, *, tail: int | None, offset: int | None, attempt: int | None) -> None:
    """Everything there is now. What is written meanwhile is left to ``--follow``."""
    page = client.logs(launch_id, tail=tail, offset=offset, attempt=attempt)
    size = page.size
    while True:
        if page.truncated_before is not None:
            output.note(f"(the log before byte {page.offset} was rotated away)")
        output.raw(page.content)
        if page.next_offset >= size or page.next_offset == page.offset:
            return
        page = client.logs(launch_id, offset=page.next_offset, attempt=page.attempt)


def _follow(
    client: Client, launch_id: str, *, tail: int | None, offset: int | None, attempt: int | None, as_json: bool
) -> None:
    """Attempt after attempt, unless one was asked for, until the launch has ended."""
    current = attempt
    try:
        while True:
            for page in client.follow_logs(launch_id, tail=tail, offset=offset, attempt=current):
                current = page.attempt
                if as_json:
                    output.emit(page, in_one_line=True)
                else:
                    output.raw(page.content)
            following = None if attempt is not None else _next_attempt(client, launch_id, current)
            if following is None:
                return
            current, tail, offset = following, None, None
            output.note(f"(attempt {following})")
    except KeyboardInterrupt:
        output.note("")


def _next_attempt(client: Client, launch_id: str, ended: int | None) -> int | None:
    """The attempt that follows an ended one, None when the launch is over or the key may not know."""
    while True:
        try:
            status = client.status(launch_id)
        except ApiError:
            return None
        if ended is not None and status.attempt > ended:
            return ended + 1
        if ended is None or is_over(status):
            return None
        time.sleep(NEXT_ATTEMPT_POLL_S)


def gpus(*, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Show GPUs, their owners and their use."""
    with connect(url, key) as client:
        found = client.gpus()
    if as_json:
        output.emit(found)
        return
    header = ["GPU", "NAME", "STATE", "MEMORY", "USE", "TEMP", "POWER", "USED BY"]
    output.table(header, [_row(gpu) for gpu in found.data], state_column=2)
    if found.unknown:
        output.note(f"Nothing can be given out at the moment: {found.unknown}")
    elif not found.pids_trusted:
        output.note("Process ids of the driver mean nothing here (container): others' use is judged by memory.")
    for gpu in found.data:
        if gpu.reason and gpu.state in ("busy", "unsettled", "unknown"):
            output.note(f"GPU {gpu.index} {gpu.reason}")


def _row(gpu: GpuInfo) -> list[str]:
    used = f"{text.size(gpu.memory_used_bytes)} of {text.size(gpu.memory_total_bytes)}"
    temperature = "-" if gpu.temperature_c is None else f"{gpu.temperature_c} °C"
    power = "-" if gpu.power_w is None else f"{gpu.power_w:.0f} W"
    use = text.percent(gpu.utilization)
    return [str(gpu.index), gpu.name, gpu.state, used, use, temperature, power, users_of(gpu)]


def users_of(gpu: GpuInfo) -> str:
    """Launches of ours and others' processes on a GPU."""
    ours = [
        claim["launch_id"] + (f" ({text.percent(claim['share'])})" if (claim.get("share") or 1) < 1 else "")
        for claim in gpu.claims
    ]
    others = [
        f"pid {user.pid or '?'} {user.name or ''}".rstrip() + (f" of {user.user}" if user.user else "")
        for user in gpu.others
    ]
    return ", ".join([*ours, *others]) or "-"


def version(*, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Show the version of this command and of the daemon."""
    with connect(url, key) as client:
        try:
            found, problem = client.version(), None
        except (ApiError, ClientError) as exc:
            found, problem = None, str(exc)
        where = client.target.url
    if as_json:
        output.emit({"client": __version__, "url": where, "daemon": found and found.model_dump(mode="json")})
        return
    output.say(f"vllm-bootstrap {__version__}")
    if found is None:
        output.note(str(problem))
        return
    build = f"build {found.build_sha}, {found.build_time}, data plane {found.data_plane}"
    output.say(f"daemon {found.version} at {where} ({build})")


def register(app: typer.Typer) -> None:
    for command in (logs, gpus, version):
        app.command()(command)
