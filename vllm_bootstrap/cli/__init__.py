"""The command line: ``vllm-bootstrap``. Exit codes: 0 done, 1 failed, 2 usage.

Invariant: the daemon's process never imports what only the other commands need (typer, rich, httpx): which of the two
it is to be is decided here, with nothing but the arguments. All commands but ``serve``, ``demo`` and ``keys`` only talk
to a running daemon, through ``client``, and work on every platform.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

NOT_FOR_SERVE = {"-h", "--help", "--version", "--install-completion", "--show-completion"}
COMPLETION_VARIABLE = "_VLLM_BOOTSTRAP_COMPLETE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; a usage error of ``serve`` raises ``SystemExit`` with it."""
    args = list(sys.argv[1:] if argv is None else argv)
    if is_serve(args) and COMPLETION_VARIABLE not in os.environ:
        from vllm_bootstrap.cli import serve  # noqa: PLC0415 - see the invariant

        return serve.run(args[1:] if args[:1] == ["serve"] else args)
    from vllm_bootstrap.cli import commands  # noqa: PLC0415 - see the invariant

    return commands.run(args)


def is_serve(args: Sequence[str]) -> bool:
    """Whether the arguments ask for the daemon: ``serve``, nothing at all, or options of ``serve`` alone."""
    return not args or args[0] == "serve" or (args[0].startswith("-") and args[0] not in NOT_FOR_SERVE)
