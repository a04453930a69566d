"""vLLM version strings as comparable values. PURE."""

from __future__ import annotations

import re

Version = tuple[int, int, int]

_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
# What a checkout without tags calls itself. It may be anything, most likely it is new.
_NAMELESS = re.compile(r"dev|0\.1\.dev.*|0\.0\.0.*")
NEWEST: Version = (9999, 0, 0)


def parse(text: str) -> Version:
    """The release a version string belongs to; suffixes (``.post1``, ``rc2``, ``+cu130``) are ignored.

    A build without a real version number counts as newest. Raises ``ValueError`` for what is no version at all.
    """
    if _NAMELESS.fullmatch(text):
        return NEWEST
    match = _RELEASE.match(text)
    if match is None:
        raise ValueError(f"not a version: {text!r}")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def show(version: Version) -> str:
    return ".".join(str(part) for part in version)
