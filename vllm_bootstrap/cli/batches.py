"""Commands about batches: ``batch submit``, ``status``, ``results``, ``cancel``, ``pause``, ``resume``, ``retry``,
``priority``."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_bootstrap.cli import batch_progress, output, text
from vllm_bootstrap.cli.options import AsJson, Failure, Key, Url, UsageError, connect
from vllm_bootstrap.client import BatchFields, Client, WebhookTo
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.sdk.batch_calls import Change
from vllm_bootstrap.wire_batches import BatchObject

FIRST_LINE_BYTES = 16 * 1024 * 1024
WHOLE_ID = 20  # characters after "batch_" from which an id is taken for a whole one

app = typer.Typer(help="Run a file of requests durably: hand it in, watch it, fetch the answers.", no_args_is_help=True)
BatchId = Annotated[str, typer.Argument(metavar="ID", help="A batch: its id, or the beginning or end of it.")]
InputFile = Annotated[
    Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True, help="A request on each line.")
]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint", metavar="PATH", help="Default: the 'url' of the file's first line.")
]
Window = Annotated[str, typer.Option("--window", metavar="TIME", help="How long it may take: 90m, 24h, 7d.")]
PriorityOption = Annotated[
    int, typer.Option("--priority", metavar="N", min=-100, max=100, help="From -100 to 100; higher goes first.")
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="NAME=VALUE", help="Kept with the batch; repeatable. launch_id=ID sends all "
                 "lines to that launch."),
]  # fmt: skip
WebhookUrl = Annotated[str | None, typer.Option("--webhook", metavar="URL", help="Tell this address of its end.")]
WebhookSecret = Annotated[
    str | None,
    typer.Option("--webhook-secret", metavar="SECRET", envvar="VLLM_BOOTSTRAP_WEBHOOK_SECRET", show_envvar=False,
                 help="Signs what is sent; else the daemon's does. Better set VLLM_BOOTSTRAP_WEBHOOK_SECRET."),
]  # fmt: skip
Wait = Annotated[
    bool,
    typer.Option("--wait", help="Wait until it has ended, showing how far it is. Exit code 1 when it did not complete "
                 "or a line failed. Ctrl-C leaves it running."),
]  # fmt: skip


@app.command()
def submit(
    file: InputFile,
    *,
    endpoint: Endpoint = None,
    window: Window = "24h",
    priority: PriorityOption = 0,
    metadata: Metadata = None,
    webhook: WebhookUrl = None,
    webhook_secret: WebhookSecret = None,
    wait: Wait = False,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Upload a file of requests and run it as a batch.

    With --wait the exit code is 1 when the batch did not complete or any of its lines failed.
    """
    path = endpoint or endpoint_of(file)
    fields: BatchFields = {"completion_window": window, "priority": priority}
    if metadata:
        fields["metadata"] = dict(as_pair(item) for item in metadata)
    if webhook is not None:
        fields["webhook"] = WebhookTo(webhook, webhook_secret)
    with connect(url, key) as client:
        with batch_progress.transferring(f"uploading {file.name}") as on_progress:
            stored = client.files.upload(file, on_progress=None if as_json else on_progress)
        try:
            made = client.batches.create(stored.id, path, **fields)
        except ApiError:
            with contextlib.suppress(ApiError):  # nobody would know of it; a batch, should there be one, has its own
                client.files.delete(stored.id)
            raise
        if wait:
            _wait(client, made, as_json=as_json)
        elif as_json:
            output.emit(made)
        elif output.on_terminal():
            output.say(f"Batch {made.id} over {path}")
            output.say(f"  vllm-bootstrap batch status {made.id}")
        else:
            output.say(made.id)


def endpoint_of(file: Path) -> str:
    """The route that the file's first line asks for. Raises ``UsageError`` when that cannot be told."""
    with file.open("rb") as opened:
        line = b""
        while not line.strip() and (line := opened.readline(FIRST_LINE_BYTES)):
            pass
    try:
        wanted: Any = json.loads(line.decode("utf-8-sig"))["url"]
    except (ValueError, KeyError, TypeError, RecursionError):
        wanted = None
    if not line.strip():
        raise UsageError(f"{file} is empty: each line is to hold a request.")
    if not isinstance(wanted, str) or not wanted.startswith("/"):
        raise UsageError(f"The first line of {file} names no 'url': say the route with --endpoint.")
    return wanted


def as_pair(written: str) -> tuple[str, str]:
    """``NAME=VALUE``. Raises ``UsageError``."""
    name, equals, value = written.partition("=")
    if not name or not equals:
        raise UsageError(f"--metadata {written!r}: write it as NAME=VALUE")
    return name, value


