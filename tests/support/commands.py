"""Runs commands of ``vllm-bootstrap`` inside the test's own process, in a pipe or on a terminal of 120 columns."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest import mock

from vllm_bootstrap.cli import main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@dataclass
class Result:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@contextmanager
def _standard_input(text: str | None) -> Iterator[None]:
    with mock.patch.object(sys, "stdin", io.StringIO(text or "")):
        yield


def run(*args: str, env: Mapping[str, str] | None = None, stdin: str | None = None, terminal: bool = False) -> Result:
    """One command. ``env`` is added to an environment without any of our settings."""
    out, err = Terminal() if terminal else io.StringIO(), io.StringIO()
    ours = {name for name in os.environ if name.startswith(("VLLM_", "AUTH_"))}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    environ = {**kept, "COLUMNS": "120", "TERM": "xterm", **(env or {})}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environ, clear=True))
        stack.enter_context(_standard_input(stdin))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            code: Any = main(args)
        except SystemExit as exc:
            code = exc.code or 0
    return Result(int(code), out.getvalue(), err.getvalue())
