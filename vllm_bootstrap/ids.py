"""Identifiers: globally unique, URL-safe, sortable by creation time. PURE.

Form: a prefix, 10 characters of milliseconds since the epoch, 10 characters of randomness, all Crockford base 32 in
lower case. Short enough that paths of Unix sockets made from them stay below the kernel's 107 bytes.
"""

from __future__ import annotations

import re

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_LAUNCH = re.compile(r"l[0-9a-hjkmnp-tv-z]{20}")
_GROUP = re.compile(r"g[0-9a-hjkmnp-tv-z]{20}")
FILE_PREFIX = "file-"
BATCH_PREFIX, ITEM_PREFIX = "batch_", "item_"
_FILE = re.compile(FILE_PREFIX + r"[0-9a-hjkmnp-tv-z]{20}")
RANDOM_BYTES = 7


def _base32(value: int, length: int) -> str:
    return "".join(_ALPHABET[(value >> (5 * i)) & 31] for i in reversed(range(length)))


def new_id(prefix: str, now_ms: int, random: bytes) -> str:
    """Make an id. ``random`` is at least 7 bytes from a cryptographic source; 50 bits of it are used."""
    if len(random) < RANDOM_BYTES:
        raise ValueError(f"need {RANDOM_BYTES} random bytes, got {len(random)}")
    return prefix + _base32(now_ms, 10) + _base32(int.from_bytes(random[:RANDOM_BYTES], "big") >> 6, 10)


def is_launch_id(text: str) -> bool:
    """Whether ``text`` has the form of a launch id (it says nothing about existence)."""
    return _LAUNCH.fullmatch(text) is not None


def is_group_id(text: str) -> bool:
    """Whether ``text`` has the form of the id of a group of replicas. A single launch is its own group, under its own
    id, which has not."""
    return _GROUP.fullmatch(text) is not None


def is_file_id(text: str) -> bool:
    """Whether ``text`` has the form of a file's id. Such an id is safe as the name of a file in a folder."""
    return _FILE.fullmatch(text) is not None
