"""The operator's engines file: JSON that defines engines of kind ``command`` and ``external``. Checked whole at start.

Invariant: a file with any mistake defines nothing; the message names the engine and the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_bootstrap import strictjson
from vllm_bootstrap.auth.scopes import SCOPES
from vllm_bootstrap.engines import environment, routes, template
from vllm_bootstrap.engines.command import ARGV_NAMES, ENV_NAMES, SECRET, CommandDefinition
from vllm_bootstrap.engines.external import ExternalDefinition
from vllm_bootstrap.serving import Endpoint, EngineRoute

Definition = CommandDefinition | ExternalDefinition

MAX_FILE_BYTES = 1024 * 1024
MAX_SLOTS = 65_536
MAX_KEEP_ALIVE_S = 3600
RESERVED = frozenset({"vllm", "simulator"})
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"/[A-Za-z0-9_./*-]*")
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"})

_COMMON = frozenset({"kind", "slots", "health", "routes", "has_metrics", "keep_alive_s"})
_COMMAND = _COMMON | {"argv", "env", "env_allowed"}
_EXTERNAL = _COMMON | {
    "url", "uds", "credential_env", "credential_file", "served_names", "priority", "allows_http_media",
}  # fmt: skip


class EnginesFileError(ValueError):
    """The engines file cannot be used; the message is for the operator."""


def read_engines_file(path: Path) -> dict[str, Definition]:
    """Name to definition. Blocking. Raises ``EnginesFileError``."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise EnginesFileError(f"The engines file {path} cannot be read: {exc.strerror}.") from None
    try:
        if len(data) > MAX_FILE_BYTES:
            raise EnginesFileError(f"it is larger than {MAX_FILE_BYTES} bytes")
        return parse_engines(strictjson.loads(data))
    except json.JSONDecodeError as exc:
        raise EnginesFileError(f"The engines file {path} is not JSON: {exc}") from None
    except EnginesFileError as exc:
        raise EnginesFileError(f"The engines file {path} is wrong: {exc}.") from None


def parse_engines(content: Any) -> dict[str, Definition]:
    """Name to definition from decoded JSON. Raises ``EnginesFileError``."""
    if not isinstance(content, dict) or content.keys() != {"engines"} or not isinstance(content["engines"], dict):
        raise EnginesFileError('it must be an object with the one key "engines", an object of engines by name')
    found: dict[str, Definition] = {}
    for name, entry in content["engines"].items():
        if not _NAME.fullmatch(name) or name in RESERVED:
            raise EnginesFileError(
                f"engine {name!r}: a name has up to 32 small letters, digits and dashes, begins with a letter and is "
                f"not one of {', '.join(sorted(RESERVED))}"
            )
        try:
            found[name] = _engine(_Entry(entry))
        except EnginesFileError as exc:
            raise EnginesFileError(f"engine {name!r}: {exc}") from None
    return found


class _Entry:
    """One engine's object with typed reads."""

    def __init__(self, fields: Any) -> None:
        if not isinstance(fields, dict):
            raise EnginesFileError("must be an object")
        self.fields: Mapping[str, Any] = fields

    def only(self, known: frozenset[str]) -> None:
        unknown = sorted(self.fields.keys() - known)
        if unknown:
            raise EnginesFileError(f"unknown field {unknown[0]!r} (known: {', '.join(sorted(known))})")

    def text(self, name: str, default: str | None = None) -> str:
        value = self.fields.get(name, default)
        if not isinstance(value, str) or not value:
            raise EnginesFileError(f"{name!r} must be text that is not empty")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise EnginesFileError(f"{name!r} must be true or false")
        return value

    def slots(self) -> int:
        value = self.fields.get("slots")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SLOTS:
            raise EnginesFileError(f"'slots' must be a number from 1 to {MAX_SLOTS}: how many requests run at once")
        return value

    def keep_alive_s(self) -> float | None:
        value = self.fields.get("keep_alive_s")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_KEEP_ALIVE_S:
            raise EnginesFileError(
                f"'keep_alive_s' must be a number up to {MAX_KEEP_ALIVE_S}: after so many seconds the server closes an "
                f"idle connection"
            )
        return float(value)

    def health(self) -> str:
        value = self.text("health", "/health")
        if not _PATH.fullmatch(value) or "*" in value:
            raise EnginesFileError("'health' must be a path such as /health")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise EnginesFileError(f"{name!r} must be a list of texts that are not empty")
        return tuple(value)

    def routes(self) -> tuple[EngineRoute, ...]:
        value = self.fields.get("routes")
        if value is None:
            return routes.COMMON
        if not isinstance(value, list) or not value:
            raise EnginesFileError("'routes' must be a list that is not empty")
        return tuple(_route(item) for item in value)


def _engine(entry: _Entry) -> Definition:
    kinds: Mapping[str, Callable[[_Entry], Definition]] = {"command": _command, "external": _external}
    kind = entry.fields.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise EnginesFileError('\'kind\' must be "command" or "external"')
    return kinds[kind](entry)


