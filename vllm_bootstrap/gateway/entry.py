"""The door of the data plane: may this request come in, as whom, what is it asking for, and how is an engine asked?

Invariant: nobody learns anything without a key: a request is admitted under the rule of the route it names, and where
there is no such route, launch or model, under the rule that any key satisfies, before it is told so. Must not know:
how bodies are read, connections, how slots are given out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_bootstrap.auth.guard import ANY_KEY
from vllm_bootstrap.auth.types import Principal, RequestHead, Rule
from vllm_bootstrap.errors import ApiError, BadRequest, InternalError, MethodNotAllowed, ModelNotFound, NotFound
from vllm_bootstrap.gateway import headers, targets
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.head import Head
from vllm_bootstrap.gateway.intake import Intake
from vllm_bootstrap.gateway.targets import ToLaunch, ToModel
from vllm_bootstrap.gateway.uploads import Upload
from vllm_bootstrap.scheduler.gate import ByLaunch, ByModel, Target, Ticket
from vllm_bootstrap.serving import EngineRoute, Instance, RequestClass

API_VERSION = b"v1"
_BYTES_PER_TOKEN = 4


@dataclass(slots=True)
class Entry:
    """An admitted request. ``path`` is what the engine will be asked for. ``launch`` None: the body's model decides."""

    principal: Principal
    route: EngineRoute
    path: str
    launch: ByLaunch | None


class Outgoing(NamedTuple):
    """What is sent to an engine: a head, then ``body`` or the bytes of ``upload``, if any."""

    head: bytes
    body: bytes | None = None
    upload: Upload | None = None


def admit(gateway: Gateway, head: Head, target: ToModel | ToLaunch) -> Entry:
    """Let a request in or raise ``ApiError`` (400, 401, 403, 404, 405, 409, 415, 421, 503)."""
    if isinstance(target, ToModel):
        entry = _admit_by_model(gateway, head, target)
    else:
        entry = _admit_by_launch(gateway, head, target)
    _check_shape(head, entry.route)
    return entry


def _admit_by_model(gateway: Gateway, head: Head, target: ToModel) -> Entry:
    route = targets.BY_MODEL.get(target.path)
    if route is None or route.method != head.method:
        _principal(gateway, head, ANY_KEY)
        if route is None:
            raise NotFound(f"There is no route {head.method} {target.path}")
        raise MethodNotAllowed(f"{target.path} takes {route.method} only")
    return Entry(_principal(gateway, head, targets.rule_of(route)), route, target.path, None)


def _admit_by_launch(gateway: Gateway, head: Head, target: ToLaunch) -> Entry:
    launch = ByLaunch(target.id)
    route = _route_of(gateway, launch, head.method, target.path)
    principal = _principal(gateway, head, ANY_KEY if route is None else targets.rule_of(route))
    gateway.gate.instance(launch, principal)  # what state a launch is in is told to those only who may use its model
    if route is None:
        raise NotFound(f"The engine of {target.id} may not be asked for {head.method} {target.path}")
    return Entry(principal, route, target.path, launch)


def _route_of(gateway: Gateway, launch: ByLaunch, method: str, path: str) -> EngineRoute | None:
    try:
        return gateway.gate.instance(launch).route(method, path)
    except ApiError:
        return None


def _principal(gateway: Gateway, head: Head, rule: Rule) -> Principal:
    principal = gateway.guard.admit(RequestHead(head.method, head.path, tuple(head.headers), head.query), rule)
    if principal is None:  # only a public rule gives none, and the data plane has no public routes
        raise InternalError("A data-plane route has no rule")
    return principal


def _check_shape(head: Head, route: EngineRoute) -> None:
    if route.websocket and head.upgrade != b"websocket":
        raise BadRequest("This route is a websocket: connect with an Upgrade to 'websocket'", param="upgrade")
    if head.has_body and head.method in targets.SAFE:
        raise BadRequest(f"A {head.method} request takes no body here")
    version = head.first(b"x-api-version")
    if version is not None and version != API_VERSION:
        raise BadRequest("The only API version is 'v1'", param="x-api-version")


def target_of(entry: Entry, head: Head, intake: Intake) -> Target:
    """Whom the scheduler is asked for, now that the body is known. Raises ``BadRequest`` or ``ModelNotFound``."""
    model = targets.model_in_query(head) if entry.route.websocket else intake.model
    if entry.launch is None:
        if model is None:
            raise BadRequest("The request must name a model", param="model")
        return ByModel(model, (head.method, entry.path))
    if model is not None and not entry.principal.may_use(model):
        raise ModelNotFound(f"The model {model!r} does not exist or this key may not use it", param="model")
    return entry.launch


def ticket_of(entry: Entry, head: Head, intake: Intake, body_bytes: int) -> Ticket:
    """What the scheduler must know of the request. Raises ``BadRequest``."""
    principal = entry.principal
    cls = targets.request_class(principal, head.first(b"x-priority"), intake.fields.get("service_tier"))
    sequences = intake.sequences(entry.path, principal.max_sequences)
    return Ticket(principal.name, cls, sequences, body_bytes // _BYTES_PER_TOKEN, principal)


def render(
    head: Head, entry: Entry, intake: Intake, instance: Instance, cls: RequestClass | None, request_id: str
) -> Outgoing:
    """The request as this engine gets it. Raises ``ApiError`` when it cannot be asked."""
    if entry.launch is not None and not instance.offers(head.method, entry.path):  # by model it was asked for already
        raise NotFound(f"The engine may not be asked for {head.method} {entry.path}")
    cls = cls or "realtime"
    if entry.route.websocket:
        return Outgoing(headers.handshake_to_engine(head, entry.path, instance, request_id=request_id, cls=cls))
    body = intake.render(instance, cls)
    upload = intake.upload
    length = upload.size if upload is not None else None if body is None else len(body)
    begin = headers.to_engine(head, entry.path, instance, body_length=length, request_id=request_id, cls=cls)
    return Outgoing(begin, body, upload)
