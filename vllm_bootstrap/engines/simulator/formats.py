"""How answers look on the wire: one class for each API, from answers to bytes. No state of a connection.

A streamed answer is ``opening``, one ``token`` event for each token of each choice, ``closing``; any other is
``body``. What does not change within a stream is made once, so that an event costs one formatting of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_bootstrap.engines.simulator.text import Answer

DONE = b"data: [DONE]\n\n"
# Made once: json.dumps makes a new encoder for each call that is not plain.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def dumps(value: Any) -> bytes:
    try:
        return _encode(value).encode()
    except UnicodeEncodeError:  # a lone surrogate that came in through an escape
        return json.dumps(value, separators=(",", ":")).encode()


def error_body(status: int, message: str, kind: str, param: str | None = None) -> bytes:
    """vLLM's error shape: OpenAI's envelope with the status as code."""
    return dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


@dataclass(frozen=True, slots=True)
class Reply:
    """What every format needs to know. One answer for each choice."""

    id: str
    created: int
    model: str
    answers: Sequence[Answer]
    prompt_tokens: int
    include_usage: bool = False

    @property
    def completion_tokens(self) -> int:
        return sum(answer.count for answer in self.answers)

    @property
    def usage(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": total,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": None,
        }


class Format:
    """Base: OpenAI's chunk streams. ``object`` and the choice differ by API."""

    object_name = ""
    chunk_name = ""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self._before = [self._prefix(index) for index in range(len(reply.answers))]

    def opening(self) -> bytes:
        return b""

    def token(self, index: int, i: int) -> bytes:
        answer = self.reply.answers[index]
        last = i + 1 == answer.count
        return self._before[index] + answer.encoded(i) + self._suffix(answer if last else None)

    def closing(self) -> bytes:
        if not self.reply.include_usage:
            return DONE
        return b"data: %b\n\n%b" % (dumps({**self._chunk([]), "usage": self.reply.usage}), DONE)

    def failure(self, error: bytes) -> bytes:
        """What ends a stream that cannot go on; vLLM says so after the 200."""
        return b"data: %b\n\n%b" % (error, DONE)

    def body(self) -> bytes:
        choices = [self._choice(index, answer) for index, answer in enumerate(self.reply.answers)]
        whole = {"id": self.reply.id, "object": self.object_name, "created": self.reply.created}
        return dumps({**whole, "model": self.reply.model, "choices": choices, "usage": self.reply.usage})

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        head = {"id": self.reply.id, "object": self.chunk_name, "created": self.reply.created}
        return {**head, "model": self.reply.model, "choices": choices}

    def _prefix(self, index: int) -> bytes:
        raise NotImplementedError

    def _suffix(self, finished: Answer | None) -> bytes:
        raise NotImplementedError

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError


def _finish(finished: Answer | None) -> bytes:
    if finished is None:
        return b'"logprobs":null,"finish_reason":null'
    stop = b"" if finished.stop_reason is None else b',"stop_reason":%b' % dumps(finished.stop_reason)
    return b'"logprobs":null,"finish_reason":"%b"%b' % (finished.finish_reason.encode(), stop)


class Chat(Format):
    """``/v1/chat/completions``"""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    _middle = b'"},' + _finish(None) + b',"token_ids":null}]}\n\n'

    def opening(self) -> bytes:
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        chunks = [self._chunk([{"index": index, **first}]) for index in range(len(self.reply.answers))]
        return b"".join(b"data: %b\n\n" % dumps(chunk) for chunk in chunks)

    def _prefix(self, index: int) -> bytes:
        chunk = dumps(self._chunk([{"index": index, "delta": {"content": ""}}]))
        return b"data: %b" % chunk.removesuffix(b'"}}]}')

    def _suffix(self, finished: Answer | None) -> bytes:
        return self._middle if finished is None else b'"},%b,"token_ids":null}]}\n\n' % _finish(finished)

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text(), "refusal": None}
        message |= {"tool_calls": [], "reasoning": None}
        end = {"logprobs": None, "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
        return {"index": index, "message": message, **end}


class Completion(Format):
    """``/v1/completions``"""

    object_name = chunk_name = "text_completion"
    _middle = b'",' + _finish(None) + b',"stop_reason":null}]}\n\n'

    def _prefix(self, index: int) -> bytes:
        return b"data: %b" % dumps(self._chunk([{"index": index, "text": ""}])).removesuffix(b'"}]}')

    def _suffix(self, finished: Answer | None) -> bytes:
        return self._middle if finished is None else b'",%b}]}\n\n' % _finish(finished)

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        end = {"logprobs": None, "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
        return {"index": index, "text": answer.text(), **end}


class Transcription(Format):
    """``/v1/audio/transcriptions``"""

    chunk_name = "transcription.chunk"

    def body(self) -> bytes:
        return dumps({"text": self.reply.answers[0].text(), "usage": {"type": "duration", "seconds": 1}})

    def _prefix(self, index: int) -> bytes:  # noqa: ARG002
        return b"data: %b" % dumps(self._chunk([{"delta": {"content": ""}}])).removesuffix(b'"}}]}')

    def _suffix(self, finished: Answer | None) -> bytes:
        reason = None if finished is None else finished.finish_reason
        return b'"},"finish_reason":%b}]}\n\n' % dumps(reason)


class _Events(Format):
    """Base of the APIs whose events have names. ``kind`` is also the event's ``type``."""

    def failure(self, error: bytes) -> bytes:
        return b"event: error\ndata: %b\n\n" % error

    def _event(self, kind: str, **fields: Any) -> bytes:
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), dumps({"type": kind, **fields}))