def _wait(client: Client, made: BatchObject, *, as_json: bool) -> None:
    try:
        if as_json:
            ended = client.batches.wait(made.id)
        else:
            if output.on_terminal():
                output.say(f"Batch {made.id} over {made.endpoint}")
            with batch_progress.shown() as on_progress:
                ended = client.batches.wait(made.id, on_progress=on_progress)
    except KeyboardInterrupt:
        output.note(f"\nThe batch goes on. To look again: vllm-bootstrap batch status {made.id}")
        raise typer.Exit(1) from None
    if as_json:
        output.emit(ended)
    else:
        _tell_end(ended)
    if not batch_progress.went_well(ended):
        raise typer.Exit(1)


def _tell_end(ended: BatchObject) -> None:
    prefix = "" if output.on_terminal() else f"{ended.id}  "
    style = "green" if batch_progress.went_well(ended) else "red"
    took = text.duration(max(0, _ended_at(ended) - ended.created_at))
    lines = batch_progress.lines_of(ended)
    output.say(f"{prefix}{output.styled(ended.status, style)} after {took}{': ' if lines else ''}{lines}")
    _tell_refusal(ended)
    if ended.output_file_id is not None:
        output.note(f"Answers: vllm-bootstrap batch results {ended.id} -o answers.jsonl")
    if ended.error_file_id is not None:
        output.note(f"Errors:  vllm-bootstrap batch results {ended.id} --errors")


def _tell_refusal(batch: BatchObject) -> None:
    for entry in batch.errors.data if batch.errors is not None else ():
        where = f"line {entry.line}: " if entry.line is not None else ""
        output.note(f"  {where}{entry.message}")


def _ended_at(batch: BatchObject) -> int:
    times = (batch.completed_at, batch.failed_at, batch.expired_at, batch.cancelled_at)
    return max((at for at in times if at is not None), default=batch.created_at)


@app.command()
def status(
    batch_id: Annotated[str | None, typer.Argument(metavar="ID", help="Only this batch, in detail.")] = None,
    *,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=100, help="At most so many.")] = 20,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show batches, newest first, or one in detail."""
    with connect(url, key) as client:
        if batch_id is not None:
            found = client.batches.get(resolve(client, batch_id))
            output.emit(found) if as_json else _show(found)
            return
        page = client.batches.list(limit=limit)
    if as_json:
        output.emit(page)
        return
    if not page.data and output.on_terminal():
        output.say("There is no batch.")
        return
    header = ["ID", "STATUS", "LINES", "PROGRESS", "PRIORITY", "OWNER", "MODEL", "AGE"]
    output.table(header, [_row(batch) for batch in page.data], state_column=1, spare=("OWNER", "MODEL", "PRIORITY"))
    if page.has_more:
        output.note(f"There are more: --limit {min(100, limit * 2)}")


def _row(batch: BatchObject) -> list[str]:
    return [
        batch.id,
        batch_progress.state_of(batch),
        batch_progress.lines_of(batch) or "-",
        batch_progress.pace_of(batch) or "-",
        str(batch.priority),
        batch.owner,
        batch.model or (f"{len(batch.models)} models" if batch.models else "-"),
        text.age(datetime.fromtimestamp(batch.created_at, UTC)),
    ]


def _show(batch: BatchObject) -> None:
    state = batch_progress.state_of(batch)
    output.say(f"{output.styled(batch.id, 'bold')}  {output.styled(state, output.style_of(batch.status))}")
    usage = batch.usage
    output.pairs([
        ("lines", batch_progress.lines_of(batch)),
        ("progress", batch_progress.pace_of(batch)),
        ("in flight", str(batch.progress.in_flight or "")),
        ("tried again", str(batch.progress.retried or "")),
        ("endpoint", batch.endpoint),
        ("models", ", ".join(f"{name} ({count})" for name, count in batch.models.items())),
        ("owner", batch.owner),
        ("priority", str(batch.priority)),
        ("window", f"{batch.completion_window}, until {_moment(batch.expires_at)}"),
        ("created", _moment(batch.created_at)),
        ("ended", _moment(_ended_at(batch)) if batch_progress.is_over(batch) else ""),
        ("tokens", f"{usage.input_tokens} in, {usage.output_tokens} out" if usage is not None else ""),
        ("metadata", ", ".join(f"{name}={value}" for name, value in (batch.metadata or {}).items())),
        ("input", batch.input_file_id),
        ("output", batch.output_file_id or ""),
        ("errors", batch.error_file_id or ""),
    ])  # fmt: skip
    _tell_refusal(batch)


def _moment(at: int | None) -> str:
    return "" if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}Z"


@app.command()
def results(
    batch_id: BatchId,
    *,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="Default: standard output.")
    ] = None,
    errors: Annotated[bool, typer.Option("--errors", help="The lines that failed, instead of the answers.")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="What there is so far, while the batch runs.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the answers of a batch, a JSON object on each line. A download that is cut goes on where it was."""
    with connect(url, key) as client:
        batch = client.batches.get(resolve(client, batch_id))
        if not batch_progress.is_over(batch) and not partial:
            raise Failure(f"{batch.id} is {batch_progress.summary_of(batch)}. What there is so far: --partial")
        if out is None:
            _print(_pieces(client, batch, errors=errors, on_progress=None))
        else:
            count = _store(client, batch, out, errors=errors, quiet=as_json)
            if as_json:
                output.emit({"batch_id": batch.id, "file": str(out), "bytes": count})
    if not errors and batch.request_counts.failed and not as_json:
        output.note(f"{batch.request_counts.failed} lines failed: vllm-bootstrap batch results {batch.id} --errors")


