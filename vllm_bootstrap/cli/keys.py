"""``keys``: make, list and check keys, and print the one that a daemon made for itself. Works on files only.

Invariant: no token of a key file is ever printed; a new one once, when it is made.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_bootstrap.auth import keyfile, scopes
from vllm_bootstrap.auth.keyfile import Entry, KeyFileError
from vllm_bootstrap.cli import output
from vllm_bootstrap.cli.options import AsJson, Failure, UsageError
from vllm_bootstrap.instance import ACCESS_KEY_FILE
from vllm_bootstrap.places import default_state_dir

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make, list and check keys.")
SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}
SHARED = {"VLLM_ACCESS_KEY": "one shared key, all scopes", "ORCHESTRATOR_TOKEN": "one shared key, all scopes"}
KeyFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="The key file. Default: AUTH_KEYS_FILE.", dir_okay=False)
]
RequestsPerMinute = Annotated[
    int | None, typer.Option("--requests-per-minute", metavar="N", help="Requests in any 60 seconds.")
]
TokensPerMinute = Annotated[
    int | None, typer.Option("--tokens-per-minute", metavar="N", help="Tokens in any 60 seconds.")
]
MaxParallel = Annotated[
    int | None, typer.Option("--max-parallel", metavar="N", help="Requests queued or running at once.")
]
MaxSequences = Annotated[
    int | None, typer.Option("--max-sequences", metavar="N", help="Prompts times n of one request.")
]
MaxEnqueuedTokens = Annotated[
    int | None, typer.Option("--max-enqueued-tokens", metavar="N", help="Tokens of batch requests under way.")
]

ColdStartHold = Annotated[
    float | None, typer.Option("--cold-start-hold", metavar="SECONDS", help="Wait for a model that is loaded first.")
]


@app.command()
def new(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Who it is for: owner of what it makes.")] = None,
    *,
    scope: Annotated[
        list[str] | None, typer.Option("--scope", metavar="SCOPE", help=f"{', '.join(sorted(scopes.ALL))}; repeatable.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option("--model", metavar="GLOB", help="Only these models.")] = None,
    max_class: Annotated[str | None, typer.Option("--max-class", metavar="CLASS", help="realtime or batch.")] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    max_parallel: MaxParallel = None,
    max_sequences: MaxSequences = None,
    max_enqueued_tokens: MaxEnqueuedTokens = None,
    cold_start_hold: ColdStartHold = None,
    expires_in: Annotated[str | None, typer.Option("--expires-in", metavar="TIME", help="As 12h, 30d or 8w.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Add it to this key file.", dir_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. Its token is shown once; the entry for the key file holds only a hash. Without NAME: only a token,
    for VLLM_ACCESS_KEY."""
    token = keyfile.new_token()
    if name is None:
        if scope or file:
            raise UsageError("A key with scopes needs a NAME.")
        output.emit({"token": token}) if as_json else output.say(token)
        return
    if not scope:
        raise UsageError("Say what the key may do: --scope, for example --scope realtime.")
    entry = _entry(
        name=name,
        token_sha256=keyfile.digest(token).hex(),
        scopes=scope,
        models=model or None,
        max_class=max_class,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_parallel=max_parallel,
        max_sequences=max_sequences,
        max_enqueued_tokens=max_enqueued_tokens,
        cold_start_hold_s=cold_start_hold,
        expires_at=None if expires_in is None else _expiry(expires_in),
    )
    notes = _notes_on(entry)
    if file is not None:
        add_to(file, entry)
    if as_json:
        output.emit({"token": token, "entry": entry, "file": None if file is None else str(file)})
        return
    _show_new(name, token, entry, file)
    for remark in notes:
        output.note(f"note: {remark}")


def _entry(**given: Any) -> dict[str, Any]:
    return {field: value for field, value in given.items() if value is not None}


def _notes_on(entry: dict[str, Any]) -> tuple[str, ...]:
    """What the operator should know of a new entry. Raises ``UsageError`` for one that a daemon would not take."""
    try:
        return keyfile.parse(json.dumps({"keys": [entry]}), allow_examples=True).notes
    except KeyFileError as exc:
        raise UsageError(str(exc).partition(": ")[2] or str(exc)) from None


def _show_new(name: str, token: str, entry: dict[str, Any], file: Path | None) -> None:
    if not output.on_terminal():
        output.say(token)
        return
    output.say(f"The token of {name!r}, shown only now:\n\n  {output.styled(token, 'bold')}\n")
    if file is not None:
        output.say(f"Added to {file}; a running daemon that uses this file takes it up by itself.")
    else:
        output.say(f"Its entry for the key file (AUTH_KEYS_FILE):\n\n{json.dumps(entry, indent=2)}")


def _expiry(text: str) -> str:
    number, unit = text[:-1], text[-1:]
    if not number.isdigit() or unit not in SECONDS or not int(number):
        raise UsageError(f"--expires-in {text!r}: write it as 12h, 30d or 8w")
    return (datetime.now(UTC) + timedelta(seconds=int(number) * SECONDS[unit])).isoformat(timespec="seconds")


