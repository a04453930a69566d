"""Commands that ask a model: ``run`` for one answer, ``chat`` for a conversation."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from vllm_bootstrap.cli import output
from vllm_bootstrap.cli.options import AsJson, Failure, Key, Url, connect
from vllm_bootstrap.client import ApiError, Client
from vllm_bootstrap.errors import UpstreamError, from_response

CHAT_PATH = "/v1/chat/completions"
ANSWER_TIMEOUT_S = 1800.0
Model = Annotated[
    str | None, typer.Option("--model", "-m", metavar="NAME", help="Which model; needed when several are ready.")
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="Instructions for the model.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer.")]
Temperature = Annotated[float | None, typer.Option("--temperature", metavar="T", min=0, help="0 for the likeliest.")]
Message = dict[str, str]


def run(
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to ask; - reads standard input.")],
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Ask for one answer."""
    messages = opening(system)
    messages.append({"role": "user", "content": sys.stdin.read() if prompt == "-" else prompt})
    options = {"max_tokens": max_tokens, "temperature": temperature}
    with connect(url, key) as client:
        name = pick_model(client, model)
        if as_json:
            output.emit(client.request("POST", CHAT_PATH, _body(name, messages, options), timeout_s=ANSWER_TIMEOUT_S))
            return
        for piece in answer(client, name, messages, options):
            output.raw(piece)
    output.say()


def chat(
    *,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Talk to a model. Ctrl-C cuts an answer short, Ctrl-D ends; /clear forgets what was said, /quit ends too."""
    options = {"max_tokens": max_tokens, "temperature": temperature}
    with connect(url, key) as client:
        name = pick_model(client, model)
        if output.on_terminal():
            output.say(output.styled(f"Talking to {name}. Ctrl-D ends.", "dim"))
            with contextlib.suppress(ImportError):  # line editing; not on Windows
                import readline  # noqa: F401, PLC0415
        messages = opening(system)
        for asked in questions():
            if asked == "/clear":
                messages = opening(system)
            elif asked:
                messages.append({"role": "user", "content": asked})
                messages.append({"role": "assistant", "content": _one_turn(client, name, messages, options)})


def questions() -> Iterator[str]:
    """What is typed, or the lines of a pipe."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/quit", "/exit"):
            return
        yield line


def _one_turn(client: Client, model: str, messages: list[Message], options: dict[str, Any]) -> str:
    """Show one answer as it comes; what there is of it when it is cut short or breaks."""
    said: list[str] = []
    try:
        for piece in answer(client, model, messages, options):
            said.append(piece)
            output.raw(piece)
    except KeyboardInterrupt:
        output.raw(" [cut short]")
    except ApiError as exc:
        output.note(f"\nerror: {exc.message}")
    output.say()
    return "".join(said)


def opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def pick_model(client: Client, wanted: str | None) -> str:
    """The model to ask: the one that is named, or the only one that is ready, or where none is, the only one that would
    be loaded for it. Raises ``Failure``."""
    if wanted is not None:
        return wanted
    found = [info for info in client.models().data if info.alias_of is None and info.parent is None]
    ready = [info.id for info in found if info.status == "loaded"]
    at_rest = [info.id for info in found if info.status in {"unloaded", "asleep", "failed"}]
    others = [info.id for info in found if info.id not in at_rest]
    if len(ready) == 1:
        return ready[0]
    if ready:
        raise Failure(f"Several models are ready: say which with --model ({', '.join(ready)}).")
    if others:
        raise Failure(f"No model is ready yet (loading: {', '.join(others)}).")
    if len(at_rest) == 1:
        return at_rest[0]
    if at_rest:
        raise Failure(f"No model is loaded: say which one to load with --model ({', '.join(at_rest)}).")
    raise Failure("No model is ready. Launch one: vllm-bootstrap launch MODEL --wait")


def answer(client: Client, model: str, messages: list[Message], options: dict[str, Any]) -> Iterator[str]:
    """The pieces of one streamed answer. Raises ``ApiError``, also when the stream breaks off or carries an error."""
    body = {**_body(model, messages, options), "stream": True}
    with contextlib.closing(client.stream("POST", CHAT_PATH, body=body)) as events:
        for event in events:
            if event.data == "[DONE]":
                return
            chunk = json.loads(event.data)
            if "error" in chunk:
                raise from_response(502, chunk)
            for choice in chunk.get("choices", ()):
                delta = choice.get("delta", {})
                piece = delta.get("reasoning_content") or delta.get("content")
                if piece:
                    yield piece
    raise UpstreamError("The answer broke off.")


def _body(model: str, messages: list[Message], options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    return {"model": model, "messages": messages, **given}


def register(app: typer.Typer) -> None:
    for command in (run, chat):
        app.command()(command)
