"""The key file: JSON in, checked entries out.

Invariant: no token ever stands in a message, only the entry's number and name. A field that is not known is refused at
load, never accepted and ignored. Functions here block on local files and know nothing of requests.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vllm_bootstrap import strictjson
from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.types import Principal

MAX_TOKEN_BYTES = 4096
SHORT_TOKEN = 16
EXAMPLE_DIGESTS = frozenset(hashlib.sha256(f"example-{name}-token".encode()).digest() for name in scopes.ALL)
RESERVED_NAMES = frozenset({"local", "VLLM_ACCESS_KEY", "ORCHESTRATOR_TOKEN", "generated"})

Positive = Annotated[int, Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(ge=0, le=86_400, strict=True, allow_inf_nan=False)]
Token = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TOKEN_BYTES // 4)]


class KeyFileError(Exception):
    """The key file cannot be used. The message names file and entry and says what to change; it holds no token."""


class Entry(BaseModel):
    """One key as written. ``expires_at`` is RFC 3339 with an offset, or unix seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
    token: Token | None = Field(None, repr=False)
    token_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")] | None = Field(None, repr=False)
    scopes: list[str] = Field(min_length=1)
    models: list[Annotated[str, StringConstraints(min_length=1)]] | None = Field(None, min_length=1)
    max_class: Literal["realtime", "batch"] | None = None
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_parallel: Positive | None = None
    max_sequences: Positive | None = None
    max_enqueued_tokens: Positive | None = None
    cold_start_hold_s: Seconds | None = None
    expires_at: AwareDatetime | None = None
    disabled: bool = False

    def digest(self) -> bytes:
        return digest(self.token) if self.token is not None else bytes.fromhex(self.token_sha256 or "")

    def principal(self) -> Principal:
        return Principal(
            name=self.name,
            scopes=frozenset(self.scopes),
            models=None if self.models is None else tuple(self.models),
            max_class=self.max_class,
            requests_per_minute=self.requests_per_minute,
            max_parallel=self.max_parallel,
            max_sequences=self.max_sequences,
            tokens_per_minute=self.tokens_per_minute,
            max_enqueued_tokens=self.max_enqueued_tokens,
            cold_start_hold_s=self.cold_start_hold_s,
            expires_at=None if self.expires_at is None else self.expires_at.timestamp(),
        )


@dataclass(frozen=True, slots=True)
class KeyFile:
    """Checked entries, and remarks for the operator that are no errors."""

    entries: tuple[Entry, ...]
    notes: tuple[str, ...]


def digest(token: str | bytes) -> bytes:
    """What is kept of a token: its SHA-256."""
    return hashlib.sha256(token if isinstance(token, bytes) else token.encode()).digest()


def new_token() -> str:
    """A fresh random token: 256 bits, URL-safe."""
    return "vb-" + secrets.token_urlsafe(32)


def token_problem(token: str) -> str | None:
    """Why ``token`` cannot be used as a key, or None. A key must survive being a header value unchanged."""
    if not token or not token.isprintable() or any(char.isspace() for char in token):
        return "a token is printable characters without spaces"
    return f"a token has at most {MAX_TOKEN_BYTES} bytes" if len(token.encode()) > MAX_TOKEN_BYTES else None


def parse(text: str | bytes, *, allow_examples: bool) -> KeyFile:
    """Check the content of a key file. ``allow_examples``: the tokens of config/example.keys.json, which everybody
    knows, may be used (loopback binds only). Raises ``KeyFileError``."""
    try:
        raw = strictjson.loads(text)
    except json.JSONDecodeError as exc:
        raise KeyFileError(f"not valid JSON: {exc.msg} at line {exc.lineno}") from None
    if not isinstance(raw, dict) or set(raw) != {"keys"} or not isinstance(raw["keys"], list):
        raise KeyFileError('the file must be {"keys": [ ... ]} and nothing else')
    entries = tuple(_entry(number, item) for number, item in enumerate(raw["keys"]))
    _check_unique(entries)
    if not allow_examples:
        _check_no_examples(entries)
    return KeyFile(entries, tuple(note for entry in entries for note in _notes(entry)))


def _entry(number: int, item: Any) -> Entry:
    where = f"keys[{number}]"
    if not isinstance(item, dict):
        raise KeyFileError(f"{where} must be an object")
    if isinstance(item.get("name"), str):
        where += f" ({item['name'][:64]!r})"
    try:
        entry = Entry.model_validate(item)
    except ValidationError as exc:
        first = exc.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
        raise KeyFileError(f"{where}: {field}: {reason}") from None
    problem = _entry_problem(entry)
    if problem:
        raise KeyFileError(f"{where}: {problem}")
    return entry


def _entry_problem(entry: Entry) -> str | None:
    if (entry.token is None) == (entry.token_sha256 is None):
        return "give either 'token' or 'token_sha256'"
    if entry.name in RESERVED_NAMES:
        return "this name belongs to the daemon's own keys: choose another"
    unknown = sorted(set(entry.scopes) - scopes.ALL)
    if unknown:
        return f"unknown scope {unknown[0]!r}; known: {', '.join(sorted(scopes.ALL))}"
    return None if entry.token is None else token_problem(entry.token)


def _check_unique(entries: tuple[Entry, ...]) -> None:
    names: set[str] = set()
    digests: dict[bytes, str] = {}
    for entry in entries:
        if entry.name in names:
            raise KeyFileError(f"the name {entry.name!r} is there twice")
        names.add(entry.name)
        other = digests.setdefault(entry.digest(), entry.name)
        if other != entry.name:
            raise KeyFileError(f"{other!r} and {entry.name!r} have the same token")


def _check_no_examples(entries: tuple[Entry, ...]) -> None:
    for entry in entries:
        if entry.digest() in EXAMPLE_DIGESTS:
            raise KeyFileError(
                f"{entry.name!r} has an example token, which everybody knows: it is refused on an address that "
                "others can reach. Make one with 'vllm-bootstrap keys new'"
            )


def _notes(entry: Entry) -> list[str]:
    found = [
        f"key {entry.name!r}: the scope {name!r} is not built yet and grants nothing"
        for name in sorted(set(entry.scopes))
        if not scopes.SCOPES[name].built
    ]
    if entry.token is not None and len(entry.token) < SHORT_TOKEN:
        found.append(f"key {entry.name!r}: the token is shorter than {SHORT_TOKEN} characters and can be guessed")
    return found


def read(path: Path, *, allow_examples: bool) -> tuple[KeyFile, os.stat_result]:
    """Read and check ``path``; also the facts of the file that was read, taken before its content, so that a later
    change is always seen. Blocks. Raises ``KeyFileError``."""
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read()
    except OSError as exc:
        raise KeyFileError(f"{path}: {exc.strerror or exc}") from None
    try:
        parsed = parse(content, allow_examples=allow_examples)
    except KeyFileError as exc:
        raise KeyFileError(f"{path}: {exc}") from None
    if facts.st_mode & 0o004 and any(entry.token is not None for entry in parsed.entries):
        note = f"{path} holds tokens and everybody on this machine can read it: chmod 600, or use token_sha256"
        parsed = KeyFile(parsed.entries, (*parsed.notes, note))
    return parsed, facts