def _pieces(client: Client, batch: BatchObject, *, errors: bool, on_progress: Any) -> Generator[bytes]:
    """The file where there is one, else what there is of it; of an ended batch without one there is nothing."""
    file_id = batch.error_file_id if errors else batch.output_file_id
    if not batch_progress.is_over(batch):
        yield from client.batches.errors(batch.id) if errors else client.batches.output(batch.id)
    elif file_id is not None:
        yield from client.files.content(file_id, on_progress=on_progress)


def _store(client: Client, batch: BatchObject, out: Path, *, errors: bool, quiet: bool) -> int:
    """Write a file that is there only when it is whole. Returns its size."""
    coming = out.with_name(f"{out.name}.part")
    try:
        with coming.open("wb") as sink, batch_progress.transferring(out.name) as on_progress:
            for piece in _pieces(client, batch, errors=errors, on_progress=None if quiet else on_progress):
                sink.write(piece)
            count = sink.tell()
        coming.replace(out)
    except OSError as exc:
        raise Failure(f"{out} cannot be written: {exc.strerror or exc}.") from None
    return count


def _print(pieces: Generator[bytes]) -> None:
    sink = getattr(sys.stdout, "buffer", None)
    if sink is None or output.on_terminal():
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for piece in pieces:
            output.raw(decoder.decode(piece))
        return
    for piece in pieces:
        sink.write(piece)
    sink.flush()


def _changed(batch_id: str, what: Change, url: str | None, key: str | None, *, as_json: bool) -> None:
    with connect(url, key) as client:
        wanted = resolve(client, batch_id)
        found = {
            "cancel": client.batches.cancel,
            "pause": client.batches.pause,
            "resume": client.batches.resume,
            "retry": client.batches.retry,
        }[what](wanted)
    _tell(found, as_json=as_json)


def _tell(batch: BatchObject, *, as_json: bool) -> None:
    if as_json:
        output.emit(batch)
    else:
        output.say(f"{batch.id}  {batch_progress.summary_of(batch)}")


@app.command()
def cancel(batch_id: BatchId, *, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """End a batch. What is finished stays in its output."""
    _changed(batch_id, "cancel", url, key, as_json=as_json)


@app.command()
def pause(batch_id: BatchId, *, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Begin nothing new of a batch; what runs ends. Its time goes on."""
    _changed(batch_id, "pause", url, key, as_json=as_json)


@app.command()
def resume(batch_id: BatchId, *, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Go on with a paused batch."""
    _changed(batch_id, "resume", url, key, as_json=as_json)


@app.command()
def retry(batch_id: BatchId, *, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Run the failed lines of an ended batch again."""
    _changed(batch_id, "retry", url, key, as_json=as_json)


# A negative number is a priority here, not an option.
@app.command(context_settings={"ignore_unknown_options": True})
def priority(
    batch_id: BatchId,
    number: Annotated[int, typer.Argument(metavar="N", min=-100, max=100, help="From -100 to 100; higher goes first.")],
    *,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let a batch go before others, or after them."""
    with connect(url, key) as client:
        found = client.batches.set_priority(resolve(client, batch_id), number)
    if as_json:
        output.emit(found)
    else:
        output.say(f"{found.id}  priority {found.priority}")


def resolve(client: Client, name: str) -> str:
    """The id of the batch that ``name`` is the beginning or the end of. Raises ``Failure``, ``UsageError``."""
    if name.startswith("batch_") and len(name) >= len("batch_") + WHOLE_ID:
        return name
    ids = [batch.id for batch in client.batches.list(limit=100).data]
    found = [known for known in ids if len(name) >= 3 and (known.startswith(name) or known.endswith(name))]
    if not found:
        raise Failure(f"No batch is called {name!r}. 'vllm-bootstrap batch status' lists them.")
    if len(found) > 1:
        raise UsageError(f"{name!r} may mean several batches ({', '.join(found[:5])}): give more of the id.")
    return found[0]