def _command(entry: _Entry) -> CommandDefinition:
    entry.only(_COMMAND)
    argv = _argv(entry.fields.get("argv"))
    env = _env(entry.fields.get("env", {}))
    try:
        in_argv = template.all_placeholders(argv)
        in_env = template.all_placeholders(env.values())
    except template.TemplateError as exc:
        raise EnginesFileError(str(exc)) from None
    _known_placeholders(in_argv, in_env)
    if ("uds" in in_argv | in_env) == ("port" in in_argv | in_env):
        raise EnginesFileError("'argv' or 'env' must use either {port} or {uds}: where the server is to listen")
    for name in entry.texts("env_allowed"):
        if environment.judge(name) is environment.Verdict.NEVER:
            raise EnginesFileError(f"'env_allowed': {name!r} may never be set by a launch")
    return CommandDefinition(
        argv=argv,
        env=env,
        slots=entry.slots(),
        health=entry.health(),
        routes=entry.routes(),
        has_metrics=entry.flag("has_metrics", default=False),
        env_allowed=frozenset(entry.texts("env_allowed")),
        keep_alive_s=entry.keep_alive_s(),
        uses=in_argv | in_env,
    )


def _argv(value: Any) -> tuple[template.Element, ...]:
    if not isinstance(value, list) or not value or not isinstance(value[0], str) or not value[0]:
        raise EnginesFileError("'argv' must be a list that begins with the program")
    elements: list[template.Element] = []
    for item in value:
        if isinstance(item, str):
            elements.append(item)
        elif isinstance(item, list) and item and all(isinstance(text, str) for text in item):
            elements.append(tuple(item))
        else:
            raise EnginesFileError("'argv' holds something that is neither text nor a list of texts")
    if template.placeholders(value[0]):
        raise EnginesFileError("'argv': the program itself must not be a placeholder")
    return tuple(elements)


def _env(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise EnginesFileError("'env' must be an object of texts")
    for name, text in value.items():
        if not _VARIABLE.fullmatch(name) or environment.is_own(name):
            raise EnginesFileError(f"'env': {name!r} cannot be set")
        if not isinstance(text, str) or "\0" in text:
            raise EnginesFileError(f"'env': {name!r} must be text")
    return dict(value)


def _known_placeholders(in_argv: frozenset[str], in_env: frozenset[str]) -> None:
    secret = in_argv & SECRET
    if secret:
        raise EnginesFileError(
            f"'argv' must not use {{{min(secret)}}}: command lines can be read by everybody on the machine, use 'env'"
        )
    unknown = (in_argv - ARGV_NAMES) | (in_env - ENV_NAMES)
    if unknown:
        raise EnginesFileError(f"unknown placeholder {{{min(unknown)}}} (known: {', '.join(sorted(ARGV_NAMES))})")


def _external(entry: _Entry) -> ExternalDefinition:
    entry.only(_EXTERNAL)
    served = entry.texts("served_names")
    if not served:
        raise EnginesFileError("'served_names' must name at least one model that it serves")
    if "credential_env" in entry.fields and "credential_file" in entry.fields:
        raise EnginesFileError("give 'credential_env' or 'credential_file', not both")
    priority = entry.fields.get("priority")
    if priority not in {None, "header", "field"}:
        raise EnginesFileError('\'priority\' must be "header" (vLLM 0.32 or newer) or "field" (older vLLM)')
    file = entry.fields.get("credential_file")
    return ExternalDefinition(
        endpoint=_endpoint(entry),
        served_names=frozenset(served),
        slots=entry.slots(),
        health=entry.health(),
        routes=entry.routes(),
        has_metrics=entry.flag("has_metrics", default=False),
        priority_header=priority == "header",
        priority_field=priority == "field",
        refuses_http_media=not entry.flag("allows_http_media", default=False),
        credential_env=entry.text("credential_env") if "credential_env" in entry.fields else None,
        credential_file=Path(entry.text("credential_file")) if file is not None else None,
    )


def _endpoint(entry: _Entry) -> Endpoint:
    if ("url" in entry.fields) == ("uds" in entry.fields):
        raise EnginesFileError("give either 'url' or 'uds'")
    if "uds" in entry.fields:
        uds = entry.text("uds")
        if not uds.startswith("/"):
            raise EnginesFileError("'uds' must be an absolute path")
        return Endpoint(uds=uds, keep_alive_s=entry.keep_alive_s())
    return replace(_url(entry.text("url")), keep_alive_s=entry.keep_alive_s())


def _url(text: str) -> Endpoint:
    wrong = EnginesFileError("'url' must be http(s)://host[:port][/path], without user, query or fragment")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
        raise wrong
    if parts.query or parts.fragment or not _PATH.fullmatch(parts.path or "/") or ".." in parts.path:
        raise wrong
    tls = parts.scheme == "https"
    base_path = parts.path.rstrip("/")
    return Endpoint(host=parts.hostname, port=port or (443 if tls else 80), tls=tls, base_path=base_path)


def _route(item: Any) -> EngineRoute:
    if isinstance(item, str):
        known = routes.known_routes()
        if item not in known:
            raise EnginesFileError(
                f"'routes': {item!r} is not one of {', '.join(sorted(known))}; describe it as an object"
            )
        return known[item]
    if not isinstance(item, dict):
        raise EnginesFileError("'routes' holds something that is neither text nor an object")
    entry = _Entry(item)
    entry.only(frozenset({"method", "path", "scopes", "inference", "websocket", "multipart"}))
    method, path, scopes = entry.text("method"), entry.text("path"), frozenset(entry.texts("scopes"))
    if method not in _METHODS or not _PATH.fullmatch(path) or ".." in path or "*" in path.removesuffix("/*"):
        raise EnginesFileError(f"'routes': {method} {path} is not a method and a path")
    if not scopes or not scopes <= SCOPES.keys():
        raise EnginesFileError(f"'routes': {method} {path} needs scopes out of {', '.join(SCOPES)}")
    return EngineRoute(
        method,
        path,
        scopes,
        inference=entry.flag("inference", default=False),
        websocket=entry.flag("websocket", default=False),
        multipart=entry.flag("multipart", default=False),
    )
