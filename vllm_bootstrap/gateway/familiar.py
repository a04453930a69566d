"""Heads that come again: clients repeat a request's head byte for byte, but for the length of its body and for what it
is traced by.

Invariant: a head is recognised only when every byte but the values of ``CHANGING`` headers, each plainly written, is as
in a head that passed ``parse_head`` and the guard before. Nothing is decided by those values beyond the body's length
and the request's id, so it has the same meaning. Whether its key may still come in is asked each time. Nothing here
holds a credential: heads are known by a keyed hash under a secret of this process, and what is kept of them is without
the headers that carry keys. Knows no sockets and no queues.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_bootstrap.auth.guard import Pass
from vllm_bootstrap.gateway.head import Head, HeadLimits, parse_head
from vllm_bootstrap.gateway.headers import connection_options, may_pass

if TYPE_CHECKING:
    from vllm_bootstrap.gateway.targets import ToLaunch, ToModel

MOST_HEADS = 1024
MOST_BYTES = 4096
"""Of one head. Together these bound what strangers with a key can make us keep."""

_PLAIN = (b"traceparent", b"tracestate", b"baggage", b"b3")
_X = (
    b"request-id", b"correlation-id", b"forwarded-for", b"real-ip", b"amzn-trace-id", b"cloud-trace-context",
    b"b3-traceid", b"b3-spanid", b"b3-parentspanid",
)  # fmt: skip
CHANGING = frozenset({b"content-length", *_PLAIN, *(b"x-" + name for name in _X)})
"""Headers whose values may be new each time: but for the length and ``x-request-id`` nothing is decided by them."""


def _in_any_case(*names: bytes) -> bytes:
    return re.sub(rb"[a-z]", lambda letter: b"[%b%b]" % (letter[0].upper(), letter[0]), b"|".join(names))


# A header line of these up to its value, and that, which is plain text.
_CHANGING = re.compile(
    rb"(\r\n(?:%b: ?(?=[1-9][0-9]{0,17}\r\n)|(?:[Xx]-(?:%b)|%b): ?))([!-~](?:[ -~]{0,254}[!-~])?)(?=\r\n)"
    % (_in_any_case(b"content-length"), _in_any_case(*_X), _in_any_case(*_PLAIN))
)
_SECRET = frozenset({b"authorization", b"x-api-key", b"api-key", b"cookie", b"proxy-authorization"})
_NOT_KEPT = _SECRET | CHANGING  # a head says them by itself


class Memory:
    """One head: as read, without credentials, and what was decided about it (an ``Entry``). ``framed``: llhttp has read
    a whole request with it. ``rendered``: what engines are sent for it, by whoever renders it. ``changing``: the names
    of its headers whose values are new each time, in their order."""

    __slots__ = ("_id_at", "_length_at", "_traces", "entry", "framed", "head", "permit", "rendered", "target")

    def __init__(
        self,
        head: Head,
        target: ToModel | ToLaunch,
        entry: Any,
        permit: Pass,
        changing: Sequence[bytes] = (b"content-length",),
    ) -> None:
        kept = [header for header in head.headers if header[0] not in _NOT_KEPT]
        self.head = replace(head, headers=kept, raw=b"", _fields=dict(kept[::-1]), memory=None)
        self.target, self.entry, self.permit = target, entry, permit
        self.framed = False
        self.rendered: dict[tuple[str, str], tuple[object, bytes, bytes, bytes]] = {}
        self._length_at = changing.index(b"content-length")
        self._id_at = changing.index(b"x-request-id") if b"x-request-id" in changing else None
        self._traces = [(at, name) for at, name in enumerate(changing) if may_pass(name)]

    def once_more(self, raw: bytes, values: list[bytes]) -> Head:
        """The head ``raw``, which is this one but for these values."""
        known, id_at = self.head, self._id_at
        fields, traces = known._fields, b""
        if id_at is not None and fields is not None:
            fields = {**fields, b"x-request-id": values[id_at]}
        for at, name in self._traces:
            traces += b"%b: %b\r\n" % (name, values[at])
        return Head(
            known.method, known.path, known.query, known.minor_version, known.headers, int(values[self._length_at]),
            False, known.keep_alive, False, None, raw, fields, self, b"", traces,
        )  # fmt: skip


class FamiliarHeads:
    """All heads known at present; the oldest goes first."""

    def __init__(self, limits: HeadLimits) -> None:
        self._limits = limits
        self._most_bytes = min(MOST_BYTES, limits.max_bytes)
        self._secret = secrets.token_bytes(32)
        self._known: dict[bytes, Memory] = {}
        self._once: dict[bytes, None] = {}

    def read(self, raw: bytes) -> Head:
        """``parse_head``, or the same by heart. Raises ``ApiError``."""
        # No head that was let in holds a NUL, which marks the places of values: none of its own must feign one.
        if len(raw) > self._most_bytes or raw.find(b"\0") >= 0:
            return parse_head(raw, self._limits)
        name, _, values = self._look(raw)
        memory = self._known.get(name)
        if memory is None:
            fresh = parse_head(raw, self._limits)
            fresh.likeness = name
            return fresh
        return memory.once_more(raw, values)

    def comes_again(self, head: Head) -> bool:
        """Whether a head that was read just now and is not known was seen before: only those are worth being
        remembered, since many clients give each request a head of its own."""
        name = head.likeness
        if not name:
            return False
        if name in self._once:
            return True
        if len(self._once) >= MOST_HEADS:
            del self._once[next(iter(self._once))]
        self._once[name] = None
        return False

    def remember(self, head: Head, target: ToModel | ToLaunch, entry: Any, permit: Pass) -> None:
        """A head was let in. Only requests with a body of known length are worth it: the others are rare."""
        plain = not (head.chunked or head.expects_continue) and head.first(b"upgrade") is None
        if not plain or len(head.raw) > self._most_bytes:
            return
        name, starts, _ = self._look(head.raw)
        changing = [start[2:].partition(b":")[0].lower() for start in starts]
        # One that is written in some other way, or is not for the engine, would be lost.
        all_changing = [name for name, _ in head.headers if name in CHANGING]
        if b"content-length" not in changing or changing != all_changing or CHANGING & connection_options(head.headers):
            return
        if len(self._known) >= MOST_HEADS:
            del self._known[next(iter(self._known))]
        self._known[name] = Memory(head, target, entry, permit, changing)

    def _look(self, raw: bytes) -> tuple[bytes, list[bytes], list[bytes]]:
        """What a head would be known by, and its changing headers: lines up to the values, and these."""
        parts = _CHANGING.split(raw)
        values = parts[2::3]
        del parts[2::3]
        name = hashlib.blake2b(b"\0".join(parts), key=self._secret, digest_size=16).digest()
        return name, parts[1::2], values
