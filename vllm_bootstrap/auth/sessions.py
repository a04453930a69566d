"""Short-lived dashboard sessions: a key exchanged for a cookie, so that the key leaves the address and the page.

Invariant: a session is worth exactly what its key is worth at that moment (revoked key, dead session), ends after a
fixed time, and is kept only as a hash, in memory. Knows nothing of routes and pages.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable

from vllm_bootstrap.auth.keyfile import digest
from vllm_bootstrap.auth.keys import KeyRing
from vllm_bootstrap.auth.types import Principal

COOKIE = "vllm_bootstrap_session"
MAX_SESSIONS = 1000


class Sessions:
    """``lifetime_s``: seconds a session lasts. At most ``MAX_SESSIONS`` are kept, the oldest give way."""

    def __init__(self, keys: KeyRing, *, lifetime_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._open: dict[bytes, tuple[bytes, float]] = {}

    def create(self, token: str) -> str | None:
        """Exchange a key for a new session id, or None when the key is not valid."""
        hashed = digest(token.encode("utf-8", "surrogatepass"))
        if self._keys.find(hashed) is None:
            return None
        self._expire()
        while len(self._open) >= MAX_SESSIONS:
            self._open.pop(next(iter(self._open)))
        session = secrets.token_urlsafe(32)
        self._open[_hash(session.encode())] = (hashed, self._clock() + self._lifetime_s)
        return session

    def principal(self, session: bytes) -> Principal | None:
        """Whose session this is, or None when it is unknown, over, or its key no longer valid."""
        hashed, ends_at = self._open.get(_hash(session), (b"", 0.0))
        if not hashed or self._clock() >= ends_at:
            return None
        return self._keys.find(hashed)

    def close(self, session: bytes) -> None:
        """Forget a session. Idempotent."""
        self._open.pop(_hash(session), None)

    def set_cookie(self, session: str, *, secure: bool) -> str:
        """The ``Set-Cookie`` value for a new session. ``secure``: the daemon itself speaks TLS."""
        return f"{COOKIE}={session}; Path=/; Max-Age={self._lifetime_s}{_attributes(secure=secure)}"

    @staticmethod
    def clear_cookie(*, secure: bool) -> str:
        """The ``Set-Cookie`` value that removes the cookie from the browser."""
        return f"{COOKIE}=; Path=/; Max-Age=0{_attributes(secure=secure)}"

    def _expire(self) -> None:
        now = self._clock()
        for hashed in [hashed for hashed, (_, ends_at) in self._open.items() if now >= ends_at]:
            del self._open[hashed]


def _attributes(*, secure: bool) -> str:
    return "; HttpOnly; SameSite=Strict" + ("; Secure" if secure else "")


def _hash(session: bytes) -> bytes:
    return hashlib.sha256(session).digest()
