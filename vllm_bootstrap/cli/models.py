"""Commands about the catalogue: ``models list``, ``pull``, ``check``, ``load``, ``unload``, ``prefetch``, ``add``,
``rm``, ``adapters``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from pydantic import BaseModel

from vllm_bootstrap.cli import model_progress, model_words, output, text
from vllm_bootstrap.cli.batch_progress import transferring
from vllm_bootstrap.cli.model_progress import Look
from vllm_bootstrap.cli.options import AsJson, Key, Url, UsageError, connect
from vllm_bootstrap.client import Client, EntryFields
from vllm_bootstrap.wire_models import ModelState, PrefetchInfo

T = TypeVar("T", bound=BaseModel)

app = typer.Typer(help="Models by name: what there is, fetching, loading, checking, removing.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A model: its name, an alias or an adapter of it.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Only begin; do not wait for the end.")]
Cancel = Annotated[bool, typer.Option("--cancel", help="Give up what is under way.")]


@app.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this model, in detail.")] = None,
    *,
    state: Annotated[
        str | None, typer.Option("--state", metavar="STATE", help="Only models in this state: loaded, unloaded, …")
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show the models of the catalogue and their states, or one in detail."""
    known: tuple[ModelState, ...] = get_args(ModelState)
    wanted = next((word for word in known if state in {word, word.replace("_", " ")}), None)
    if state is not None and wanted is None:
        raise UsageError(f"--state is one of {', '.join(known)}.")
    with connect(url, key) as client:
        if name is not None:
            found = client.models.get(name)
            output.emit(found) if as_json else model_words.show(found)
            return
        page = client.models.list(state=wanted)
    if as_json:
        output.emit(page)
        return
    if page.note:
        output.note(f"The catalogue's file was changed, but the change is not in force: {page.note}")
    if not page.data and output.on_terminal():
        output.say("There is no model in the catalogue." if state is None else f"No model is {state}.")
        return
    rows = [model_words.row(status) for status in page.data]
    output.table(model_words.HEADER, rows, state_column=1, spare=model_words.SPARE)
    if page.has_more:
        output.note("There are more models than are shown.")


