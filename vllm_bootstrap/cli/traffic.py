"""Commands about inference requests: ``requests``, ``requests cancel``, ``activity``, ``usage``."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, cast

import typer

from vllm_bootstrap.cli import output, text
from vllm_bootstrap.cli.options import AsJson, Failure, Key, Url, UsageError, connect
from vllm_bootstrap.client import Client
from vllm_bootstrap.errors import NotFound
from vllm_bootstrap.sdk.calls import ActivityFilter, RequestFilter
from vllm_bootstrap.wire import Listing
from vllm_bootstrap.wire_requests import ActivityEntry, CancelResult, RequestEntry

FOLLOW_POLL_S = 1.0
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Only for this model.")]
Class = Annotated[str | None, typer.Option("--class", metavar="CLASS", help="Only realtime or only batch.")]
Owner = Annotated[str | None, typer.Option("--owner", metavar="NAME", help="Only of the key of this name.")]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=1, max=1000, help="At most so many.")]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="TIME", help="A local time (2026-01-31T12:00) or how long ago (90s, 2h)."),
]

requests_app = typer.Typer(help="Show inference requests under way, or cancel one.", invoke_without_command=True)


@requests_app.callback()
def requests(
    context: typer.Context,
    *,
    state: Annotated[
        str | None, typer.Option("--state", metavar="STATE", help="Only reading, queued or running.")
    ] = None,
    cls: Class = None,
    model: Model = None,
    owner: Owner = None,
    limit: Limit = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Look again every second, until Ctrl-C.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show inference requests under way, or cancel one."""
    if context.invoked_subcommand is not None:
        return
    wanted = _given(state=state, request_class=cls, model=model, owner=owner, limit=limit)
    with connect(url, key) as client:
        if follow:
            _follow(client, cast("RequestFilter", wanted), as_json=as_json)
            return
        found = client.requests(**cast("RequestFilter", wanted))
    if as_json:
        output.emit(found)
    elif not found.data and output.on_terminal():
        output.say("No request is under way.")
    else:
        output.table(HEADER, [_row(entry) for entry in found.data], state_column=1, spare=SPARE)
        _more(found, limit)


HEADER = ["ID", "STATE", "CLASS", "OWNER", "MODEL", "AGE", "WAITED", "TOKENS", "LAUNCH"]
SPARE = ("LAUNCH", "WAITED", "MODEL", "CLASS")


def _row(entry: RequestEntry) -> list[str]:
    return [
        entry.id,
        entry.state,
        entry.request_class or "-",
        entry.owner,
        entry.model or "-",
        text.duration(entry.age_s),
        text.short(entry.queue_ms),
        str(entry.tokens) if entry.stream else "-",
        entry.launch_id or "-",
    ]


def _follow(client: Client, wanted: RequestFilter, *, as_json: bool) -> None:
    """On a terminal a table that is drawn anew; in a pipe a line for every request that comes, moves on or ends."""
    try:
        if as_json:
            while True:
                output.emit(client.requests(**wanted), in_one_line=True)
                time.sleep(FOLLOW_POLL_S)
        if not output.on_terminal():
            known: dict[str, RequestEntry] = {}
            while True:
                known = _told_changes(known, client.requests(**wanted).data)
                time.sleep(FOLLOW_POLL_S)
        with output.redrawn(HEADER, state_column=1, spare=SPARE) as draw:
            while True:
                draw([_row(entry) for entry in client.requests(**wanted).data])
                time.sleep(FOLLOW_POLL_S)
    except KeyboardInterrupt:
        return


def _told_changes(known: dict[str, RequestEntry], now: Sequence[RequestEntry]) -> dict[str, RequestEntry]:
    """Say what is different from before. Returns what there is now, by id."""
    current = {entry.id: entry for entry in now}
    for gone in known.keys() - current.keys():
        output.say(f"{gone}  over")
    for entry in now:
        if entry.id not in known or known[entry.id].state != entry.state:
            output.say("  ".join(_row(entry)))
    return current


