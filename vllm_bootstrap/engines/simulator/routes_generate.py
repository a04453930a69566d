"""Routes that generate text: chat, completions, responses, messages, transcriptions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from vllm_bootstrap.engines.simulator.app import App
from vllm_bootstrap.engines.simulator.doze import GARBAGE
from vllm_bootstrap.engines.simulator.formats import (
    Chat,
    Completion,
    Format,
    Messages,
    Reply,
    Responses,
    Transcription,
    dumps,
)
from vllm_bootstrap.engines.simulator.generation import Generation
from vllm_bootstrap.engines.simulator.http import Exchange
from vllm_bootstrap.engines.simulator.requests import (
    DEFAULT_COMPLETION_TOKENS,
    Prompt,
    Refused,
    Wish,
    conversation,
    json_object,
    model_of,
    number,
    priority_of,
    prompts_of,
    wish_of,
)
from vllm_bootstrap.engines.simulator.text import count_tokens
from vllm_bootstrap.engines.simulator.upload import Upload


def _generate(
    app: App, exchange: Exchange, body: Mapping[str, Any], wish: Wish, form: type[Format], prefix: str
) -> None:
    model = model_of(app, body)
    priority = priority_of(app, exchange, body)
    reply = Reply(
        id=app.request_id(exchange, prefix),
        created=int(time.time()),
        model=model,
        answers=wish.answers,
        prompt_tokens=wish.prompt_total,
        include_usage=wish.include_usage,
    )
    generation = Generation(
        exchange,
        form(reply),
        prompt_tokens=wish.prompt_tokens,
        prefixes=wish.prefixes,
        streamed=wish.streamed,
        priority=priority,
        finished=app.finished,
    )
    app.accept(exchange)
    generation.start(app.batch)


def _limit(body: Mapping[str, Any], *names: str) -> int | None:
    given = [number(body, name, 0) for name in names if body.get(name) is not None]
    return given[0] if given else None


def chat(app: App, exchange: Exchange) -> None:
    body = json_object(exchange)
    limit = _limit(body, "max_completion_tokens", "max_tokens")
    prompt = conversation(body.get("messages"))
    wish = wish_of(app, body, [prompt], limit=limit, choices=number(body, "n", 1))
    _generate(app, exchange, body, wish, Chat, "chatcmpl-")


def completions(app: App, exchange: Exchange) -> None:
    body = json_object(exchange)
    limit = _limit(body, "max_tokens") or DEFAULT_COMPLETION_TOKENS
    prompts = prompts_of(app, body.get("prompt"))
    if app.doze.garbled:
        prompts = [Prompt(GARBAGE, prompt.tokens) for prompt in prompts]
    wish = wish_of(app, body, prompts, limit=limit, choices=number(body, "n", 1))
    _generate(app, exchange, body, wish, Completion, "cmpl-")


def responses(app: App, exchange: Exchange) -> None:
    body = json_object(exchange)
    given = body.get("input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    prompt = conversation(messages, body.get("instructions"))
    wish = wish_of(app, body, [prompt], limit=_limit(body, "max_output_tokens"))
    _generate(app, exchange, body, wish, Responses, "resp_")


def messages(app: App, exchange: Exchange) -> None:
    body = json_object(exchange)
    if body.get("max_tokens") is None:
        raise Refused(400, "max_tokens is required", param="max_tokens")
    prompt = conversation(body.get("messages"), body.get("system"))
    wish = wish_of(app, body, [prompt], limit=number(body, "max_tokens", 1))
    _generate(app, exchange, body, wish, Messages, "msg_")


def count_message_tokens(app: App, exchange: Exchange) -> None:
    body = json_object(exchange)
    model_of(app, body)
    exchange.respond(200, dumps({"input_tokens": conversation(body.get("messages"), body.get("system")).tokens}))


def transcriptions(app: App, exchange: Exchange) -> None:
    """The "transcript" names the file, its size and its hash, so that a caller can see what arrived."""
    upload = exchange.upload
    if not isinstance(upload, Upload):
        raise Refused(415, "multipart/form-data expected", "Unsupported Media Type")
    if upload.error is not None or upload.file_name is None:
        raise Refused(400, upload.error or "file is missing", param="file")
    text = f"{upload.file_name} {upload.file_bytes} bytes sha256 {upload.file_sha256}"
    body = {"model": upload.fields.get("model"), "stream": upload.fields.get("stream", "").lower() in ("true", "1")}
    # All of it, whatever its length: a cut hash is of no use.
    wish = wish_of(app, body, [Prompt(text, 1)], limit=count_tokens(text) + 1)
    _generate(app, exchange, body, wish, Transcription, "trsc-")
