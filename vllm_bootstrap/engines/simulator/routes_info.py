"""Routes about the server itself, the tokenizer, and those that no client must ever reach through a proxy.

The dangerous ones (remote calls, sleep, SageMaker's door without a key) answer 200 here, so that a test which
reaches one knows that something let it through.
"""

from __future__ import annotations

from typing import Any

from vllm_bootstrap.engines.simulator.app import App
from vllm_bootstrap.engines.simulator.boot import VERSION
from vllm_bootstrap.engines.simulator.formats import dumps
from vllm_bootstrap.engines.simulator.http import Exchange
from vllm_bootstrap.engines.simulator.metrics import CONTENT_TYPE
from vllm_bootstrap.engines.simulator.requests import Refused, bare, conversation, json_object, model_of, texts
from vllm_bootstrap.engines.simulator.text import pieces

PLAIN = b"text/plain; charset=utf-8"


def health(app: App, exchange: Exchange) -> None:
    """200 while the engine process lives, as vLLM: it does not notice an engine that only hangs."""
    status = 503 if app.batch.dead else 200
    if app.options.health_delay:
        app.call_later(app.options.health_delay, lambda: exchange.respond(status, b""))
    else:
        exchange.respond(status, b"")


def version(app: App, exchange: Exchange) -> None:  # noqa: ARG001
    exchange.respond(200, dumps({"version": VERSION}))


def server_load(app: App, exchange: Exchange) -> None:  # noqa: ARG001
    exchange.respond(200, dumps({"server_load": 0}))


def models(app: App, exchange: Exchange) -> None:
    card = {"object": "model", "created": app.started, "owned_by": "vllm", "root": app.options.model, "parent": None}
    rest: dict[str, Any] = {"max_model_len": app.context_length, "permission": []}
    exchange.respond(200, dumps({"object": "list", "data": [{"id": name, **card, **rest} for name in app.names]}))


def metrics(app: App, exchange: Exchange) -> None:
    exchange.respond(200, app.metrics.render(app.names[0], app.gauges()), CONTENT_TYPE)


def tokenize(app: App, exchange: Exchange) -> None:
    body = json_object(exchange)
    model_of(app, body)
    talk = body.get("messages")
    text = texts(body.get("prompt"), "prompt")[0] if talk is None else conversation(talk).text
    tokens = app.vocabulary.encode(text)
    strings = pieces(text) if body.get("return_token_strs") is True else None
    answer = {"count": len(tokens), "max_model_len": app.context_length, "tokens": tokens, "token_strs": strings}
    exchange.respond(200, dumps(answer))


def detokenize(app: App, exchange: Exchange) -> None:
    body = json_object(exchange)
    model_of(app, body)
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise Refused(400, "tokens must be a list of integers", param="tokens")
    exchange.respond(200, dumps({"prompt": app.vocabulary.decode(tokens)}))


def load_adapter(app: App, exchange: Exchange) -> None:
    name = _adapter_name(app, exchange)
    if name in app.names:
        raise Refused(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
    app.names.append(name)
    exchange.respond(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), PLAIN)


def unload_adapter(app: App, exchange: Exchange) -> None:
    name = _adapter_name(app, exchange)
    if name not in app.names[len(app.options.names) :]:
        raise Refused(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
    app.names.remove(name)
    exchange.respond(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), PLAIN)


def _adapter_name(app: App, exchange: Exchange) -> str:
    if not app.may_load_adapters:
        raise bare(404)
    return texts(json_object(exchange).get("lora_name"), "lora_name")[0]


def dangerous(app: App, exchange: Exchange) -> None:  # noqa: ARG001
    exchange.respond(200, dumps({"reached": exchange.path}))


def last_request(app: App, exchange: Exchange) -> None:
    """The newest request received, of the path given as ``?path=``, if given."""
    wanted = exchange.target.partition(b"?path=")[2].decode("latin-1")
    found = [r for r in app.received if not wanted or r["target"].partition("?")[0] == wanted]
    if not app.options.echo_headers or not found:
        raise bare(404)
    exchange.respond(200, dumps(found[-1]))


def all_requests(app: App, exchange: Exchange) -> None:
    if not app.options.echo_headers:
        raise bare(404)
    exchange.respond(200, dumps({"requests": list(app.received)}))
