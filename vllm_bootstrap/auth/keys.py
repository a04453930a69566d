"""The keys this daemon knows: shared keys from settings and the key file, re-read when it changes.

Invariant: only SHA-256 digests of tokens are kept. A lookup takes the same steps for a wrong, an expired and a
disabled key. A broken edit of the key file keeps the keys that were there and is reported in ``problem``; a good one
takes effect at once, so a revoked key stops at the next request. Knows nothing of requests and routes.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_bootstrap.auth import keyfile, scopes
from vllm_bootstrap.auth.keyfile import KeyFileError
from vllm_bootstrap.auth.types import Principal

log = logging.getLogger(__name__)
CHECK_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Key:
    digest: bytes
    principal: Principal
    disabled: bool = False


def shared_key(name: str, token: str) -> Key:
    """A key with all scopes under one of the daemon's own names. Raises ``KeyFileError`` for an unusable token."""
    problem = keyfile.token_problem(token)
    if problem:
        raise KeyFileError(f"{name}: {problem}")
    return Key(keyfile.digest(token), Principal(name, scopes.ALL))


class KeyRing:
    """All keys. ``allow_examples``: accept the published example tokens (loopback binds only).

    The constructor reads the file and raises ``KeyFileError`` when it is broken: a daemon does not start with keys
    other than those asked for. Later reloads keep the old keys instead. Reading blocks on a local file; the request
    path costs one ``stat`` a second. Not thread-safe: belongs to the event loop.
    """

    def __init__(
        self,
        shared: Sequence[Key] = (),
        path: Path | None = None,
        *,
        allow_examples: bool = False,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shared = tuple(shared)
        self._path = path
        self._allow_examples = allow_examples
        self._clock, self._monotonic = clock, monotonic
        self._pepper = secrets.token_bytes(32)
        self._seen: tuple[int, ...] | None = None
        self._next_check = monotonic() + CHECK_INTERVAL_S
        self._listeners: list[Callable[[], None]] = []
        self._version = 0
        self.problem: str | None = None
        self.notes: tuple[str, ...] = ()
        self._keys: dict[bytes, Key] = {}
        self._by_name: dict[str, Key] = {}
        if not allow_examples and any(key.digest in keyfile.EXAMPLE_DIGESTS for key in self._shared):
            raise KeyFileError("an example token is refused on an address that others can reach")
        self._use(self._load())

    @property
    def configured(self) -> bool:
        """Whether any source of keys is set, even one that holds no key at the moment."""
        return bool(self._shared) or self._path is not None

    def principals(self) -> list[Principal]:
        """All keys by name, without their tokens, disabled ones left out."""
        return [key.principal for _, key in sorted(self._by_name.items()) if not key.disabled]

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after keys were changed by a reload."""
        self._listeners.append(listener)

    def lookup(self, token: bytes) -> Principal | None:
        """Whose token this is, or None for a wrong, expired or disabled one."""
        if len(token) > keyfile.MAX_TOKEN_BYTES:
            return None
        return self.find(hashlib.sha256(token).digest())

    def find(self, digest: bytes) -> Principal | None:
        """The same by the token's SHA-256."""
        self._refresh()
        # Found by a digest under a secret of this process, so that the time of the lookup tells nothing about how
        # much of a stored digest a guess has in common; the comparison that decides takes constant time.
        key = self._keys.get(self._index(digest))
        if key is None or not hmac.compare_digest(key.digest, digest):
            return None
        return key.principal if self._is_live(key) else None

    def is_current(self, principal: Principal) -> bool:
        """Whether a principal admitted earlier still may go on: same key, not revoked, expired or disabled."""
        self._refresh()
        key = self._by_name.get(principal.name)
        return key is not None and key.principal == principal and self._is_live(key)

    def version(self) -> int:
        """A number that changes whenever any key may have changed. What was looked up under the same number still
        holds, but for keys that have expired since (``has_expired``)."""
        if self._path is not None and self._monotonic() >= self._next_check:
            self._refresh()
        return self._version

    @property
    def looked_up(self) -> int:
        """The ``version`` that the last lookup answered from, without a look at the file."""
        return self._version

    def has_expired(self, principal: Principal) -> bool:
        """Whether the time of a principal's key is over."""
        return principal.expires_at is not None and self._clock() >= principal.expires_at

    def knows(self, name: str) -> bool:
        """Whether there is a live key of that name."""
        key = self._by_name.get(name)
        return key is not None and self._is_live(key)

    def named(self, name: str) -> Principal | None:
        """The live key of that name."""
        self._refresh()
        key = self._by_name.get(name)
        return key.principal if key is not None and self._is_live(key) else None

    def still_allows(self, principal: Principal) -> bool:
        """Whether a principal admitted earlier has lost nothing: same key by name, live, with all its scopes, the same
        models and class. Changed limits do not matter."""
        key = self._by_name.get(principal.name)
        if key is None or not self._is_live(key):
            return False
        now = key.principal
        return principal.scopes <= now.scopes and (principal.models, principal.max_class) == (now.models, now.max_class)

    def reload(self) -> bool:
        """Read the key file now (SIGHUP). Returns whether the keys in use are the file's; ``problem`` says why not."""
        self._next_check = self._monotonic() + CHECK_INTERVAL_S
        try:
            keys = self._load()
        except KeyFileError as exc:
            self.problem = str(exc)
            log.error("Key file not reloaded, the keys before the change stay in force: %s", exc)
            return False
        self._use(keys)
        log.info("Keys loaded: %d", len(self._by_name))
        for listener in self._listeners:
            listener()
        return True

    def _is_live(self, key: Key) -> bool:
        return not key.disabled and not self.has_expired(key.principal)

    def _refresh(self) -> None:
        now = self._monotonic()
        if self._path is None or now < self._next_check:
            return
        self._next_check = now + CHECK_INTERVAL_S
        try:
            facts = _identity(os.stat(self._path))  # noqa: PTH116  (half the cost of Path.stat, on the request path)
        except OSError as exc:
            facts = (exc.errno or -1,)
        if facts != self._seen:
            self._seen = facts
            self.reload()

    def _load(self) -> tuple[Key, ...]:
        if self._path is None:
            return ()
        parsed, facts = keyfile.read(self._path, allow_examples=self._allow_examples)
        self._seen = _identity(facts)
        keys = tuple(Key(entry.digest(), entry.principal(), entry.disabled) for entry in parsed.entries)
        shared = {key.digest: key.principal.name for key in self._shared}
        for key in keys:
            if key.digest in shared:
                raise KeyFileError(
                    f"{self._path}: {key.principal.name!r} has the same token as the {shared[key.digest]!r} setting"
                )
        self.notes = parsed.notes
        for note in parsed.notes:
            log.warning("%s", note)
        return keys

    def _use(self, from_file: Iterable[Key]) -> None:
        keys = [*from_file, *reversed(self._shared)]
        self._keys = {self._index(key.digest): key for key in keys}
        self._by_name = {key.principal.name: key for key in keys}
        self._version += 1
        self.problem = None

    def _index(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._pepper, digest_size=16).digest()


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return (facts.st_ino, facts.st_dev, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
