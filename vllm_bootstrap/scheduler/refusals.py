"""Why a request cannot be sent anywhere now, in the words and statuses of the public surface. PURE.

Invariant: every state a launch can be in has one answer for requests by model and one for requests by id; what may
succeed later says when to try again.
"""

from __future__ import annotations

from vllm_bootstrap.errors import (
    ApiError,
    Draining,
    LaunchNotReady,
    ModelLoading,
    ModelNotFound,
    NotFound,
    QueueFull,
    Unavailable,
)
from vllm_bootstrap.scheduler.pace import DEFAULT_RETRY_S
from vllm_bootstrap.scheduler.ports import Prospects
from vllm_bootstrap.scheduler.shelf import QueueBounds, Shelf
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Ticket
from vllm_bootstrap.serving import Advert, RequestClass

ENDED = frozenset({"stopped", "failed"})
_MIB = 1024 * 1024
WORTH_TELLING_S = 0.05


def draining() -> ApiError:
    """Case 1."""
    return Draining("The daemon is stopping: send this again when it is back", retry_after=DEFAULT_RETRY_S)


def queue_full(shelf: Shelf, ticket: Ticket, bounds: QueueBounds, now: float) -> ApiError:
    """Case 8: nothing is free and no more may wait. ``shelf`` as it is without the request."""
    wait = shelf.clears_in(ticket.cls, now)
    requests, held = shelf.counted(bounds)
    if requests >= bounds.requests:
        return QueueFull(
            f"The queue of {shelf.name!r} is full: {requests} requests are waiting, the most this server allows "
            "for a model. Send it later",
            retry_after=wait,
        )
    return QueueFull(
        f"The queue of {shelf.name!r} is full: the waiting requests hold {held / _MIB:.1f} MiB, and with "
        f"this one's {ticket.body_bytes / _MIB:.1f} that would be more than the {bounds.body_bytes / _MIB:.1f} MiB "
        "this server keeps for a model. Send it later",
        retry_after=wait,
    )


def displaced(shelf: Shelf, now: float) -> ApiError:
    """Case 8, for a batch request that waited: a realtime request needs its place in the queue."""
    return QueueFull(
        f"The queue of {shelf.name!r} is full, and realtime requests come before batch: this one has lost its place in "
        "it. Send it later",
        retry_after=shelf.clears_in("batch", now),
    )


def expired(shelf: Shelf, cls: RequestClass, waited_s: float, now: float) -> ApiError:
    """It has waited as long as it may."""
    ahead = "realtime and earlier requests came first" if cls == "batch" else "others came first"
    return Unavailable(
        f"No place at {shelf.name!r} came free for it within {waited_s:.0f} s: {ahead}, {shelf.depth} still wait. "
        "Send it later",
        retry_after=shelf.clears_in(cls, now),
    )


def model_refusal(target: ByModel, adverts: list[Advert]) -> ApiError:
    """Case 2 and 3 for a model name."""
    alive = [advert for advert in adverts if advert.state not in ENDED]
    if not alive:
        return ModelNotFound(f"The model {target.name!r} does not exist or this key may not use it", param="model")
    if any(advert.instance is not None for advert in alive):  # routable, so it must be the route that is missing
        method, path = target.route or ("", "")
        return NotFound(f"The engine that serves {target.name!r} has no {method} {path}")
    waits = [advert.retry_after_s for advert in alive if advert.retry_after_s is not None]
    wait = min(waits, default=DEFAULT_RETRY_S)
    states = {advert.state for advert in alive}
    if "bootstrapping" in states:
        return ModelLoading(f"The model {target.name!r} is loading", retry_after=wait)
    if states & {"falling_asleep", "asleep", "waking"}:
        return ModelLoading(f"The model {target.name!r} sleeps or is waking", retry_after=wait)
    if "ready" in states:
        return Unavailable(f"The engine of {target.name!r} does not respond at present", retry_after=wait)
    return Draining(f"The model {target.name!r} is being stopped", retry_after=wait)


def loading(name: str, prospects: Prospects, held_s: float | None = None) -> ApiError:
    """Case 5 for a model that is loaded on demand: it is not there yet. ``held_s``: so long the request has waited."""
    obstacle, ready_in_s = prospects.waits_for(name), prospects.ready_in_s(name)
    said = "is being loaded" if obstacle is None else f"is not loaded yet: {obstacle}"
    held = ""
    if held_s is not None and held_s > WORTH_TELLING_S:
        held = f". This request was held for {held_s:.{0 if held_s >= 10 else 1}f} s"
    wait = DEFAULT_RETRY_S if ready_in_s is None else ready_in_s
    return ModelLoading(f"The model {name!r} {said}{held}. Send it again later", retry_after=wait)


def launch_refusal(target: ByLaunch, adverts: list[Advert], *, ended: bool) -> ApiError:
    """Case 2 and 3 for an id."""
    alive = [advert for advert in adverts if advert.state not in ENDED]
    if not alive:
        if adverts or ended:
            return LaunchNotReady(f"The launch {target.id} has ended", should_retry=False)
        return NotFound(f"There is no launch {target.id}, or this key may not use its model")
    advert = min(alive, key=lambda one: one.retry_after_s is None)
    wait = DEFAULT_RETRY_S if advert.retry_after_s is None else advert.retry_after_s
    if advert.state == "ready":
        return Unavailable(f"The engine of launch {target.id} does not respond at present", retry_after=wait)
    state = advert.state.replace("_", " ")
    return LaunchNotReady(f"The launch {target.id} is {state}", retry_after=wait, should_retry=state != "asleep")
