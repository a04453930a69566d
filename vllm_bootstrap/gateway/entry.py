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
from vllm_bootstrap.gateway import estimates, headers, sticky, targets
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.head import Head, parse_head
from vllm_bootstrap.gateway.intake import Intake
from vllm_bootstrap.gateway.targets import ToLaunch, ToModel
from vllm_bootstrap.gateway.uploads import Upload
from vllm_bootstrap.models.types import Rewrite
from vllm_bootstrap.scheduler.gate import ByLaunch, ByModel, Target, Ticket
from vllm_bootstrap.serving import EngineRoute, Instance, RequestClass

API_VERSION = b"v1"
REPLAYED_BYTES = 256 * 1024
"""Longest body of a batch request that is taken back from an engine to be sent again later."""


@dataclass(slots=True)
class Entry:
    """An admitted request. ``path`` is what the engine will be asked for. ``launch`` None: the body's model decides.
    ``cls``: its class, unless its body asks for less. ``keeps_responses``: engines may keep what such requests are
    answered, and later ones may name it. ``hold_s`` and ``shows_progress``: see ``targets.cold_start``."""

    principal: Principal
    route: EngineRoute
    path: str
    launch: ByLaunch | None
    cls: RequestClass = "realtime"
    keeps_responses: bool = False
    hold_s: float | None = None
    shows_progress: bool = False


class Outgoing(NamedTuple):
    """What is sent to an engine: a head, then ``body`` or the bytes of ``upload``, if any. ``adds_usage``: it asks for
    a usage event that the client has not asked for."""

    head: bytes
    body: bytes | None = None
    upload: Upload | None = None
    adds_usage: bool = False


def admit(gateway: Gateway, head: Head, target: ToModel | ToLaunch) -> Entry:
    """Let a request in or raise ``ApiError`` (400, 401, 403, 404, 405, 409, 415, 421, 503)."""
    memory = head.memory
    if memory is not None:  # it has no key in its headers
        if gateway.guard.readmit(memory.permit) is not None:
            known: Entry = memory.entry
            return known
        head = parse_head(head.raw, gateway.head_limits)
    if isinstance(target, ToModel):
        entry = _admit_by_model(gateway, head, target)
    else:
        entry = _admit_by_launch(gateway, head, target)
    _check_shape(head, entry.route)
    entry.keeps_responses = entry.path.endswith(sticky.MAKES)
    if entry.route.inference:
        entry.cls = targets.request_class(entry.principal, head.first(b"x-priority"))
        if entry.launch is None:
            entry.hold_s, entry.shows_progress = targets.cold_start(entry.principal, head.first(b"x-cold-start"))
    # An entry by launch depends on more than head and key; the head of a form names a boundary that never comes again.
    by_heart = entry.launch is None and entry.route.inference and not entry.route.multipart
    if by_heart and (memory is not None or gateway.heads.comes_again(head)):
        permit = gateway.guard.remember(_head_for_guard(head), entry.principal)
        if permit is not None and memory is None:
            gateway.heads.remember(head, target, entry, permit)
        elif permit is not None:  # the same head after keys were changed
            memory.entry, memory.permit = entry, permit
    return entry


def _admit_by_model(gateway: Gateway, head: Head, target: ToModel) -> Entry:
    route = targets.BY_MODEL.get(target.path) or targets.stateful(target.path)
    if route is None or route.method != head.method:
        _principal(gateway, head, ANY_KEY)
        if route is None:
            raise NotFound(f"There is no route {head.method} {target.path}")
        raise MethodNotAllowed(f"{target.path} takes {route.method} only")
    principal = _principal(gateway, head, targets.rule_of(route))
    launch = None
    if route in targets.STATEFUL:
        launch = ByLaunch(gateway.responses.find(sticky.named_in(target.path), principal.name))
    return Entry(principal, route, target.path, launch)


def _admit_by_launch(gateway: Gateway, head: Head, target: ToLaunch) -> Entry:
    launch = ByLaunch(target.id)
    route = _route_of(gateway, launch, head.method, target.path)
    principal = _principal(gateway, head, ANY_KEY if route is None else targets.rule_of(route))
    gateway.gate.instance(launch, principal)  # what state a launch is in is told to those only who may use its model
    if route is None:
        raise NotFound(f"The engine of {target.id} may not be asked for {head.method} {target.path}")
    if targets.stateful(target.path) is not None:
        launch = _maker(gateway, sticky.named_in(target.path), principal, launch)
    return Entry(principal, route, target.path, launch)


def _maker(gateway: Gateway, response_id: str, principal: Principal, asked: ByLaunch) -> ByLaunch:
    """The launch that made a response, which must be the one that was asked, or of its group."""
    made_by = ByLaunch(gateway.responses.find(response_id, principal.name))
    if made_by != asked and gateway.gate.instance(made_by, principal).group_id != asked.id:
        raise NotFound(f"There is no response {response_id!r} on {asked.id}", param="response_id")
    return made_by


