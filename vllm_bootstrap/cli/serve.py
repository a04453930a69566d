"""``vllm-bootstrap serve``: options and environment become settings, settings become the daemon.

Invariant: this process is the daemon, so nothing is imported here that the daemon does not need. What cannot work is
refused before anything is opened: exit code 2 for settings, which trying again does not mend, 1 for the rest.

Settings come, first wins, from the options, the environment, and one file: ``--env-file``, else ``env`` in the
configuration directory. The working directory is never looked at.
"""

from __future__ import annotations

import argparse
import difflib
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_bootstrap import compiled
from vllm_bootstrap.places import default_config_dir

if TYPE_CHECKING:
    from pydantic import ValidationError

    from vllm_bootstrap.settings import Settings

ENV_FILE = "env"
MOCK_DEVICES = 2
# Names with our prefix that are for the commands and the client, not for the daemon.
FOR_CLIENTS = {"VLLM_BOOTSTRAP_URL", "VLLM_BOOTSTRAP_KEY"}


class UnusableSettings(Exception):
    """The settings cannot be used; the message has one line for each reason."""


def run(args: Sequence[str]) -> int:
    """Be the daemon until it is told to stop. Returns the exit code."""
    options = vars(parser().parse_args(args))
    if platform.system() != "Linux":
        return _refuse("The daemon runs on Linux. The other commands and the Python client work here too.", 1)
    env_file = options.pop("env_file")
    try:
        settings, notes = load(options, os.environ, env_file)
    except UnusableSettings as exc:
        return _refuse(str(exc), 2)
    if settings.compiled:
        notes += _use_compiled()
    for remark in notes:
        sys.stderr.write(f"vllm-bootstrap: note: {remark}\n")
    # The daemon's code is heavy, and a wrong setting should not have to wait for it.
    from vllm_bootstrap import app  # noqa: PLC0415
    from vllm_bootstrap.auth.keyfile import KeyFileError  # noqa: PLC0415
    from vllm_bootstrap.configure import StartError  # noqa: PLC0415
    from vllm_bootstrap.models.parsing import CatalogueError  # noqa: PLC0415
    from vllm_bootstrap.schema import CannotOpen  # noqa: PLC0415
    from vllm_bootstrap.statedir import AlreadyRunning  # noqa: PLC0415

    try:
        return app.serve(settings)
    except (KeyFileError, CatalogueError) as exc:
        return _refuse(str(exc), 2)
    except (StartError, AlreadyRunning, CannotOpen, OSError) as exc:
        return _refuse(str(exc), 1)


def _use_compiled() -> tuple[str, ...]:
    """Have the compiled modules imported where there are any. Returns what is to be said of those that do not fit."""
    try:
        compiled.use()
    except compiled.NotCompiled:
        return ()
    except compiled.Unusable as exc:
        return (f"the compiled data plane is not used, a request costs nearly twice the CPU time: {exc}",)
    return ()


