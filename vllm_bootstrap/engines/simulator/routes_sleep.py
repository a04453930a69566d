"""vLLM's development routes that put it to sleep, wake it, and have it load its weights again."""

from __future__ import annotations

from collections.abc import Callable

from vllm_bootstrap.engines.simulator.app import App
from vllm_bootstrap.engines.simulator.formats import dumps
from vllm_bootstrap.engines.simulator.http import Exchange
from vllm_bootstrap.engines.simulator.requests import Refused, json_object
from vllm_bootstrap.engines.simulator.routes_info import dangerous

Handler = Callable[[App, Exchange], None]


def _where_possible(handler: Handler) -> Handler:
    """Without sleep mode the routes are there all the same, for tests that must not reach them."""

    def handle(app: App, exchange: Exchange) -> None:
        (handler if app.doze.possible else dangerous)(app, exchange)

    return handle


@_where_possible
def fall_asleep(app: App, exchange: Exchange) -> None:
    doze = app.doze
    level = _query(exchange, b"level") or "1"
    if level not in ("0", "1", "2"):
        raise Refused(400, "level must be 0, 1 or 2")

    def done() -> None:
        doze.fall_asleep(int(level))
        exchange.respond(200, dumps({"status": "sleeping", "level": int(level)}))

    app.call_later(app.options.sleep_seconds, done)


@_where_possible
def wake_up(app: App, exchange: Exchange) -> None:
    doze, tag = app.doze, _query(exchange, b"tags")
    if app.options.wake_fails == "hang":
        return
    if app.options.wake_fails == "error":
        raise Refused(500, "CUDA out of memory on purpose: wake_fails", "InternalServerError")

    def done() -> None:
        if doze.level:
            doze.wake(computing=tag != "weights")
        exchange.respond(200, dumps({"status": "sleeping" if doze.level else "awake"}))

    # With tags the weights come first; they are what takes long.
    app.call_later(0 if tag == "kv_cache" else app.options.wake_seconds, done)


@_where_possible
def is_sleeping(app: App, exchange: Exchange) -> None:
    exchange.respond(200, dumps({"is_sleeping": bool(app.doze.level)}))


@_where_possible
def collective_rpc(app: App, exchange: Exchange) -> None:
    doze = app.doze
    if json_object(exchange).get("method") != "reload_weights":
        raise Refused(500, "unknown method", "InternalServerError")
    doze.reload()
    exchange.respond(200, dumps({"results": [None]}))


def _query(exchange: Exchange, name: bytes) -> str | None:
    for pair in exchange.target.partition(b"?")[2].split(b"&"):
        key, _, value = pair.partition(b"=")
        if key == name:
            return value.decode("latin-1")
    return None
