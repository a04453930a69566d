"""One decision for every request: may it come in, and as whom. Used by data plane and control plane alike.

Invariant: the decision depends on the parsed head and on the rule of the matched route, never on a path's spelling.
What is not allowed is refused: a route without a rule cannot ask. Nothing here reads a body, waits or logs.

Cases of ``admit``, first match decides:
1. ``Host`` missing, doubled or malformed → 400; a name that is not ours → 421
2. unsafe method or websocket handshake from a foreign page → 403 ``forbidden_origin``
3. credentials that differ from each other → 401
4. no valid key where the rule wants one → 401, one body for missing, wrong, expired and disabled
5. a key without any of the rule's scopes → 403 ``insufficient_scope``
6. unsafe method whose body has another content type than the rule's → 415
7. else the key's principal, None for a public route asked without a key
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.keys import KeyRing
from vllm_bootstrap.auth.sessions import COOKIE, Sessions
from vllm_bootstrap.auth.types import Principal, RequestHead, Rule
from vllm_bootstrap.errors import (
    BadRequest,
    Forbidden,
    ForbiddenOrigin,
    MisdirectedRequest,
    Unauthorized,
    UnsupportedMediaType,
)

LOCAL = Principal("local", scopes.ALL)
"""Everybody, on a daemon that is open because no key is configured."""

ANY_KEY = Rule(scopes=scopes.ALL, media=())
"""For what no route claims: a stranger learns nothing about which routes exist."""

PAGE_HEADER, PAGE_VALUE = b"x-requested-with", b"vllm-bootstrap-page"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_NOTICED = frozenset({
    b"host", b"origin", b"sec-fetch-site", b"upgrade", b"authorization", b"x-api-key", b"cookie", b"content-type",
    b"content-length", b"transfer-encoding", PAGE_HEADER,
})  # fmt: skip
_AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}))(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(rb"(https?)://([^/?#@]+)")
_DEFAULT_PORTS = {b"http": b"80", b"https": b"443"}

Noticed = dict[bytes, list[bytes]]


class Pass(NamedTuple):
    """That a head was let in by a key alone, and as whom: good for the very same head until keys change. Holds neither
    a key nor a digest of one."""

    principal: Principal
    version: int


class Guard:
    """``open_access``: no key is configured and none is needed. ``allowed_hosts``: names this daemon answers for
    besides addresses and localhost; ``*.example.com`` stands for one or more labels. ``protect_all``: public routes
    need a key too (any scope), but for those whose rule is ``always_public``.
    """

    def __init__(
        self,
        keys: KeyRing,
        sessions: Sessions,
        *,
        open_access: bool,
        allowed_hosts: Iterable[str] = (),
        protect_all: bool = False,
    ) -> None:
        if open_access and keys.configured:
            raise ValueError("a daemon with keys cannot be open")
        self._keys, self._sessions = keys, sessions
        self._open, self._protect_all = open_access, protect_all
        allowed = frozenset(name.lower() for name in allowed_hosts)
        self._judge_host = lru_cache(maxsize=256)(lambda host: judge_host(host, allowed))

    @property
    def open_access(self) -> bool:
        return self._open

    def admit(self, head: RequestHead, rule: Rule) -> Principal | None:
        """Let a request in or raise (cases in the module docstring). Cheap, does not block, changes nothing."""
        noticed = _notice(head)
        self._check_host(noticed)
        unsafe = head.method not in SAFE_METHODS
        if unsafe or _is_websocket(noticed):
            _check_origin(noticed)
        principal = LOCAL if self._open else self._identify(noticed)
        self._authorise(principal, rule, noticed)
        if unsafe:
            _check_media(noticed, rule)
        return principal

    def is_current(self, principal: Principal) -> bool:
        """Whether a principal admitted earlier may still go on (its key was not revoked and has not expired)."""
        return principal == LOCAL if self._open else self._keys.is_current(principal)

    def remember(self, head: RequestHead, principal: Principal) -> Pass | None:
        """For a head that ``admit`` has just let in: a pass, None when more than header and keys decided that (a
        session of the page ends by itself)."""
        if any(name == b"cookie" for name, _ in head.headers):
            return None
        # Not ``version()``: that may read the file anew, and the pass would hold for keys which this one is not among.
        return Pass(principal, self._keys.looked_up)

    def readmit(self, earlier: Pass) -> Principal | None:
        """Let the same head in under the same rule once more. None: ask ``admit`` again, something has changed."""
        keys, principal = self._keys, earlier.principal
        if keys.version() != earlier.version or (principal.expires_at is not None and keys.has_expired(principal)):
            return None
        return principal

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after keys were changed."""
        self._keys.on_change(listener)

    def look(self) -> None:
        """See whether keys were changed, when nobody has asked for a while: who waits must hear of it all the same."""
        self._keys.version()

    def still_allows(self, principal: Principal) -> bool:
        """Whether what a principal was admitted to earlier may still be begun: its key is there, live, and has lost no
        right. Changed limits do not matter."""
        return self._open or self._keys.still_allows(principal)

    def named(self, name: str) -> Principal | None:
        """The key of that name as it is now, None when it is not there or not valid. On an open daemon everybody."""
        return LOCAL if self._open else self._keys.named(name)

    def knows(self, principal: Principal) -> bool:
        """Whether the key of a principal admitted earlier is still there and live, whatever it may do now."""
        return self._open or self._keys.knows(principal.name)

    def _check_host(self, noticed: Noticed) -> None:
        hosts = noticed.get(b"host", ())
        verdict = self._judge_host(hosts[0]) if len(hosts) == 1 else "malformed"  # 1
        if verdict == "malformed":
            raise BadRequest("The request needs exactly one valid Host header.", param="host")
        if verdict == "unknown":
            raise MisdirectedRequest(
                "This daemon does not answer for that host name. Use its address, or add the name to "
                "VLLM_BOOTSTRAP_ALLOWED_HOSTS.",
                param="host",
            )

    def _identify(self, noticed: Noticed) -> Principal | None:
        tokens, cookies = _tokens(noticed), _session_cookies(noticed)
        if len(tokens) > 1:
            raise _unauthorized(noticed)  # 3
        by_cookie = self._sessions.principal(*cookies) if len(cookies) == 1 else None
        if not tokens:
            return by_cookie
        by_key = self._keys.lookup(*tokens)  # a wrong key is not made good by a cookie
        if by_key is not None and by_cookie is not None and by_key.name != by_cookie.name:
            raise _unauthorized(noticed)  # 3
        return by_key

    def _authorise(self, principal: Principal | None, rule: Rule, noticed: Noticed) -> None:
        if rule.public and (principal is not None or not self._protect_all or rule.always_public):
            return
        if principal is None:
            raise _unauthorized(noticed)  # 4
        if not rule.public and not scopes.allows(principal.scopes, rule.scopes):
            raise missing_scope(principal, rule.scopes)  # 5


