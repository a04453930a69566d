"""How the sync client speaks: calls, streams that are taken up again, downloads that go on where they were cut.

Invariant: it differs from the async one (``async_wire``) only in waiting. It knows no route.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

import httpx

from vllm_bootstrap.sdk import calls, transport
from vllm_bootstrap.sdk.calls import Call, StreamCall
from vllm_bootstrap.sdk.discovery import Target
from vllm_bootstrap.sdk.failures import DaemonUnreachable
from vllm_bootstrap.sdk.sse import EventParser, ServerEvent
from vllm_bootstrap.sdk.transfers import Download
from vllm_bootstrap.sdk.transport import Verify
from vllm_bootstrap.sdk.waiting import Patience

T = TypeVar("T")


def _ignore() -> None:
    """Nobody wants to know that the stream has begun."""


class SyncWire:
    """One daemon. May be shared between threads."""

    def __init__(self, target: Target, timeout_s: float, verify: Verify) -> None:
        self.target = target
        # A transport of our own keeps httpx from asking the proxies of the environment.
        own = httpx.HTTPTransport(verify=verify) if target.is_loopback else None
        self._http = httpx.Client(**transport.options(target, timeout_s), transport=own, verify=verify)

    def close(self) -> None:
        self._http.close()

    def events(
        self, method: str, path: str, made: Mapping[str, Any], on_open: Callable[[], None] = _ignore
    ) -> Generator[ServerEvent]:
        """Server-sent events of one answer; ``on_open`` is called when it begins. Ends with the stream."""
        parser = EventParser()
        try:
            with self._http.stream(method, path, **made) as response:
                if not response.is_success:
                    transport.check(response, response.read())
                on_open()
                for chunk in response.iter_bytes():
                    yield from parser.feed(chunk)
        except httpx.TransportError as exc:
            raise transport.unreachable(self.target, exc) from exc

    def follow(self, call: StreamCall) -> Generator[ServerEvent]:
        """A stream until its event ``end``, taken up again behind the last event when it breaks."""
        patience, current = Patience(), call
        while True:
            made = transport.stream_options(current.headers(), current.params, None)
            try:
                for event in self.events("GET", current.path, made, patience.answered):
                    if event.name == "end":
                        return
                    yield event
                    current = calls.resumed(current, event)
                broken = DaemonUnreachable(self.target.url, "the stream ended early")
            except DaemonUnreachable as exc:
                broken = exc
            time.sleep(patience.missed(broken))

    def do(self, call: Call[T]) -> T:
        """One call and its result."""
        try:
            response = self._send(call)
        except httpx.TransportError as exc:
            raise transport.unreachable(self.target, exc) from exc
        return transport.read_answer(call, response)

    def _send(self, call: Call[Any]) -> httpx.Response:
        made = transport.request_options(call)
        try:
            return self._http.request(call.method, call.path, **made)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            if not call.may_repeat:
                raise
        return self._http.request(call.method, call.path, **made)

    def fetch(self, path: str, progress: Download, *, patience: Patience | None = None) -> Generator[bytes]:
        """The bytes of a stored file, from ``progress`` on, which it keeps. A download that is cut goes on where it
        was, as long as ``patience`` lasts."""
        patience = patience or Patience()
        while True:
            try:
                with self._http.stream("GET", path, **transport.download_options(progress.headers())) as response:
                    if not response.is_success:
                        transport.check(response, response.read())
                    progress.opened(response.status_code, response.headers)
                    for chunk in response.iter_bytes():
                        patience.answered()
                        progress.took(len(chunk))
                        yield chunk
                return
            except httpx.TransportError as exc:
                broken = transport.unreachable(self.target, exc)
            time.sleep(patience.missed(broken))

    def lines(self, path: str) -> Generator[bytes]:
        """The bytes of an answer that is made while it is read. Raises ``DaemonUnreachable`` when it is cut."""
        try:
            with self._http.stream("GET", path, **transport.download_options({})) as response:
                if not response.is_success:
                    transport.check(response, response.read())
                yield from response.iter_bytes()
        except httpx.TransportError as exc:
            raise transport.unreachable(self.target, exc) from exc
