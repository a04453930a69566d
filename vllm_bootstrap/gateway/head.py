"""One strict reading of a request's head, made before anything else looks at it. PURE.

Invariant: a head that passes has one meaning for every HTTP/1.1 implementation. Whatever two parsers could read
differently (bare LF, folded lines, space before a colon, two lengths, a length beside chunks, odd ``Host`` values,
targets that are not a path) is refused with an error in our own shape. Knows no sockets, routes or keys.

Decisions where HTTP leaves a choice: absolute, authority and asterisk targets are refused (this is no forward proxy);
every request needs exactly one ``Host``, HTTP/1.0 too; HTTP/1.0 connections close after one answer; a header's name
has at most 256 bytes; a path may not contain ``//``, ``.`` or ``..`` segments in any spelling, backslashes or encoded
control characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from vllm_bootstrap.errors import ApiError, BadRequest, HeadersTooLarge, MethodNotAllowed

Headers = list[tuple[bytes, bytes]]

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_HEAD = re.compile(
    rb"(" + _TOKEN + rb"++) ([!-~]++) HTTP/1\.([01])\r\n"
    rb"((?:" + _TOKEN + rb"{1,256}+:[^\x00-\x08\x0a-\x1f\x7f]*+\r\n)*+)\r\n"
)  # fmt: skip
_HOST = re.compile(rb"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_VERSION_LIKE = re.compile(rb"[^\r\n]* HTTP/[0-9.]+\r\n")
# In a path: what would let two readers disagree about where it leads.
_AMBIGUOUS = re.compile(
    r"//|\\|[#]|/\.{1,2}(?:/|$)|%(?:0[0-9A-Fa-f]|1[0-9A-Fa-f]|7[Ff]|5[Cc])|%(?![0-9A-Fa-f]{2})"
    r"|/(?:\.|%2[Ee]){1,2}(?:/|%2[Ff]|$)|%2[Ff](?:\.|%2[Ee]){1,2}(?:/|%2[Ff]|$)"
)

METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
MAX_REQUEST_LINE = 16 * 1024
_SINGLE = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect", b"content-type"})
_NOTICED = _SINGLE | {b"connection", b"upgrade"}


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """Bytes of a whole head (request line included) and number of header lines."""

    max_bytes: int = 64 * 1024
    max_count: int = 100


@dataclass(slots=True)  # not frozen: that costs 2 µs a request
class Head:
    """A request head, never changed after parsing.

    Header names are lower case, values without surrounding blanks, in their order. ``path`` is as sent
    (percent-encoding kept), ``query`` without the question mark. ``content_length`` is None without one.
    ``keep_alive`` is the client's wish. ``upgrade`` is the lower-case protocol of a well-formed upgrade. ``raw`` is the
    head for llhttp: as it came, but without an upgrade, which would end the request there and leave its body over.
    ``memory`` is what ``familiar`` knows of an earlier head that was the same, ``likeness`` what it would know it by,
    ``traces`` are then lines for the engine that are not among ``headers``, because they are new each time.
    """

    method: str
    path: str
    query: bytes
    minor_version: int
    headers: Headers
    content_length: int | None = None
    chunked: bool = False
    keep_alive: bool = True
    expects_continue: bool = False
    upgrade: bytes | None = None
    raw: bytes = field(default=b"", repr=False)
    _fields: dict[bytes, bytes] | None = field(default=None, repr=False)
    memory: Any = field(default=None, repr=False)
    likeness: bytes = field(default=b"", repr=False)
    traces: bytes = field(default=b"", repr=False)

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.content_length)

    def first(self, name: bytes) -> bytes | None:
        """The value of the first header of that name."""
        fields = self._fields
        if fields is None:
            fields = self._fields = dict(self.headers[::-1])
        return fields.get(name)


def parse_head(raw: bytes, limits: HeadLimits) -> Head:
    """Parse one whole head, its empty last line included. Raises ``ApiError`` (400, 405, 431)."""
    if len(raw) > limits.max_bytes:
        raise too_large(limits)
    match = _HEAD.fullmatch(raw)
    if match is None:
        raise _malformed(raw)
    method, target, minor, block = match.groups()
    if len(target) > MAX_REQUEST_LINE:
        raise HeadersTooLarge(f"The request line is longer than {MAX_REQUEST_LINE} bytes")
    if method not in METHODS:
        raise MethodNotAllowed(f"The method {method.decode()[:32]} is not supported")
    headers, noticed = _read_headers(block, limits)
    path, query = _split_target(target)
    _check_host(noticed)
    return _assemble(raw, method.decode(), path, query, int(minor), headers, noticed)


def too_large(limits: HeadLimits) -> ApiError:
    """The refusal of a head that is longer than allowed, complete or not."""
    return HeadersTooLarge(f"The request's headers are larger than {limits.max_bytes} bytes")


def _malformed(raw: bytes) -> ApiError:
    if _VERSION_LIKE.match(raw) and b" HTTP/1.1\r\n" not in raw and b" HTTP/1.0\r\n" not in raw:
        return BadRequest("Only HTTP/1.1 and HTTP/1.0 are spoken here")
    return BadRequest("The request's head is not valid HTTP/1.1")


def _read_headers(block: bytes, limits: HeadLimits) -> tuple[Headers, dict[bytes, bytes]]:
    lines = block.split(b"\r\n")
    if len(lines) - 1 > limits.max_count:
        raise HeadersTooLarge(f"The request has more than {limits.max_count} headers")
    headers: Headers = []
    noticed: dict[bytes, bytes] = {}
    for line in lines[:-1]:
        name, _, value = line.partition(b":")
        name = name.lower()
        value = value.strip(b" \t")
        headers.append((name, value))
        if name in _NOTICED:
            if name not in noticed:
                noticed[name] = value
            elif name in _SINGLE:
                raise BadRequest(f"The header {name.decode()} may be sent once only", param=name.decode())
            else:
                noticed[name] += b"," + value
    return headers, noticed


def _split_target(target: bytes) -> tuple[str, bytes]:
    if not target.startswith(b"/"):
        raise BadRequest("The request target must be a path that starts with '/'")
    raw_path, _, query = target.partition(b"?")
    path = raw_path.decode("ascii")
    if _AMBIGUOUS.search(path) or b"#" in query:
        raise BadRequest("The request's path has an ambiguous spelling ('//', dot segments, backslash, control bytes)")
    return path, query


def _check_host(noticed: dict[bytes, bytes]) -> None:
    host = noticed.get(b"host")
    if host is None or _HOST.fullmatch(host) is None:
        raise BadRequest("The request needs exactly one valid Host header", param="host")


def _assemble(
    raw: bytes, method: str, path: str, query: bytes, minor: int, headers: Headers, noticed: dict[bytes, bytes]
) -> Head:
    length, chunked = _framing(noticed, minor)
    expects = _expects_continue(noticed, minor)
    options = noticed.get(b"connection")
    if options is None:
        return Head(method, path, query, minor, headers, length, chunked, minor == 1, expects, None, raw)
    tokens = {token.strip().lower() for token in options.split(b",")}
    keep_alive = minor == 1 and b"close" not in tokens
    upgrade = noticed.get(b"upgrade")
    if upgrade is not None:
        raw = _without_upgrade(raw, headers)
        upgrade = upgrade.lower() if b"upgrade" in tokens and upgrade else None
    return Head(method, path, query, minor, headers, length, chunked, keep_alive, expects, upgrade, raw)


def _without_upgrade(raw: bytes, headers: Headers) -> bytes:
    kept = [b"%b: %b\r\n" % header for header in headers if header[0] != b"upgrade"]
    return b"".join([raw[: raw.index(b"\r\n") + 2], *kept, b"\r\n"])


def _framing(noticed: dict[bytes, bytes], minor: int) -> tuple[int | None, bool]:
    length, coding = noticed.get(b"content-length"), noticed.get(b"transfer-encoding")
    if coding is not None:
        if minor == 0:
            raise BadRequest("HTTP/1.0 has no Transfer-Encoding", param="transfer-encoding")
        if length is not None:
            raise BadRequest("A request has either a Content-Length or a Transfer-Encoding", param="transfer-encoding")
        if coding.lower() != b"chunked":
            raise BadRequest("The only transfer encoding known here is 'chunked'", param="transfer-encoding")
        return None, True
    if length is None:
        return None, False
    if _LENGTH.fullmatch(length) is None:
        raise BadRequest("Content-Length must be a number", param="content-length")
    return int(length), False


def _expects_continue(noticed: dict[bytes, bytes], minor: int) -> bool:
    expect = noticed.get(b"expect")
    if expect is None:
        return False
    if expect.lower() != b"100-continue":
        raise BadRequest("The only expectation known here is '100-continue'", param="expect")
    return minor == 1
