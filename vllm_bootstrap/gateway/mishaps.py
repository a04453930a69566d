"""A mistake of ours in the middle of a request ends that request: at once, with an answer, and with a word in the log.

Invariant: whatever a step raises, the request's place is given back and its client is answered or cut. Such an
exception never gets to the event loop, which would only log it and let the client wait, nor to a parser, which would
take it for bad bytes. Must not know: what the steps are for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from enum import IntEnum
from typing import Concatenate, ParamSpec, TypeVar

from vllm_bootstrap.errors import ApiError, InternalError
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.journey import Journey
from vllm_bootstrap.gateway.place import Place

_log = logging.getLogger(__name__)

_Self = TypeVar("_Self", bound="Mishaps")
_Args = ParamSpec("_Args")

STEPS = frozenset({
    "start", "start_whole", "take_in", "on_body", "on_body_end", "on_place", "on_no_place", "on_revoked",
    "on_unreachable", "on_broken", "on_upstream_writable", "tick", "cancel", "cancel_from_outside", "rights_changed",
    "stop",
})  # fmt: skip
"""What the loop, parsers, timers and other requests call: each must be ``guarded``. ``on_received`` is not among them:
it runs for each chunk, and who calls it looks after it (``UpstreamConnection``)."""


class Mishaps:
    """Base of a request's journey: its ``STEPS`` are ``guarded``."""

    _gateway: Gateway
    _place: Place
    _journey: Journey
    _stage: IntEnum
    request_id: str

    def fail(self, error: ApiError) -> None:
        """It cannot be completed: answer with ``error``, or end the answer that has begun."""
        raise NotImplementedError

    def give_up(self) -> None:
        """``fail`` has failed: let whoever waits wait no longer."""
        raise NotImplementedError

    def on_crash(self) -> None:
        """A step has raised what it should not (called where that is being handled)."""
        _log.exception("request %s failed by a mistake of ours", self.request_id)
        before, answered = self._stage, False
        try:
            self.fail(InternalError("The daemon failed to carry this request; its log says why."))
            answered = self._stage is not before  # else it was just being ended
        except Exception:  # noqa: BLE001 - the last resort must work whatever is broken
            _log.exception("and it could not even be answered")
        if not answered:
            self._place.leave(None, "finished")
            self._gateway.inflight.remove(self._journey.id)
            self.give_up()


def guarded(step: Callable[Concatenate[_Self, _Args], None]) -> Callable[Concatenate[_Self, _Args], None]:
    """A step whose mistakes end the request (``on_crash``) and go no further."""

    @functools.wraps(step)
    def guard(self: _Self, /, *args: _Args.args, **named: _Args.kwargs) -> None:
        try:
            step(self, *args, **named)
        except Exception:  # noqa: BLE001 - that is what it is for
            self.on_crash()

    return guard
