"""Why a request cannot be sent anywhere now, in the words and statuses of the public surface. PURE.

Invariant: every state a launch can be in has one answer for requests by model and one for requests by id; what may
succeed later says when to try again.
"""

from __future__ import annotations

from vllm_bootstrap.errors import ApiError, Draining, LaunchNotReady, ModelLoading, ModelNotFound, NotFound, Unavailable
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel
from vllm_bootstrap.serving import Advert

ENDED = frozenset({"stopped", "failed"})
DEFAULT_RETRY_S = 5.0
"""Used for Retry-After as long as nothing better is known (no ETA, no measured drain)."""


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
    if "ready" in states:
        return Unavailable(f"The engine of {target.name!r} does not respond at present", retry_after=wait)
    return Draining(f"The model {target.name!r} is being stopped", retry_after=wait)


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
    return LaunchNotReady(f"The launch {target.id} is {advert.state}", retry_after=wait, should_retry=True)