def parser() -> argparse.ArgumentParser:
    """The options of ``serve``. Each one left out is left to environment and file."""
    made = argparse.ArgumentParser(
        prog="vllm-bootstrap serve",
        description="Start the daemon. Every setting can also be given in the environment or in a file: see "
        "docs/configuration.md.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("--host", metavar="ADDRESS", help="address to listen on (default 127.0.0.1)")
    made.add_argument("--port", metavar="N", help="port to listen on, 0 for any (default 8000)")
    made.add_argument("--env-file", metavar="FILE", default=None, help="read settings from this file")
    made.add_argument("--state-dir", metavar="DIR", help="database, ids, keys and logs of this daemon")
    made.add_argument("--auth-keys-file", metavar="FILE", help="keys with scopes")
    made.add_argument("--engine", metavar="NAME", help="default engine: vllm, simulator, or one of the engines file")
    made.add_argument("--engine-python", metavar="FILE", help="the interpreter that can import vllm")
    made.add_argument("--engines-file", metavar="FILE", help="engines of your own")
    made.add_argument("--gpus", metavar="LIST", help="the only GPUs to touch: indices or UUIDs, separated by commas")
    made.add_argument(
        "--mock",
        dest="devices",
        action=_Mock,
        nargs="?",
        type=int,
        metavar="N",
        help=f"pretend N GPUs (default {MOCK_DEVICES}) and simulate every model",
    )
    made.add_argument("--log-level", metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR")
    made.add_argument("--insecure", action="store_true", help="serve a public address without any key")
    return made


class _Mock(argparse.Action):
    """``--mock N`` is a value of the setting ``devices``."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:  # noqa: ARG002
        setattr(namespace, self.dest, f"mock:{MOCK_DEVICES if values is None else values}")


def load(
    options: Mapping[str, Any], environ: Mapping[str, str], env_file: str | None
) -> tuple[Settings, tuple[str, ...]]:
    """The settings, and remarks about them. Raises ``UnusableSettings``."""
    from dotenv import dotenv_values  # noqa: PLC0415 - with pydantic-settings, which brings it along
    from pydantic import ValidationError  # noqa: PLC0415

    from vllm_bootstrap.settings import Settings  # noqa: PLC0415

    path = _env_file(env_file)
    try:
        in_file = {} if path is None else {k: v or "" for k, v in dotenv_values(path, encoding="utf-8").items()}
    except (OSError, ValueError) as exc:
        raise UnusableSettings(f"{path}: {exc}") from None
    known = known_names()
    given = {**in_file, **environ}
    if problems := unknown(given, known):
        raise UnusableSettings("\n".join(problems))
    try:
        settings = Settings(_env_file=path, **options)
    except ValidationError as exc:
        raise UnusableSettings("\n".join(reasons(exc))) from None
    strangers = sorted(name for name in in_file if name.upper() not in known)
    notes = [f"{name} in {path} is no setting of this daemon and has no effect" for name in strangers]
    return settings, tuple(notes)


def known_names() -> frozenset[str]:
    """Every name under which a setting can be given, in upper case."""
    from pydantic import AliasChoices  # noqa: PLC0415

    from vllm_bootstrap.settings import PREFIX, Settings  # noqa: PLC0415

    names = set(FOR_CLIENTS)
    for name, field in Settings.model_fields.items():
        names.add(f"{PREFIX}{name.upper()}")
        if isinstance(field.validation_alias, AliasChoices):
            names.update(str(choice).upper() for choice in field.validation_alias.choices)
    return frozenset(names)


def unknown(given: Iterable[str], known: frozenset[str]) -> list[str]:
    """One sentence for each name with our prefix that means nothing: a misspelt setting is refused, not ignored."""
    from vllm_bootstrap.settings import PREFIX  # noqa: PLC0415

    wrong = sorted(name for name in given if name.upper().startswith(PREFIX) and name.upper() not in known)
    return [f"{name} is no setting of this daemon{_suggestion(name.upper(), known)}" for name in wrong]


def _suggestion(name: str, known: frozenset[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    return f": did you mean {close[0]}?" if close else ": unset it, or see docs/configuration.md"


def reasons(exc: ValidationError) -> list[str]:
    """What is wrong, setting by setting, without the values (some are secret)."""
    from vllm_bootstrap.settings import PREFIX  # noqa: PLC0415

    options = {action.dest for action in parser()._actions}  # noqa: SLF001 - argparse has no public list of them
    found = []
    for problem in exc.errors(include_input=False, include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        said = problem["msg"].removeprefix("Value error, ")
        option = f" (--{name.replace('_', '-')})" if name in options and name != "devices" else ""
        shown = name if name.isupper() else f"{PREFIX}{name.upper()}{option}"
        found.append(f"{shown}: {said}" if name else said)
    return found


def _env_file(chosen: str | None) -> Path | None:
    if chosen is not None:
        path = Path(chosen)
        if not path.is_file():
            raise UnusableSettings(f"--env-file {chosen}: there is no such file")
        return path
    default = default_config_dir() / ENV_FILE
    return default if default.is_file() else None


def _refuse(message: str, code: int) -> int:
    for line in message.splitlines():
        sys.stderr.write(f"vllm-bootstrap: {line}\n")
    return code