def _route_of(gateway: Gateway, launch: ByLaunch, method: str, path: str) -> EngineRoute | None:
    try:
        return gateway.gate.instance(launch).route(method, path)
    except ApiError:
        return None


def _principal(gateway: Gateway, head: Head, rule: Rule) -> Principal:
    principal = gateway.guard.admit(_head_for_guard(head), rule)
    if principal is None:  # only a public rule gives none, and the data plane has no public routes
        raise InternalError("A data-plane route has no rule")
    return principal


def _head_for_guard(head: Head) -> RequestHead:
    return RequestHead(head.method, head.path, tuple(head.headers), head.query)


def known_key(gateway: Gateway, head: Head) -> Principal | None:
    """Whose key a refused request carries, None when it carries none that is valid."""
    try:
        if head.memory is not None:
            head = parse_head(head.raw, gateway.head_limits)
        return _principal(gateway, head, ANY_KEY)
    except ApiError:
        return None


def _check_shape(head: Head, route: EngineRoute) -> None:
    if route.websocket and head.upgrade != b"websocket":
        raise BadRequest("This route is a websocket: connect with an Upgrade to 'websocket'", param="upgrade")
    if head.has_body and head.method in targets.SAFE:
        raise BadRequest(f"A {head.method} request takes no body here")
    version = head.first(b"x-api-version")
    if version is not None and version != API_VERSION:
        raise BadRequest("The only API version is 'v1'", param="x-api-version")


def rewrite_unnamed(gateway: Gateway, entry: Entry) -> Rewrite | None:
    """How a body that names no model is to be changed: as for the first name of the launch it goes to."""
    if entry.launch is None:
        return None
    for advert in gateway.gate.adverts():
        if entry.launch.id in (advert.launch_id, advert.group_id) and advert.served_names:
            return gateway.rewrite_of(advert.served_names[0])
    return None


def target_of(gateway: Gateway, entry: Entry, model: str | None, head: Head, intake: Intake) -> Target:
    """Whom the scheduler is asked for, now that the body is known. Raises ``BadRequest`` or ``NotFound``."""
    principal = entry.principal
    if entry.launch is None and model is None:
        raise BadRequest("The request must name a model", param="model")
    before = sticky.named_before(entry.path, intake.fields) if entry.keeps_responses else None
    if before is None and entry.launch is None and model is not None:
        return tuple.__new__(ByModel, (model, (head.method, entry.path)))
    if model is not None and not principal.may_use(model):
        raise ModelNotFound(f"The model {model!r} does not exist or this key may not use it", param="model")
    if before is None:
        assert entry.launch is not None  # noqa: S101 - else it went by its model
        return entry.launch
    if entry.launch is None:
        return ByLaunch(gateway.responses.find(before, principal.name))
    return _maker(gateway, before, principal, entry.launch)


def ticket_of(entry: Entry, intake: Intake, body_bytes: int) -> Ticket:
    """What the scheduler must know of the request. Raises ``BadRequest``."""
    principal, fields = entry.principal, intake.fields
    cls: RequestClass = "batch" if fields.get("service_tier") == "flex" else entry.cls
    sequences = intake.sequences(entry.path, principal.max_sequences)
    prompt = estimates.prompt_tokens(body_bytes, intake.text)
    output = estimates.output_tokens(entry.path, fields, sequences)
    replayable = cls == "batch" and intake.in_memory > 0 and body_bytes <= REPLAYED_BYTES
    # As Ticket(…), without a call in between; so below.
    return tuple.__new__(Ticket, (principal.name, cls, sequences, prompt, principal, output, 0, body_bytes, replayable))


def render(
    head: Head, entry: Entry, intake: Intake, instance: Instance, cls: RequestClass | None, request_id: str
) -> Outgoing:
    """The request as this engine gets it. Raises ``ApiError`` when it cannot be asked."""
    if entry.launch is not None and not instance.offers(head.method, entry.path):  # by model it was asked for already
        raise NotFound(f"The engine may not be asked for {head.method} {entry.path}")
    cls = cls or "realtime"
    if entry.route.websocket:
        return Outgoing(headers.handshake_to_engine(head, entry.path, instance, request_id=request_id, cls=cls))
    body = intake.render(instance, cls, entry.path)
    upload = intake.upload
    length = upload.size if upload is not None else None if body is None else len(body)
    begin = headers.to_engine(head, entry.path, instance, body_length=length, request_id=request_id, cls=cls)
    return tuple.__new__(Outgoing, (begin, body, upload, intake.adds_usage))
