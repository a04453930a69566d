"""Reading requests: bodies, parameters, prompts; what is wrong is refused in vLLM's words and statuses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from vllm_bootstrap.engines.simulator.app import App
from vllm_bootstrap.engines.simulator.blocks import prefix_hashes
from vllm_bootstrap.engines.simulator.formats import error_body
from vllm_bootstrap.engines.simulator.http import Exchange
from vllm_bootstrap.engines.simulator.text import Answer, answer_to, count_tokens, pieces

MAX_SEQUENCES = 16_384
DEFAULT_COMPLETION_TOKENS = 16


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param

    @property
    def body(self) -> bytes:
        return error_body(self.status, self.message, self.kind, self.param)


def bare(status: int) -> Refused:
    """The error of the HTTP layer: no such route, wrong method."""
    phrase = HTTPStatus(status).phrase
    return Refused(status, phrase, phrase)


def json_object(exchange: Exchange) -> dict[str, Any]:
    kind = (exchange.header(b"content-type") or b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise Refused(415, "Unsupported Media Type: Only 'application/json' is allowed", "Unsupported Media Type")
    try:
        body = json.loads(exchange.body)
    except (ValueError, RecursionError) as exc:
        raise Refused(400, f"the body is no JSON: {exc}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return body


def number(body: Mapping[str, Any], name: str, default: int, *, least: int | None = 1, most: int | None = None) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused(400, f"{name} must be an integer", param=name)
    if (least is not None and value < least) or (most is not None and value > most):
        raise Refused(400, f"{name} is out of range: {value}", param=name)
    return value


def texts(value: Any, name: str) -> list[str]:
    """One text or a list of them."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise Refused(400, f"{name} must be a text or a list of texts", param=name)
    return found


def model_of(app: App, body: Mapping[str, Any]) -> str:
    """The name that was asked for; absent means the first."""
    name = body.get("model") or app.names[0]
    if name not in app.names:
        raise Refused(404, f"The model `{name}` does not exist.", "NotFoundError", "model")
    return str(name)


def priority_of(app: App, exchange: Exchange, body: Mapping[str, Any]) -> int:
    """The header wins over the body's field; lower is earlier."""
    if app.options.scheduling_policy != "priority":
        return 0
    header = exchange.header(b"x-vllm-priority")
    if header is None:
        return number(body, "priority", 0, least=None)
    try:
        return int(header)
    except ValueError:
        raise Refused(400, "X-Vllm-Priority must be an integer", param="priority") from None


@dataclass(frozen=True, slots=True)
class Prompt:
    """``text`` is what is answered; ``whole`` what is read, where that is more: a text or token ids."""

    text: str
    tokens: int
    whole: str | tuple[int, ...] = ""

    def prefix(self, block: int) -> tuple[int, ...]:
        """For the prefix cache, in blocks of so many tokens; 0 for none."""
        if not block or self.tokens < block:
            return ()
        whole = self.whole or self.text
        return prefix_hashes(pieces(whole) if isinstance(whole, str) else whole, block)


def prompts_of(app: App, value: Any, name: str = "prompt") -> list[Prompt]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    if isinstance(value, list) and value and all(isinstance(part, int) for part in value):
        value = [value]
    if isinstance(value, list) and value and all(_is_token_list(part) for part in value):
        return [Prompt(app.vocabulary.decode(part), len(part), tuple(part)) for part in value]
    return [Prompt(text, count_tokens(text)) for text in texts(value, name)]


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, int) for part in value)


def conversation(messages: Any, system: Any = None) -> Prompt:
    """A list of messages: counted whole, answered from the last one of the user."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refused(400, "messages must be a list of objects, at least one", param="messages")
    parts = [_content(message.get("content")) for message in messages]
    tokens = sum(part.tokens for part in parts) + _content(system).tokens
    asked = [part for part, message in zip(parts, messages, strict=True) if message.get("role") == "user"]
    whole = "\0".join([_content(system).text, *(part.text for part in parts)]) if len(parts) > 1 or system else ""
    return Prompt((asked or parts)[-1].text, max(1, tokens), whole)


def _content(content: Any) -> Prompt:
    if content is None:
        return Prompt("", 0)
    if isinstance(content, str):
        return Prompt(content, count_tokens(content))
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Refused(400, "content must be a text or a list of parts", param="messages")
    text = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    others = sum(1 for part in content if not isinstance(part.get("text"), str))  # an image is one token here
    return Prompt(text, count_tokens(text) + others)


@dataclass(frozen=True, slots=True)
class Wish:
    """What all generating APIs share. ``answers``, ``prompt_tokens``, ``prefixes``: one entry for each choice."""

    answers: Sequence[Answer]
    prompt_tokens: Sequence[int]
    prefixes: Sequence[tuple[int, ...]]
    prompt_total: int
    streamed: bool
    include_usage: bool


def wish_of(
    app: App, body: Mapping[str, Any], prompts: Sequence[Prompt], *, limit: int | None, choices: int = 1
) -> Wish:
    """Plan the answers. ``limit``: tokens wanted of each, None for as many as fit."""
    if len(prompts) * choices > MAX_SEQUENCES:
        raise Refused(400, f"more than {MAX_SEQUENCES} sequences in one request", param="n")
    longest = max(prompt.tokens for prompt in prompts)
    room = app.context_length - longest
    if room < 1 or (limit is not None and limit > room):
        raise Refused(
            400,
            f"This model's maximum context length is {app.context_length} tokens. However, you requested "
            f"{limit or 1} output tokens and your prompt contains {longest} input tokens.",
            param="max_tokens" if room > 0 else "input_tokens",
        )
    stop = [mark for name in ("stop", "stop_sequences") if body.get(name) for mark in texts(body[name], name)]
    answers = [
        answer_to(
            prompt.text,
            max_tokens=limit or room,
            index=index,
            stop=stop,
            ignore_eos=body.get("ignore_eos") is True,
            min_tokens=number(body, "min_tokens", 0, least=0),
        )
        for prompt in prompts
        for index in range(choices)
    ]
    streamed = body.get("stream") is True
    options = body.get("stream_options")
    if options is not None and not streamed:
        raise Refused(400, "Stream options can only be defined when `stream=True`.", param="stream_options")
    return Wish(
        answers,
        [prompt.tokens for prompt in prompts for _ in range(choices)],
        [prefix for prompt in prompts for prefix in [prompt.prefix(app.prefix_block)] * choices],
        sum(prompt.tokens for prompt in prompts),
        streamed,
        isinstance(options, dict) and options.get("include_usage") is True,
    )
