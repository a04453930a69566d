"""Taking in a request's body, whatever kind it is, and giving it out again as an engine should get it.

Invariant: a body is bounded before it is kept, read once, and judged as a whole before anything of it is sent. Must
not know: keys, queues, connections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from vllm_bootstrap.errors import PayloadTooLarge, UnsupportedMediaType
from vllm_bootstrap.gateway import bodies, headers
from vllm_bootstrap.gateway.head import Head
from vllm_bootstrap.gateway.limits import GatewayLimits
from vllm_bootstrap.gateway.uploads import Spool, Upload
from vllm_bootstrap.models.types import Rewrite
from vllm_bootstrap.serving import EngineRoute, Instance, RequestClass


class Intake(Protocol):
    """``feed`` pieces, ``finish``; then the rest. ``upload`` is set when the bytes must be fetched with ``chunks``.
    ``in_memory`` counts what a budget of memory must cover. ``adds_usage``: what was rendered asks the engine for a
    usage event that the client has not asked for."""

    in_memory: int
    upload: Upload | None
    adds_usage: bool

    def feed(self, piece: bytes) -> None:
        """Take one piece. Raises ``ApiError`` when the body may not be this."""

    def finish(self) -> None:
        """The body is whole: judge it. Raises ``ApiError``."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """Top-level values, as far as they are judged."""

    @property
    def text(self) -> str | None:
        """A JSON body as text, None for others."""

    @property
    def model(self) -> str | None:
        """The model it names."""

    def rewrite(self, by: Rewrite) -> int:
        """Change a JSON body so; what is asked afterwards is said of the changed one. Returns by how many bytes it has
        grown. Raises ``ApiError``."""

    def sequences(self, path: str, most: int | None) -> int:
        """How many sequences an engine will run for it. Raises ``BadRequest`` above ``most``."""

    def render(self, instance: Instance, cls: RequestClass, path: str) -> bytes | None:
        """The body for that engine, None when there is none or it is an upload. Raises ``BadRequest``."""

    def close(self) -> None:
        """Free what is held. Idempotent."""


def make_intake(head: Head, route: EngineRoute, limits: GatewayLimits, spool: Spool) -> Intake:
    """What fits this request. Raises ``ApiError`` for a body that is refused unread."""
    most = limits.max_upload_bytes if route.multipart else limits.max_body_bytes
    if head.content_length is not None and head.content_length > most:
        raise PayloadTooLarge(f"The body is larger than {most} bytes")
    if not (head.content_length or head.chunked or (route.inference and head.method == "POST")):
        return NoBody()
    encoding = head.first(b"content-encoding")
    if encoding is not None and encoding.lower() != b"identity":
        raise UnsupportedMediaType("Compressed bodies are not taken", param="content-encoding")
    if route.multipart:
        return FormIntake(Upload(head.first(b"content-type") or b"", max_bytes=most, spool=spool))
    return JsonIntake(most)


_NO_FIELDS: Mapping[str, Any] = {}


class NoBody:
    """A request without a body."""

    upload: Upload | None = None
    adds_usage = False
    in_memory = 0
    fields: Mapping[str, Any] = _NO_FIELDS
    text: str | None = None
    model: str | None = None

    def feed(self, piece: bytes) -> None:
        """Nothing comes: such a request has no body by its head."""

    def finish(self) -> None:
        """Nothing to judge."""

    def rewrite(self, by: Rewrite) -> int:  # noqa: ARG002 - the interface's
        return 0

    def sequences(self, path: str, most: int | None) -> int:  # noqa: ARG002 - the interface's
        return 1

    def render(self, instance: Instance, cls: RequestClass, path: str) -> bytes | None:  # noqa: ARG002 - the interface's
        return None

    def close(self) -> None:
        """Nothing is held."""


class JsonIntake:
    """A JSON object, kept in memory."""

    upload: Upload | None = None

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._body: bodies.JsonBody | None = None
        self.fields: Mapping[str, Any] = _NO_FIELDS
        self.text: str | None = None
        self.model: str | None = None
        self.adds_usage, self.in_memory = False, 0

    def feed(self, piece: bytes) -> None:
        self.in_memory += len(piece)
        if self.in_memory > self._max_bytes:
            raise PayloadTooLarge(f"The body is larger than {self._max_bytes} bytes")
        self._pieces.append(piece)

    def finish(self) -> None:
        pieces, self._pieces = self._pieces, []
        self._body = body = bodies.parse(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        self.fields, self.text = body.fields, body.text
        bodies.refuse_fields(body.fields)
        self.model = body.model

    def rewrite(self, by: Rewrite) -> int:
        body = self._body
        if body is None:
            return 0
        self._body = changed = bodies.rewritten(body, by)
        self.fields, self.text = changed.fields, changed.text
        return len(changed.raw) - len(body.raw)

    def sequences(self, path: str, most: int | None) -> int:
        return bodies.check_sequences(path, self.fields, most)

    def render(self, instance: Instance, cls: RequestClass, path: str) -> bytes | None:
        body = self._body
        if body is None:
            return None
        if instance.refuses_http_media and body.names_urls:
            bodies.refuse_remote_media(body.fields)
        priority = headers.priority(cls) if instance.priority_field else None
        streamed = self.fields.get("stream") is True and path in bodies.USAGE_ON_REQUEST
        wish = bodies.asking_for_usage(body) if streamed else None
        self.adds_usage = wish is not None
        if priority is None and wish is None and bodies.OVERWRITTEN not in self.fields:
            return body.raw
        values: dict[str, object] = {bodies.OVERWRITTEN: priority}
        if wish is not None:
            values["stream_options"] = wish
        return bodies.with_members(body, values)

    def close(self) -> None:
        self._pieces = []
        self._body = self.text = None
        self.fields = _NO_FIELDS


class FormIntake:
    """A multipart form with a file in it. What grows beyond memory goes to a temporary file (see ``uploads``)."""

    in_memory = 0  # bounded by itself
    adds_usage = False
    text: str | None = None

    def __init__(self, upload: Upload) -> None:
        self.upload: Upload | None = upload
        self._upload = upload

    def feed(self, piece: bytes) -> None:
        self._upload.feed(piece)

    def finish(self) -> None:
        self._upload.finish()

    @property
    def fields(self) -> Mapping[str, Any]:
        return self._upload.fields

    @property
    def model(self) -> str | None:
        return self._upload.fields.get("model")

    def rewrite(self, by: Rewrite) -> int:  # noqa: ARG002 - the interface's; forms pass as they are
        return 0

    def sequences(self, path: str, most: int | None) -> int:  # noqa: ARG002 - the interface's
        return 1

    def render(self, instance: Instance, cls: RequestClass, path: str) -> bytes | None:  # noqa: ARG002 - the interface's
        return None

    def close(self) -> None:
        self._upload.close()