class Messages(_Events):
    """``/v1/messages``, Anthropic's"""

    def opening(self) -> bytes:
        usage = {"input_tokens": self.reply.prompt_tokens, "output_tokens": 0}
        start = {**self._message([]), "stop_reason": None, "usage": usage}
        block = {"type": "text", "text": ""}
        return self._event("message_start", message=start) + self._event(
            "content_block_start", index=0, content_block=block
        )

    def closing(self) -> bytes:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self.reply.answers[0].stop_reason}
        usage = {"input_tokens": self.reply.prompt_tokens, "output_tokens": self.reply.completion_tokens}
        stop = self._event("content_block_stop", index=0)
        return stop + self._event("message_delta", delta=delta, usage=usage) + self._event("message_stop")

    def body(self) -> bytes:
        usage = {"input_tokens": self.reply.prompt_tokens, "output_tokens": self.reply.completion_tokens}
        content = [{"type": "text", "text": self.reply.answers[0].text()}]
        return dumps({**self._message(content), "stop_reason": self._stop_reason, "usage": usage})

    @property
    def _stop_reason(self) -> str:
        answer = self.reply.answers[0]
        if answer.stop_reason is not None:
            return "stop_sequence"
        return "end_turn" if answer.finish_reason == "stop" else "max_tokens"

    def _message(self, content: list[Any]) -> dict[str, Any]:
        head = {"id": self.reply.id, "type": "message", "role": "assistant", "content": content}
        return {**head, "model": self.reply.model}

    def _prefix(self, index: int) -> bytes:
        event = self._event("content_block_delta", index=index, delta={"type": "text_delta", "text": ""})
        return event.removesuffix(b'"}}\n\n')

    def _suffix(self, finished: Answer | None) -> bytes:  # noqa: ARG002
        return b'"}}\n\n'


class Responses(_Events):
    """``/v1/responses``"""

    def __init__(self, reply: Reply) -> None:
        self._number = 0
        self._item_id = reply.id.replace("resp_", "msg_", 1)
        super().__init__(reply)

    def opening(self) -> bytes:
        started = self._response("in_progress", [])
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return b"".join(
            (
                self._next("response.created", response=started),
                self._next("response.in_progress", response=started),
                self._next("response.output_item.added", output_index=0, item=self._item("in_progress", [])),
                self._next("response.content_part.added", **self._place(), part=part),
            )
        )

    def token(self, index: int, i: int) -> bytes:  # noqa: ARG002
        delta = self.reply.answers[0].piece(i)
        return self._next("response.output_text.delta", **self._place(), delta=delta, logprobs=[])

    def closing(self) -> bytes:
        whole = self._whole()
        item = whole["output"][0]
        return b"".join(
            (
                self._next("response.output_text.done", **self._place(), text=item["content"][0]["text"], logprobs=[]),
                self._next("response.content_part.done", **self._place(), part=item["content"][0]),
                self._next("response.output_item.done", output_index=0, item=item),
                self._next(f"response.{whole['status']}", response=whole),
            )
        )

    def body(self) -> bytes:
        return dumps(self._whole())

    def _next(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return self._event(kind, sequence_number=self._number - 1, **fields)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, status: str, output: list[Any]) -> dict[str, Any]:
        head = {"id": self.reply.id, "object": "response", "created_at": self.reply.created, "status": status}
        tools = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
        return {**head, "model": self.reply.model, "output": output, **tools}

    def _whole(self) -> dict[str, Any]:
        answer = self.reply.answers[0]
        part = {"type": "output_text", "text": answer.text(), "annotations": []}
        cut = answer.finish_reason == "length"
        whole = self._response("incomplete" if cut else "completed", [self._item("completed", [part])])
        whole["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        whole["usage"] = {
            "input_tokens": self.reply.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.reply.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.reply.prompt_tokens + self.reply.completion_tokens,
        }
        return whole

    def _prefix(self, index: int) -> bytes:  # noqa: ARG002
        return b""
