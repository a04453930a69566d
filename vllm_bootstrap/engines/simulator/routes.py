"""The table of routes: method and path to handler, with the task a route needs. No code of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_bootstrap.engines.simulator import routes_generate as generate
from vllm_bootstrap.engines.simulator import routes_info as info
from vllm_bootstrap.engines.simulator import routes_pooling as pooling
from vllm_bootstrap.engines.simulator import routes_sleep as sleep
from vllm_bootstrap.engines.simulator.app import App
from vllm_bootstrap.engines.simulator.http import Exchange

Handler = Callable[[App, Exchange], None]
REALTIME = "/v1/realtime"
GUARDED = ("/v1", "/v2", "/inference", "/cohere")
DANGEROUS = (
    ("POST", "/invocations"), ("GET", "/server_info"), ("POST", "/pause"), ("POST", "/resume"),
    ("POST", "/reset_prefix_cache"), ("POST", "/update_weights"), ("POST", "/start_profile"),
    ("POST", "/stop_profile"), ("POST", "/abort_requests"), ("POST", "/inference/v1/generate"),
    ("GET", "/docs"), ("GET", "/openapi.json"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Route:
    """``task``: needed for the route to exist. ``work``: refused while draining or when the engine is dead."""

    handler: Handler
    task: str | None = None
    multipart: bool = False

    @property
    def work(self) -> bool:
        return self.task is not None


def _route(handler: Handler, task: str) -> Route:
    return Route(handler, task, multipart=task == "transcription")


ROUTES: Mapping[tuple[str, str], Route] = {
    ("POST", "/v1/chat/completions"): _route(generate.chat, "generate"),
    ("POST", "/v1/completions"): _route(generate.completions, "generate"),
    ("POST", "/v1/responses"): _route(generate.responses, "generate"),
    ("POST", "/v1/messages"): _route(generate.messages, "generate"),
    ("POST", "/v1/messages/count_tokens"): _route(generate.count_message_tokens, "generate"),
    ("POST", "/v1/audio/transcriptions"): _route(generate.transcriptions, "transcription"),
    ("POST", "/v1/audio/translations"): _route(generate.transcriptions, "transcription"),
    ("POST", "/v1/embeddings"): _route(pooling.embeddings, "embed"),
    ("POST", "/score"): _route(pooling.scores, "score"),
    ("POST", "/v1/score"): _route(pooling.scores, "score"),
    ("POST", "/rerank"): _route(pooling.rerank, "score"),
    ("POST", "/v1/rerank"): _route(pooling.rerank, "score"),
    ("POST", "/v2/rerank"): _route(pooling.rerank, "score"),
    ("GET", "/health"): Route(info.health),
    ("GET", "/ping"): Route(info.health),
    ("POST", "/ping"): Route(info.health),
    ("GET", "/version"): Route(info.version),
    ("GET", "/load"): Route(info.server_load),
    ("GET", "/metrics"): Route(info.metrics),
    ("GET", "/v1/models"): Route(info.models),
    ("POST", "/tokenize"): Route(info.tokenize),
    ("POST", "/detokenize"): Route(info.detokenize),
    ("POST", "/v1/load_lora_adapter"): Route(info.load_adapter),
    ("POST", "/v1/unload_lora_adapter"): Route(info.unload_adapter),
    ("GET", "/debug/last_request"): Route(info.last_request),
    ("GET", "/debug/requests"): Route(info.all_requests),
    ("POST", "/collective_rpc"): Route(sleep.collective_rpc),
    ("POST", "/sleep"): Route(sleep.fall_asleep),
    ("POST", "/wake_up"): Route(sleep.wake_up),
    ("GET", "/is_sleeping"): Route(sleep.is_sleeping),
    **{place: Route(info.dangerous) for place in DANGEROUS},
}
PATHS = frozenset(path for _, path in ROUTES)
