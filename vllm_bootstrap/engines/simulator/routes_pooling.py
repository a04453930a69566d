"""Routes that read and do not write: embeddings, scores, rankings."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_bootstrap.engines.simulator.app import App
from vllm_bootstrap.engines.simulator.formats import dumps
from vllm_bootstrap.engines.simulator.generation import Pooling
from vllm_bootstrap.engines.simulator.http import Exchange
from vllm_bootstrap.engines.simulator.requests import (
    Prompt,
    Refused,
    json_object,
    model_of,
    number,
    priority_of,
    prompts_of,
    texts,
)
from vllm_bootstrap.engines.simulator.text import count_tokens, embedding, score

MAX_DIMENSIONS = 16_384


def _pool(
    app: App, exchange: Exchange, body: Mapping[str, Any], tokens: Sequence[int], reply: Callable[[], bytes]
) -> None:
    longest = max(tokens)
    if longest > app.context_length:
        raise Refused(
            400, f"This model's maximum context length is {app.context_length} tokens; the input has {longest}."
        )
    priority = priority_of(app, exchange, body)
    app.accept(exchange)
    Pooling(exchange, reply, prompt_tokens=tokens, priority=priority, finished=app.finished).start(app.batch)


def _usage(tokens: Sequence[int]) -> dict[str, Any]:
    total = sum(tokens)
    return {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0, "prompt_tokens_details": None}


def embeddings(app: App, exchange: Exchange) -> None:
    body = json_object(exchange)
    model = model_of(app, body)
    prompts = prompts_of(app, body.get("input"), "input")
    size = number(body, "dimensions", app.options.embedding_size, most=MAX_DIMENSIONS)
    encoded = body.get("encoding_format") == "base64"
    tokens = [prompt.tokens for prompt in prompts]
    head = {"id": app.request_id(exchange, "embd-"), "object": "list", "created": int(time.time()), "model": model}

    def reply() -> bytes:
        data = [
            {"index": index, "object": "embedding", "embedding": _vector(prompt, size, encoded=encoded)}
            for index, prompt in enumerate(prompts)
        ]
        return dumps({**head, "data": data, "usage": _usage(tokens)})

    _pool(app, exchange, body, tokens, reply)


def _vector(prompt: Prompt, size: int, *, encoded: bool) -> list[float] | str:
    vector = embedding(prompt.text, size)
    return base64.b64encode(struct.pack(f"<{size}f", *vector)).decode() if encoded else vector


def scores(app: App, exchange: Exchange) -> None:
    body = json_object(exchange)
    model = model_of(app, body)
    left = texts(body.get("text_1", body.get("queries")), "text_1")
    right = texts(body.get("text_2", body.get("documents")), "text_2")
    if len(left) not in (1, len(right)):
        raise Refused(400, "text_1 must be one text or as many as text_2", param="text_1")
    pairs = list(zip(left * len(right) if len(left) == 1 else left, right, strict=True))
    tokens = [count_tokens(one) + count_tokens(other) for one, other in pairs]
    head = {"id": app.request_id(exchange, "embd-"), "object": "list", "created": int(time.time()), "model": model}

    def reply() -> bytes:
        data = [{"index": i, "object": "score", "score": score(*pair)} for i, pair in enumerate(pairs)]
        return dumps({**head, "data": data, "usage": _usage(tokens)})

    _pool(app, exchange, body, tokens, reply)


def rerank(app: App, exchange: Exchange) -> None:
    body = json_object(exchange)
    model = model_of(app, body)
    query = texts(body.get("query"), "query")[0]
    documents = texts(body.get("documents"), "documents")
    top = number(body, "top_n", len(documents), least=0) or len(documents)
    tokens = [count_tokens(query) + count_tokens(document) for document in documents]

    def reply() -> bytes:
        results = [
            {"index": i, "document": {"text": document}, "relevance_score": score(query, document)}
            for i, document in enumerate(documents)
        ]
        results.sort(key=lambda result: -float(str(result["relevance_score"])))
        usage = {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}
        answer_id = app.request_id(exchange, "rerank-")
        return dumps({"id": answer_id, "model": model, "usage": usage, "results": results[:top]})

    _pool(app, exchange, body, tokens, reply)
