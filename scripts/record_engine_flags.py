"""Print the server flags of the vLLM that the running interpreter has, one ``--flag kind`` a line, sorted.

Run it with the interpreter of a vLLM environment (it imports vLLM, which takes seconds) and keep the output as
``tests/fixtures/engine_flags/VERSION.txt``; ``build_engine_flags.py`` makes the capability table from those files.

Kinds: ``switch`` (can only be turned on), ``toggle`` (``--flag`` and ``--no-flag``), ``value``, ``optional`` (value may
be left out), ``list`` (one or more values), ``append`` (given repeatedly).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

# Where releases keep the parser of the server, newest first.
PARSER_MODULES = (
    "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
)


def server_parser() -> argparse.ArgumentParser:
    """The argument parser behind ``vllm serve``, as this release builds it."""
    try:
        base: Any = importlib.import_module("vllm.utils.argparse_utils")
    except ModuleNotFoundError:
        base = importlib.import_module("vllm.utils")
    for name in PARSER_MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if not str(missing.name).startswith("vllm.entrypoints"):
                raise
            continue
        parser: argparse.ArgumentParser = module.make_arg_parser(base.FlexibleArgumentParser())
        return parser
    raise SystemExit("this vLLM keeps its argument parser in a place that is not known yet")


def kind_of(action: argparse.Action, name: str, known: set[str]) -> str:
    """Name the way an option takes its value."""
    if action.nargs == 0:
        return "toggle" if f"--no-{name.removeprefix('--')}" in known else "switch"
    if type(action).__name__ == "_AppendAction":
        return "append"
    return {"+": "list", "*": "list", "?": "optional"}.get(str(action.nargs), "value")


def main() -> None:
    sys.argv = ["vllm", "serve"]
    parser = server_parser()
    known = set(parser._option_string_actions)  # noqa: SLF001 - the list of all accepted spellings, hidden ones too
    found = {}
    for action in parser._actions:  # noqa: SLF001
        canonical = "--" + action.dest.replace("_", "-")
        spellings = [text for text in action.option_strings if text.startswith("--")]
        if spellings and canonical != "--help":
            name = canonical if canonical in spellings else spellings[0]
            found[name] = kind_of(action, name, known)
    for name, kind in sorted(found.items()):
        print(name, kind)


if __name__ == "__main__":
    main()
