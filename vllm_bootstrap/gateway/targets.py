"""Where a request of the data plane wants to go, and under which rule and class. PURE.

Invariant: what is not in a table is not reachable. ``/v1/*`` has its own table here (the routes that are routed by a
model's name); ``/proxy/{id}/*`` uses the engine's table, which travels in its ``Instance``. Paths of the data plane
have exactly one spelling, so what is matched here is byte for byte what the engine will see.
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple
from urllib.parse import parse_qs

from vllm_bootstrap.auth.scopes import INFERENCE, REALTIME, allows
from vllm_bootstrap.auth.types import Principal, Rule
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.gateway.head import Head
from vllm_bootstrap.serving import EngineRoute, RequestClass

JSON = ("application/json",)
MULTIPART = ("multipart/form-data",)


def _post(path: str, *, multipart: bool = False) -> EngineRoute:
    return EngineRoute("POST", path, INFERENCE, inference=True, multipart=multipart)


BY_MODEL: dict[str, EngineRoute] = {
    route.path: route
    for route in (
        _post("/v1/chat/completions"),
        _post("/v1/completions"),
        _post("/v1/responses"),
        _post("/v1/embeddings"),
        _post("/v1/rerank"),
        _post("/v1/score"),
        _post("/v1/messages"),
        _post("/v1/messages/count_tokens"),
        _post("/v1/audio/transcriptions", multipart=True),
        _post("/v1/audio/translations", multipart=True),
        EngineRoute("GET", "/v1/realtime", INFERENCE, inference=True, websocket=True),
    )
}

STATEFUL = (
    EngineRoute("GET", "/v1/responses/*", INFERENCE),
    EngineRoute("POST", "/v1/responses/*/cancel", INFERENCE),
)
"""Routes of one stored response: they go to the engine that made it, for the key that asked it to."""

# Below /v1, but answered by the control plane.
_CONTROL_V1 = re.compile(r"/v1/models(?:/.*)?")
_DURABLE_V1 = re.compile(r"/v1/(?:files|batches|batch)(?:/.*)?")
_ADAPTERS = re.compile(r"/models/.+/adapters", re.DOTALL)
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]+)+/?")
_REALTIME = frozenset({REALTIME})
_RULES: dict[tuple[frozenset[str], bool], Rule] = {}


class ToModel(NamedTuple):
    """``/v1/*``: to whatever serves the model the request names."""

    path: str


class ToLaunch(NamedTuple):
    """``/proxy/{id}/{path}``: to one launch or group. ``path`` starts with a slash."""

    id: str
    path: str


def find(method: str, path: str) -> ToModel | ToLaunch | None:
    """The data-plane target of a request, None when it belongs to the control plane. Raises ``BadRequest`` for a
    data-plane path that is not spelled plainly (percent-encoding has no use in any engine's routes)."""
    if path.startswith("/v1/"):
        if (method in SAFE and _CONTROL_V1.fullmatch(path)) or _DURABLE_V1.fullmatch(path):
            return None
        _require_plain(path)
        return ToModel(path)
    if path.startswith("/proxy/"):
        _require_plain(path)
        launch_id, slash, rest = path[len("/proxy/") :].partition("/")
        return ToLaunch(launch_id, slash + rest if slash else "/")
    return None


def file_brought(method: str, path: str) -> Literal["file", "adapter"] | None:
    """What a request of the control plane carries that may be longer than other bodies."""
    if method != "POST":
        return None
    if path == "/v1/files":
        return "file"
    return "adapter" if _ADAPTERS.fullmatch(path) else None


def _require_plain(path: str) -> None:
    if _PLAIN_PATH.fullmatch(path) is None:
        raise BadRequest("Paths of the data plane take no percent-encoding: spell the path plainly")


def stateful(path: str) -> EngineRoute | None:
    """The route of a stored response that ``path`` names."""
    if not path.startswith("/v1/responses/"):
        return None
    return next((route for route in STATEFUL if route.matches(route.method, path)), None)


def rule_of(route: EngineRoute) -> Rule:
    """The access rule of an engine's route."""
    key = (route.scopes, route.multipart)
    if key not in _RULES:
        _RULES[key] = Rule(scopes=route.scopes, media=MULTIPART if route.multipart else JSON)
    return _RULES[key]


def request_class(principal: Principal, x_priority: bytes | None) -> RequestClass:
    """Realtime, unless the key has no right to it or the request's head asks for less. Raises ``BadRequest`` for a word
    that ``X-Priority`` does not know."""
    if x_priority is not None and x_priority not in (b"realtime", b"batch"):
        raise BadRequest("X-Priority is 'realtime' or 'batch'", param="x-priority")
    batch_only = principal.max_class == "batch" or not allows(principal.scopes, _REALTIME)
    return "batch" if batch_only or x_priority == b"batch" else "realtime"


def cold_start(principal: Principal, word: bytes | None) -> tuple[float | None, bool]:
    """For how many seconds a request may wait while nothing serves its model (None: as the daemon is set), and whether
    its client wants to be told how the load goes. ``word``: its ``X-Cold-Start``. Who is told waits as long as it
    takes: where an answer has begun, nobody can be sent away to come again. Raises ``BadRequest``."""
    own = principal.cold_start_hold_s
    if word is None:
        return own, False
    if word == b"error":
        return 0.0, False
    if word == b"wait":
        return own or None, False
    if word == b"progress":
        return own or math.inf, True
    raise BadRequest("X-Cold-Start is 'wait', 'error' or 'progress'", param="x-cold-start")


def model_in_query(head: Head) -> str | None:
    """The ``model`` of a websocket handshake's query string. Raises ``BadRequest`` when it is given twice."""
    try:
        found = parse_qs(head.query.decode("ascii"), max_num_fields=50).get("model", [])
    except ValueError:
        raise BadRequest("The query string has too many fields") from None
    if len(found) > 1:
        raise BadRequest("The model may be named once only", param="model")
    return found[0] if found else None