@requests_app.command()
def cancel(
    request_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Which requests.")],
    *,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """End requests under way: your own, or with the scope admin anybody's."""
    done: list[CancelResult] = []
    missing: list[str] = []
    with connect(url, key) as client:
        for request_id in dict.fromkeys(request_ids):
            try:
                done.append(client.cancel_request(request_id))
            except NotFound:
                missing.append(request_id)
    if as_json:
        output.emit({"object": "list", "data": [result.model_dump(mode="json") for result in done]})
    else:
        for result in done:
            output.say(f"{result.id}  cancelled (was {result.state})")
    if missing:
        raise Failure(f"Not under way, or not yours to cancel: {', '.join(missing)}.")


def activity(
    *,
    model: Model = None,
    cls: Class = None,
    owner: Owner = None,
    status: Annotated[
        str | None, typer.Option("--status", metavar="STATUS", help="Only with this status: 429, or 5xx.")
    ] = None,
    since: Since = None,
    limit: Limit = 20,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show finished inference requests, newest first."""
    wanted = _given(
        model=model, request_class=cls, owner=owner, status=status, since=moment(since), limit=limit
    )  # fmt: skip
    with connect(url, key) as client:
        found = client.activity(**cast("ActivityFilter", wanted))
    if as_json:
        output.emit(found)
        return
    header = ["TIME", "STATUS", "CLASS", "OWNER", "MODEL", "WAITED", "TTFT", "TOOK", "IN", "OUT", "TOKENS/S", "ID"]
    spare = ("ID", "TOKENS/S", "WAITED", "CLASS", "IN", "OWNER")
    output.table(header, [_finished(entry) for entry in found.data], spare=spare)
    _more(found, limit)


def _finished(entry: ActivityEntry) -> list[str]:
    speed = text.tokens_per_second(entry.completion_tokens, entry.duration_ms, entry.ttft_ms or entry.queue_ms)
    return [
        f"{entry.started_at:%Y-%m-%d %H:%M:%S}Z",
        f"{entry.status} {entry.code or ''}".rstrip(),
        entry.request_class or "-",
        entry.owner,
        entry.model or "-",
        text.short(entry.queue_ms),
        "-" if entry.ttft_ms is None else text.short(entry.ttft_ms),
        text.short(entry.duration_ms),
        _number(entry.prompt_tokens),
        _number(entry.completion_tokens),
        "-" if speed is None else f"{speed:.0f}",
        entry.request_id,
    ]


def usage(*, since: Since = None, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Show requests and tokens by key, class and model."""
    with connect(url, key) as client:
        found = client.usage(moment(since))
    if as_json:
        output.emit(found)
        return
    rows = [
        [
            entry.owner, entry.request_class or "-", entry.model or "-", str(entry.requests), str(entry.failed),
            str(entry.prompt_tokens), str(entry.completion_tokens),
        ]
        for entry in found.data
    ]  # fmt: skip
    header = ["OWNER", "CLASS", "MODEL", "REQUESTS", "FAILED", "TOKENS IN", "TOKENS OUT"]
    output.table(header, rows)
    if found.complete_since is not None:
        output.note(f"The history goes back to {found.complete_since:%Y-%m-%d %H:%M:%S}Z.")


def moment(written: str | None) -> datetime | None:
    """A time, or how long ago it was. Without a zone it is local time. Raises ``UsageError``."""
    if written is None:
        return None
    ago = re.fullmatch(r"(\d{1,9})([smhd])", written)
    if ago is not None:
        return datetime.now(UTC) - timedelta(seconds=int(ago[1]) * _SECONDS[ago[2]])
    try:
        return datetime.fromisoformat(written)
    except ValueError:
        raise UsageError(f"--since {written!r}: write it as 2026-01-31T12:00 or as 90s, 15m, 2h, 7d") from None


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _number(count: int | None) -> str:
    return "-" if count is None else str(count)


def _more(found: Listing[Any], limit: int) -> None:
    if found.has_more:
        output.note(f"There are more: --limit {min(1000, limit * 2)}")


def register(app: typer.Typer) -> None:
    app.add_typer(requests_app, name="requests")
    for command in (activity, usage):
        app.command()(command)
