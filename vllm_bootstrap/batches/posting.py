"""One POST to an address that a caller named, without lending the caller the daemon's place in the network.

Invariants: a name is resolved once and the connection goes to one of the addresses that were checked, so a name that
changes its mind in between gains nothing. Unless private addresses are allowed, every address of the name must be
reachable from everywhere. No redirect is followed and no proxy asked. Time and size of an answer are bounded.

It knows nothing of batches. Messages of its errors hold neither path nor query of the address, which may be secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httptools

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 * 1024
CHUNK_BYTES = 16 * 1024
ADDRESSES_TRIED = 4

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_PRINTABLE = re.compile(r"[\x21-\x7e]{1,2048}")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Special networks that not every version of Python knows to be such.
_SPECIAL = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "3fff::/20")
]
_DEFAULT_PORTS = {"http": 80, "https": 443}


class NotAllowed(Exception):
    """The address may not be asked, or is none. Trying again is no use."""


class NotReached(Exception):
    """There was no answer that could be understood. It may be another time."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Where to connect: the checked ``address``, and the name that a certificate must bear (None without TLS)."""

    address: str
    port: int
    tls_name: str | None


Connect = Callable[[Dial], Awaitable[Streams]]


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, as the system knows them."""
    done: Future[list[Any]] = Future()
    done.set_running_or_notify_cancel()  # from here on it cannot be cancelled, only left alone

    def look() -> None:
        try:
            done.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as exc:
            done.set_exception(exc)

    # A thread of its own: a slow name server must hold up neither the loop's few threads nor the daemon's end.
    threading.Thread(target=look, name="webhook name", daemon=True).start()
    found = await asyncio.wrap_future(done)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


async def connect(dial: Dial) -> Streams:
    context = _tls() if dial.tls_name is not None else None
    return await asyncio.open_connection(dial.address, dial.port, ssl=context, server_hostname=dial.tls_name)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def parse(url: str, *, allow_private: bool) -> SplitResult:
    """A URL that may be asked, as far as that shows without resolving its name. Raises ``NotAllowed``."""
    try:
        parts = urlsplit(url) if _PRINTABLE.fullmatch(url) else None
        port = parts.port if parts is not None else None
    except ValueError:
        parts = port = None
    if parts is None or parts.scheme not in _DEFAULT_PORTS or not parts.hostname or port == 0:
        raise NotAllowed("not an http:// or https:// URL in printable ASCII characters")
    if parts.username is not None or parts.password is not None:
        raise NotAllowed("name and password do not belong in the URL")
    with contextlib.suppress(ValueError):  # a name: its addresses are looked at before each delivery
        _check(str(ipaddress.ip_address(parts.hostname)), allow_private=allow_private)
    return parts


def is_public(address: Address) -> bool:
    """Whether an address is one that everybody can reach: no private, local, shared or multicast one, nor one of these
    in the clothes of IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        within = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF) if address in _NAT64 else None
        inner = address.ipv4_mapped or address.sixtofour or within
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_UNICAST:
            return False
    special = any(address in network for network in _SPECIAL)  # of the other version, it is in none
    return address.is_global and not address.is_multicast and not special


def _check(address: str, *, allow_private: bool) -> None:
    if allow_private:
        return
    try:
        public = is_public(ipaddress.ip_address(address))  # an address with a zone ("fe80::1%eth0") is local
    except ValueError:
        public = False
    if not public or "%" in address:
        raise NotAllowed("its address is not a public one (VLLM_BOOTSTRAP_WEBHOOK_ALLOW_PRIVATE allows others)")


async def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    allow_private: bool,
    timeout_s: float = TIMEOUT_S,
    resolve: Resolve = resolve,
    connect: Connect = connect,
) -> int:
    """Send ``body``; the answer's status. Header names and values are the caller's to keep clean. Raises
    ``NotAllowed``, ``NotReached``."""
    parts = parse(url, allow_private=allow_private)
    answer = _Answer()
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await _connected(parts, resolve, connect, allow_private=allow_private)
            try:
                writer.write(_head(parts, len(body), headers) + body)
                await _read(reader, answer)
            finally:
                writer.transport.abort()  # whatever was not read by now never will be
    except (TimeoutError, OSError, EOFError, UnicodeError) as exc:
        if answer.status is None:
            raise NotReached(_reason(exc, timeout_s)) from exc
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
        if answer.status is None:
            raise NotReached("the answer is not HTTP") from exc
    if answer.status is None:
        raise NotReached("the connection ended without an answer")
    return answer.status


def _reason(exc: Exception, timeout_s: float) -> str:
    if isinstance(exc, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    if isinstance(exc, ssl.SSLError):
        return f"no trusted TLS connection ({exc.reason or type(exc).__name__})"
    if isinstance(exc, socket.gaierror | UnicodeError):
        return "its name cannot be resolved"
    return f"no connection ({getattr(exc, 'strerror', None) or type(exc).__name__})"


async def _connected(parts: SplitResult, resolve: Resolve, connect: Connect, *, allow_private: bool) -> Streams:
    host = parts.hostname or ""
    port = parts.port or _DEFAULT_PORTS[parts.scheme]
    addresses = await resolve(host, port)
    for address in addresses:
        _check(address, allow_private=allow_private)
    failure: OSError = OSError("it has no address")
    for address in addresses[:ADDRESSES_TRIED]:
        try:
            return await connect(Dial(address, port, host if parts.scheme == "https" else None))
        except OSError as exc:
            failure = exc
    raise failure


def _head(parts: SplitResult, length: int, headers: Mapping[str, str]) -> bytes:
    target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    given = {"host": parts.netloc, "connection": "close", "content-length": str(length), **headers}
    lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class _Answer:
    """Notes the final status; what is said on the way to it (100 to 199) does not count."""

    def __init__(self) -> None:
        self.parser: Any = httptools.HttpResponseParser(self)
        self.status: int | None = None
        self.complete = False

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        self.status = status if status >= 200 else None

    def on_message_complete(self) -> None:
        self.complete = self.status is not None


async def _read(reader: asyncio.StreamReader, answer: _Answer) -> None:
    """Up to the answer's end, or as much of it as anybody may want us to read."""
    received = 0
    while not answer.complete and received < MAX_ANSWER_BYTES:
        data = await reader.read(CHUNK_BYTES)
        if not data:
            return
        received += len(data)
        answer.parser.feed_data(data)
