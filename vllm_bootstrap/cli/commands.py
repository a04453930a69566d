"""All commands but the daemon itself, put together, and how their failures are told.

Invariant: an error that was foreseen is one sentence on standard error (with ``--json`` the error's body) and exit code
1, or 2 when the command was not understood; a traceback is always a bug.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from vllm_bootstrap import __version__
from vllm_bootstrap.cli import batches, demo, keys, launching, models, output, talking, traffic, viewing
from vllm_bootstrap.cli.options import Failure, UsageError
from vllm_bootstrap.client import ApiError, ClientError
from vllm_bootstrap.errors import SOURCE, Unauthorized

INTERRUPTED = 130  # what typer makes of Ctrl-C; for us it is a failure like others

app = typer.Typer(
    name="vllm-bootstrap",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Launch, watch and stop vLLM engines. Without a command: start the daemon.",
)


@app.callback(invoke_without_command=True)
def root(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version of this command.", is_eager=True)
    ] = False,
) -> None:
    """Launch, watch and stop vLLM engines. Without a command: start the daemon."""
    if version:
        output.say(f"vllm-bootstrap {__version__}")
        raise typer.Exit


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)
def serve() -> None:
    """Start the daemon (its options: vllm-bootstrap serve --help)."""
    # Only listed here: ``cli.main`` has started the daemon long before, without typer.


launching.register(app)
viewing.register(app)
traffic.register(app)
talking.register(app)
app.add_typer(batches.app, name="batch")
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.command(name="demo")(demo.demo)


def run(args: Sequence[str]) -> int:
    """Run one command. Returns the exit code."""
    as_json = "--json" in args
    try:
        app(args=list(args), prog_name="vllm-bootstrap")
    except SystemExit as exc:
        return 1 if exc.code == INTERRUPTED else int(exc.code or 0)
    except UsageError as exc:
        return _fail(str(exc), 2, as_json=as_json)
    except ApiError as exc:
        return _fail_api(exc, as_json=as_json)
    except (ClientError, Failure) as exc:
        return _fail(str(exc), 1, as_json=as_json)
    except BrokenPipeError:
        # Whoever read has had enough. Without this, Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _fail_api(error: ApiError, *, as_json: bool) -> int:
    if as_json:
        output.note(json.dumps(error.body()))
        return 1
    where = f" ({error.param})" if error.param and error.param not in error.message else ""
    output.note(f"error: {error.message}{where}")
    if isinstance(error, Unauthorized):
        output.note("Set VLLM_BOOTSTRAP_KEY to a key of that daemon.")
    return 1


def _fail(message: str, code: int, *, as_json: bool) -> int:
    if as_json:
        body = {"message": message, "type": "client_error", "param": None, "code": "usage" if code == 2 else "failed"}
        output.note(json.dumps({"error": body, "src": f"{SOURCE}-cli"}))
    else:
        output.note(f"error: {message}")
    return code
