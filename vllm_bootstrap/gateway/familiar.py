"""Heads that come again: clients repeat a request's head byte for byte, but for the length of its body.

Invariant: a head is recognised only when every byte but the digits of one plain ``Content-Length`` is as in a head that
passed ``parse_head`` and the guard before, so it has the same meaning and only its length is new. Whether its key may
still come in is asked each time. Nothing here holds a credential: heads are known by a keyed hash under a secret of
this process, and what is kept of them is without the headers that carry keys. Knows no sockets and no queues.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_bootstrap.auth.guard import Pass
from vllm_bootstrap.gateway.head import Head, HeadLimits, parse_head

if TYPE_CHECKING:
    from vllm_bootstrap.gateway.targets import ToLaunch, ToModel

MOST_HEADS = 1024
MOST_BYTES = 4096
"""Of one head. Together these bound what strangers with a key can make us keep."""

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?([1-9][0-9]{0,17})\r\n")
_SECRET = frozenset({b"authorization", b"x-api-key", b"api-key", b"cookie", b"proxy-authorization"})
_NOT_KEPT = _SECRET | {b"content-length"}  # a head says its length by itself


class Memory:
    """One head: as read, without credentials, and what was decided about it (an ``Entry``). ``framed``: llhttp has read
    a whole request with it. ``rendered``: what engines are sent for it, by whoever renders it."""

    __slots__ = ("entry", "framed", "head", "permit", "rendered", "target")

    def __init__(self, head: Head, target: ToModel | ToLaunch, entry: Any, permit: Pass) -> None:
        kept = [header for header in head.headers if header[0] not in _NOT_KEPT]
        self.head = replace(head, headers=kept, raw=b"", _fields=dict(kept[::-1]), memory=None)
        self.target, self.entry, self.permit = target, entry, permit
        self.framed = False
        self.rendered: dict[tuple[str, str], tuple[object, bytes, bytes, bytes]] = {}


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
        length = _LENGTH.search(raw)
        if length is None or len(raw) > self._most_bytes:
            return parse_head(raw, self._limits)
        name = self._name(raw, length)
        memory = self._known.get(name)
        if memory is None:
            fresh = parse_head(raw, self._limits)
            fresh.likeness = name
            return fresh
        known = memory.head
        return Head(
            known.method, known.path, known.query, known.minor_version, known.headers, int(length[1]), False,
            known.keep_alive, False, None, raw, known._fields, memory,
        )  # fmt: skip

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
        length = _LENGTH.search(head.raw)
        plain = not (head.chunked or head.expects_continue) and head.first(b"upgrade") is None
        if length is None or not plain or len(head.raw) > self._most_bytes:
            return
        if len(self._known) >= MOST_HEADS:
            del self._known[next(iter(self._known))]
        self._known[self._name(head.raw, length)] = Memory(head, target, entry, permit)

    def _name(self, raw: bytes, length: re.Match[bytes]) -> bytes:
        # No head that was let in holds a NUL, so that the place of the digits cannot be feigned.
        start, end = length.span(1)
        same = b"%b\0%b" % (raw[:start], raw[end:])
        return hashlib.blake2b(same, key=self._secret, digest_size=16).digest()