@app.command()
def pull(
    name: Name, *, no_wait: NoWait = False, cancel: Cancel = False, url: Url = None, key: Key = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Fetch a model's weights to the daemon's disk, on from what is there.

    Ctrl-C leaves the download running; --cancel ends it. The exit code is 1 when it failed or was cancelled.
    """
    with connect(url, key) as client:
        if cancel:
            ended = client.models.cancel_download(name)
            output.emit(ended) if as_json else output.say(f"{name}  {ended.state}")
            return
        found = _followed(
            name,
            lambda told: client.models.pull(name, wait=not no_wait, on_progress=told),
            model_progress.of_download,
            quiet=as_json or no_wait,
            again=f"vllm-bootstrap models pull {name}",
        )
    if as_json:
        output.emit(found)
    elif no_wait:
        output.say(f"{name}  {found.state}")
    else:
        at = f" ({found.commit[:12]})" if found.commit else ""
        output.say(f"{name}  {output.styled('on the disk', 'green')}, {text.size(found.bytes_done)}{at}")


@app.command()
def load(
    name: Name, *, no_wait: NoWait = False, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:  # fmt: skip
    """Load a model, making room for it. Ctrl-C leaves it loading. The exit code is 1 when it cannot be loaded."""
    with connect(url, key) as client:
        found = _followed(
            name,
            lambda told: client.models.load(name, wait=not no_wait, on_progress=told),
            model_progress.of_load,
            quiet=as_json or no_wait,
            again=f"vllm-bootstrap models list {name}",
        )
    if as_json:
        output.emit(found)
    else:
        output.say(f"{found.name}  {output.styled(model_words.state_of(found), output.style_of(found.state))}")


@app.command()
def unload(
    name: Name,
    *,
    force: Annotated[bool, typer.Option("--force", help="At once; also a pinned one. Requests there fail.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Put a model away when what runs there has ended. It is loaded again when it is asked for."""
    with connect(url, key) as client:
        found = client.models.unload(name, force=force)
    output.emit(found) if as_json else output.say(f"{found.name}  {model_words.state_of(found)}")


@app.command()
def check(
    name: Name,
    *,
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", min=1, max=64, help="On so many GPUs.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", metavar="TOKENS", min=1, help="With this longest context.")
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether a model fits into the GPUs, and what would. The exit code is 1 when it does not."""
    with connect(url, key) as client:
        found = client.models.check(name, gpu_count=gpus, max_model_len=max_model_len)
    output.emit(found) if as_json else model_words.fit(name, found)
    if found.fits is False:
        raise typer.Exit(1)


@app.command()
def prefetch(
    name: Name, *, no_wait: NoWait = False, cancel: Cancel = False, url: Url = None, key: Key = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Read a model's files into the daemon machine's memory, so that it loads faster."""
    with connect(url, key) as client:
        if cancel:
            found: PrefetchInfo = client.models.cancel_prefetch(name)
        else:
            found = _followed(
                name,
                lambda told: client.models.prefetch(name, wait=not no_wait, on_progress=told),
                model_progress.of_prefetch,
                quiet=as_json or no_wait,
                again=f"vllm-bootstrap models prefetch {name}",
            )
    if as_json:
        output.emit(found)
        return
    took = f" in {text.duration(found.seconds)}" if found.state == "completed" else ""
    output.say(f"{name}  {model_progress.of_prefetch(found).doing}, {text.size(found.bytes_done)}{took}")


def _followed(
    name: str,
    do: Callable[[Callable[[T], object] | None], T],
    look_at: Callable[[T], Look],
    *,
    quiet: bool,
    again: str,
) -> T:
    """Do something that takes a while, and show how far it is."""
    try:
        if quiet:
            return do(None)
        with model_progress.shown(name, look_at) as told:
            return do(told)
    except KeyboardInterrupt:
        output.note(f"\nIt goes on. To look again: {again}")
        raise typer.Exit(1) from None


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What requests are to call it.")],
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="A Hugging Face repository, or a path. Default: NAME.")
    ] = None,
    *,
    entry: Annotated[
        Path | None,
        typer.Option("--entry", metavar="FILE",
                     help="An entry as JSON, with all that one may hold; - reads standard input."),
    ] = None,
    alias: Annotated[list[str] | None, typer.Option("--alias", metavar="NAME", help="Another name; repeatable")] = None,
    revision: Annotated[str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", min=1, max=64, help="On so many GPUs.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", metavar="TOKENS", min=1, help="Longest context.")
    ] = None,
    ttl: Annotated[
        str | None, typer.Option("--ttl", metavar="TIME", help="Unload it when unused for so long: 15m, 2h; 0: never.")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Never unload it to make room.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Add a model to the catalogue, until it is removed again. Nothing is fetched or loaded yet."""
    fields = _entry(entry) if entry is not None else {}
    said: dict[str, Any] = {"aliases": alias, "revision": revision, "ttl": ttl, "pin": pin or None}
    fields |= {field: value for field, value in said.items() if value is not None}
    if gpus is not None:
        fields["gpus"] = {**fields.get("gpus", {}), "count": gpus}
    if max_model_len is not None:
        fields["args"] = {**fields.get("args", {}), "max_model_len": max_model_len}
    wanted = source or fields.get("source") or name
    given: EntryFields = {k: v for k, v in fields.items() if k not in {"name", "source"}}  # type: ignore[assignment]
    with connect(url, key) as client:
        made = client.models.add(name, wanted, **given)
    if as_json:
        output.emit(made)
    elif output.on_terminal():
        output.say(f"{made.name} can be asked for by its name now; the first request loads it.")
        output.say(f"  vllm-bootstrap models pull {made.name}")
    else:
        output.say(made.name)


def _entry(path: Path) -> dict[str, Any]:
    """The entry in a file. Raises ``UsageError``."""
    try:
        found: Any = json.loads(sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"{path} cannot be read: {exc.strerror or exc}.") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a JSON object.")
    for part in ("gpus", "args"):
        if not isinstance(found.get(part, {}), dict):
            raise UsageError(f"{path}: {part!r} is to be an object.")
    return found


@app.command()
def rm(
    name: Name,
    *,
    files: Annotated[
        bool, typer.Option("--files", help="Delete its files on the daemon's disk instead; the entry stays.")
    ] = False,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Remove a model that was added to the catalogue, or with --files its weights from the daemon's disk."""
    with connect(url, key) as client:
        if files:
            freed = client.models.delete_files(name)
            output.emit(freed) if as_json else output.say(f"{freed.model}  {text.size(freed.bytes)} freed")
        else:
            gone = client.models.remove(name)
            output.emit(gone) if as_json else output.say(f"{gone.name}  removed")


@app.command()
def adapters(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model they are made for.")],
    *,
    upload: Annotated[
        Path | None,
        typer.Option("--add", metavar="ARCHIVE", exists=True, dir_okay=False, readable=True,
                     help="Bring one: a tar, tar.gz or zip of adapter_config.json and safetensors."),
    ] = None,
    called: Annotated[
        str | None, typer.Option("--as", metavar="ADAPTER", help="With --add: its name. Default: the file's.")
    ] = None,
    remove: Annotated[str | None, typer.Option("--rm", metavar="ADAPTER", help="Delete this one.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Show the LoRA adapters that were uploaded for a model, bring one, or delete one."""
    if upload is not None and remove is not None:
        raise UsageError("Give either --add or --rm.")
    if called is not None and upload is None:
        raise UsageError("--as goes with --add.")
    with connect(url, key) as client:
        if upload is not None:
            _bring(client, name, upload, called, as_json=as_json)
            return
        if remove is not None:
            gone = client.models.delete_adapter(name, remove)
            output.emit(gone) if as_json else output.say(f"{gone.name}  deleted")
            return
        page = client.models.adapters(name)
    if as_json:
        output.emit(page)
    elif page.data or not output.on_terminal():
        output.table(model_words.ADAPTER_HEADER, [model_words.adapter_row(one) for one in page.data])
    else:
        output.say(f"No adapter was uploaded for {name}.")


def _bring(client: Client, base: str, path: Path, called: str | None, *, as_json: bool) -> None:
    with transferring(f"uploading {path.name}") as on_progress:
        made = client.models.upload_adapter(base, path, name=called, on_progress=None if as_json else on_progress)
    if as_json:
        output.emit(made)
    else:
        output.say(f"{made.name}  can be asked for as a model")