def add_to(path: Path, entry: dict[str, Any]) -> None:
    """Add an entry to a key file, which is made when it does not exist. The file is replaced as a whole, so that a
    daemon never reads half of it; owner and mode stay. Raises ``Failure``."""
    try:
        keys: list[Any] = []
        before = path.stat() if path.exists() else None
        if before is not None:
            keyfile.read(path, allow_examples=True)
            keys = json.loads(path.read_bytes())["keys"]
        content = json.dumps({"keys": [*keys, entry]}, indent=2) + "\n"
        keyfile.parse(content, allow_examples=True)
        fresh = path.with_name(path.name + ".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(descriptor)
        if before is not None:
            fresh.chmod(before.st_mode & 0o7777)
            if hasattr(os, "chown") and (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(fresh, before.st_uid, before.st_gid)
        fresh.replace(path)
    except KeyFileError as exc:
        raise Failure(f"{exc}. Nothing was changed.") from None
    except OSError as exc:
        raise Failure(f"{path}: {exc.strerror}. Nothing was changed.") from None


@app.command("list")
def list_keys(file: KeyFile = None, *, as_json: AsJson = False) -> None:
    """List keys: names, scopes and limits, never tokens."""
    path = _path(file)
    entries = _read(path).entries if path is not None else ()
    generated = _generated_path()
    if as_json:
        shown = [entry.model_dump(mode="json", exclude={"token", "token_sha256"}) for entry in entries]
        output.emit({"object": "list", "data": shown, "generated": str(generated) if generated.exists() else None})
        return
    if entries:
        rows = [_row(entry) for entry in entries]
        output.table(["NAME", "SCOPES", "MODELS", "LIMITS", "EXPIRES", "STATE"], rows)
    for name, what in SHARED.items():
        if os.environ.get(name):
            output.note(f"{name} is set here ({what}).")
    if generated.exists():
        output.note(f"A daemon on this machine made a key for itself: {generated} ('vllm-bootstrap keys show').")
    if not entries:
        output.note("No key file." if path is None else f"{path} holds no keys.")


def _row(entry: Entry) -> list[str]:
    hold = entry.cold_start_hold_s
    limits = {
        "requests/min": entry.requests_per_minute,
        "tokens/min": entry.tokens_per_minute,
        "parallel": entry.max_parallel,
        "sequences": entry.max_sequences,
        "enqueued tokens": entry.max_enqueued_tokens,
        "s cold start": None if hold is None else f"{hold:g}",
        "class": entry.max_class,
    }
    told = ", ".join(f"{value} {name}" for name, value in limits.items() if value is not None)
    expires = "-" if entry.expires_at is None else f"{entry.expires_at.astimezone(UTC):%Y-%m-%d %H:%M}Z"
    expired = entry.expires_at is not None and entry.expires_at <= datetime.now(UTC)
    state = "disabled" if entry.disabled else "expired" if expired else "active"
    return [entry.name, ", ".join(entry.scopes), ", ".join(entry.models or ["all"]), told or "-", expires, state]


@app.command()
def check(file: KeyFile = None, *, as_json: AsJson = False) -> None:
    """Check a key file as the daemon would."""
    path = _path(file)
    if path is None:
        raise UsageError("Name the key file, or set AUTH_KEYS_FILE.")
    found = _read(path)
    notes = list(found.notes)
    digests = {entry.digest() for entry in found.entries}
    if digests & keyfile.EXAMPLE_DIGESTS:
        notes.append("it has example tokens, which everybody knows: the daemon refuses them on a public address")
    if as_json:
        output.emit({"file": str(path), "valid": True, "keys": len(found.entries), "notes": notes})
        return
    keys = len(found.entries)
    output.say(f"{path}: valid, {keys} key{'' if keys == 1 else 's'}")
    for remark in notes:
        output.note(f"note: {remark}")


@app.command()
def show(*, as_json: AsJson = False) -> None:
    """Print the key that the daemon of this user made for itself at its first start on a public address."""
    path = _generated_path()
    try:
        key = path.read_text(encoding="utf-8").strip()
    except OSError as exc:
        if isinstance(exc, PermissionError):
            raise Failure(f"{path} belongs to another user: run this as the daemon's user.") from None
        raise Failure(
            f"There is no {path}: a daemon makes a key only when it listens on a public address and none is configured."
        ) from None
    if as_json:
        output.emit({"key": key, "file": str(path)})
        return
    output.say(key)


def _generated_path() -> Path:
    chosen = os.environ.get("VLLM_BOOTSTRAP_STATE_DIR")
    return (Path(chosen) if chosen else default_state_dir()) / ACCESS_KEY_FILE


def _path(file: Path | None) -> Path | None:
    named = os.environ.get("VLLM_BOOTSTRAP_AUTH_KEYS_FILE") or os.environ.get("AUTH_KEYS_FILE")
    return file or (Path(named) if named else None)


def _read(path: Path) -> keyfile.KeyFile:
    try:
        return keyfile.read(path, allow_examples=True)[0]
    except KeyFileError as exc:
        raise Failure(str(exc)) from None
