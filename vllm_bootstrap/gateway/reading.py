"""A request's body on its way in: counted against the memory of all, large uploads moved to disk meanwhile.

Invariant: what is held is accounted for in ``gateway.body_bytes`` from its first byte until ``drop``; while a piece
is parsed or goes to disk the client is not read from. Must not know: what the body is for, keys, queues, engines.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_bootstrap.errors import ApiError, Unavailable
from vllm_bootstrap.gateway import transfer
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.intake import Intake
from vllm_bootstrap.gateway.relay import Client


class Reading:
    """``done`` is called once: with None when the body is whole, or with what is wrong with it."""

    __slots__ = ("_client", "_digesting", "_done", "_dropped", "_ended", "_gateway", "_reserved", "bytes_in", "intake")

    def __init__(
        self, gateway: Gateway, client: Client, intake: Intake, done: Callable[[ApiError | None], None]
    ) -> None:
        self._gateway, self._client, self.intake = gateway, client, intake
        self._done: Callable[[ApiError | None], None] | None = done
        self._digesting: transfer.Transfer | None = None
        self._reserved = self.bytes_in = 0
        self._ended = self._dropped = False

    def feed(self, piece: bytes) -> None:
        if self._done is None:
            return
        intake = self.intake
        self.bytes_in += len(piece)
        try:
            intake.feed(piece)
            self._reserve(intake.in_memory - self._reserved)
        except ApiError as error:
            self._finish(error)
            return
        if intake.upload is not None and intake.upload.has_backlog and self._digesting is None:
            self._client.pause_reading()
            self._digesting = transfer.digest(intake.upload, self._digested)

    def take(self, body: bytes) -> None:
        """All of it at once, without ``done``; not for uploads. Raises what is wrong with it."""
        self._done = None
        self.bytes_in = self._reserved = size = len(body)
        gateway = self._gateway
        gateway.body_bytes = held = gateway.body_bytes + size
        if held > gateway.limits.body_budget_bytes:
            raise _too_much()
        self.intake.feed(body)

    def end(self) -> None:
        """The body is whole."""
        self._ended = True
        if self._digesting is None:
            self._finish(None)

    def _digested(self, problem: ApiError | None) -> None:
        self._digesting = None
        if problem is not None:
            self._finish(problem)
            return
        self._client.resume_reading()
        if self._ended:
            self._finish(None)

    def _reserve(self, size: int) -> None:
        self._reserved += size
        self._gateway.body_bytes += size
        if self._gateway.body_bytes > self._gateway.limits.body_budget_bytes:
            raise _too_much()

    def _finish(self, problem: ApiError | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(problem)

    def stop(self) -> None:
        """Read no further; what is held stays. Idempotent."""
        self._done = None
        if self._digesting is not None:
            self._digesting.cancel()
            self._digesting = None

    def drop(self) -> None:
        """The body is not needed any more. Idempotent."""
        if not self._dropped:
            self._dropped = True
            self._gateway.body_bytes -= self._reserved
            self.intake.close()


def _too_much() -> ApiError:
    return Unavailable("Too many large requests are under way", retry_after=1)
