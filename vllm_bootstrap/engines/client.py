"""A small HTTP/1.1 client for the daemon's own questions to engines, over a Unix socket or TCP. Not the data plane.

Invariant: each call is bounded in time and in the size of its answer, and takes a connection of its own, so that a
hung engine costs nothing but the call. It must not know launches, states or what the answers mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httptools

from vllm_bootstrap.serving import Endpoint

MAX_ANSWER_BYTES = 8 * 1024 * 1024
CHUNK_BYTES = 64 * 1024


class ProbeError(Exception):
    """The engine gave no usable answer: not reachable, too slow, too large or not HTTP. The message says which."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. Header names are lower case; of repeated headers the last one counts."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """The decoded body, None when it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class EngineClient:
    """Asks one engine. Has no state between calls."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        timeout_s: float,
        content_type: str = "application/json",
        limit: int = MAX_ANSWER_BYTES,
    ) -> Reply:
        """One request, one answer, read whole. Raises ``ProbeError``; nothing is retried."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(self._head(method, path, body, content_type) + (body or b""), limit)
        except TimeoutError:
            raise ProbeError(f"no answer to {method} {path} within {timeout_s:g} s") from None
        except (OSError, EOFError) as exc:
            raise ProbeError(f"{type(exc).__name__} on {method} {path}: {exc}") from exc

    def _head(self, method: str, path: str, body: bytes | None, content_type: str) -> bytes:
        endpoint = self._endpoint
        lines = [f"{method} {endpoint.base_path}{path} HTTP/1.1", f"Host: {endpoint.authority}", "Connection: close"]
        lines.append("Accept: application/json, text/plain")
        if endpoint.credential is not None:
            lines.append(f"Authorization: Bearer {endpoint.credential}")
        if body is not None:
            lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    async def _exchange(self, request: bytes, limit: int) -> Reply:
        reader, writer = await self._connect()
        try:
            writer.write(request)
            return await _read(reader, limit)
        finally:
            writer.close()
            # The answer is what counts; how the engine takes the end of the connection does not.
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        endpoint = self._endpoint
        if endpoint.uds is not None:
            return await asyncio.open_unix_connection(endpoint.uds)
        context = ssl.create_default_context() if endpoint.tls else None
        return await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context)


class _Answer:
    """Collects what the parser finds."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self.body += data
        if len(self.body) > self.limit:
            raise ProbeError(f"the answer is larger than {self.limit} bytes")

    def on_message_complete(self) -> None:
        self.complete = True


async def _read(reader: asyncio.StreamReader, limit: int) -> Reply:
    answer = _Answer(limit)
    parser = httptools.HttpResponseParser(answer)
    received = 0
    while not answer.complete:
        data = await reader.read(CHUNK_BYTES)
        if not data:
            # Without a length, the end of the connection is the end of the answer.
            if received and "content-length" not in answer.headers and "transfer-encoding" not in answer.headers:
                break
            raise EOFError("the connection ended before the answer did")
        received += len(data)
        if received > 2 * limit:
            raise ProbeError(f"the answer is larger than {limit} bytes")
        _feed(parser, data)
    return Reply(parser.get_status_code(), answer.headers, bytes(answer.body))


def _feed(parser: Any, data: bytes) -> None:
    try:
        parser.feed_data(data)
    except httptools.HttpParserCallbackError as exc:
        cause = exc.__context__
        raise cause if isinstance(cause, ProbeError) else ProbeError("the answer could not be taken in") from None
    except httptools.HttpParserError as exc:
        raise ProbeError(f"the answer is not HTTP: {exc}") from None