def missing_scope(principal: Principal, needed: frozenset[str]) -> Forbidden:
    """The refusal of a known key that lacks every one of ``needed``."""
    return Forbidden(
        f"The key '{principal.name}' lacks {scopes.describe(needed)}.",
        details={"needed_scopes": sorted(needed)},
    )


def judge_host(host: bytes, allowed: frozenset[str]) -> Literal["ok", "unknown", "malformed"]:
    """What a ``Host`` value is: one of ours (an address, localhost, an allowed name; any port), a stranger's name
    (a page that was rebound to our address sends such a one), or no host at all."""
    match = _AUTHORITY.fullmatch(host)
    if match is None or int(match[2] or 0) > 65535:
        return "malformed"
    name = match[1].decode("ascii").lower()
    if name.startswith("["):
        return "ok" if _is_address(name[1:-1], ipaddress.IPv6Address) else "malformed"
    if name == "localhost" or name in allowed or _is_address(name, ipaddress.IPv4Address):
        return "ok"
    return "ok" if any(_is_below(name, pattern) for pattern in allowed) else "unknown"


def _is_address(text: str, kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _is_below(name: str, pattern: str) -> bool:
    return pattern.startswith("*.") and name.endswith(pattern[1:]) and len(name) >= len(pattern)


def same_origin(origin: bytes, host: bytes) -> bool:
    """Whether a page of ``origin`` belongs to this daemon as addressed by ``host``. A ``Host`` without a port stands
    for the default port of the page's scheme, because TLS may end in front of us."""
    match = _ORIGIN.fullmatch(origin.lower())
    page = _AUTHORITY.fullmatch(match[2]) if match else None
    ours = _AUTHORITY.fullmatch(host.lower())
    if match is None or page is None or ours is None or page[1] != ours[1]:
        return False
    default = _DEFAULT_PORTS[match[1]]
    return (page[2] or default) == (ours[2] or default)


def _notice(head: RequestHead) -> Noticed:
    noticed: Noticed = {}
    for name, value in head.headers:
        if name in _NOTICED:
            noticed.setdefault(name, []).append(value)
    return noticed


def _is_websocket(noticed: Noticed) -> bool:
    return any(b"websocket" in value.lower() for value in noticed.get(b"upgrade", ()))


def _check_origin(noticed: Noticed) -> None:
    sites, origins = noticed.get(b"sec-fetch-site", ()), noticed.get(b"origin", ())
    host = noticed[b"host"][0]
    foreign = any(site.strip().lower() == b"cross-site" for site in sites)
    if foreign or not all(same_origin(origin, host) for origin in origins):
        raise ForbiddenOrigin("Pages of other sites may not do this. Behind a proxy, forward the Host header as is.")


def _tokens(noticed: Noticed) -> set[bytes]:
    """All keys in the request, however they were sent. Empty values count as not sent."""
    found = {value.strip() for value in noticed.get(b"x-api-key", ())}
    for value in noticed.get(b"authorization", ()):
        scheme, _, rest = value.strip().partition(b" ")
        found.add(_credential(scheme.lower(), rest.strip()))
    found.discard(b"")
    return found


def _credential(scheme: bytes, rest: bytes) -> bytes:
    if scheme == b"bearer":
        return rest
    if scheme == b"basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2]
        except binascii.Error:
            return b"\0"  # something was sent and it is no key
    return b"\0"


def _session_cookies(noticed: Noticed) -> set[bytes]:
    found = set()
    for header in noticed.get(b"cookie", ()):
        for part in header.split(b";"):
            name, _, value = part.strip().partition(b"=")
            if name == COOKIE.encode() and value:
                found.add(value)
    return found


def _unauthorized(noticed: Noticed) -> Unauthorized:
    # The page's own script gets no challenge: the browser would open its password dialog over the login field.
    return Unauthorized(challenge=PAGE_VALUE not in noticed.get(PAGE_HEADER, ()))


def _check_media(noticed: Noticed, rule: Rule) -> None:
    lengths = noticed.get(b"content-length", ())
    has_body = b"transfer-encoding" in noticed or any(length.strip() != b"0" for length in lengths)
    if not rule.media or not has_body:
        return
    types = [value.partition(b";")[0].strip().lower().decode("latin-1") for value in noticed.get(b"content-type", ())]
    if len(types) != 1 or types[0] not in rule.media:
        raise UnsupportedMediaType(f"The body must be sent as {' or '.join(rule.media)}.", param="content-type")
