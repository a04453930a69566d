"""Which names of models can be named in a path of the API. PURE.

``/models/{name}/load`` holds the name with its slashes, so a name must not end in what the routes end in, and must
survive the way from client to daemon as it is. A name may be a path itself, as that of a model in a folder often is.
Knows nothing of routes but these words.
"""

from __future__ import annotations

import re

WORDS = frozenset({"load", "unload", "check", "download", "files", "prefetch", "adapters"})
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ODD = re.compile(r"[\x00-\x1f\x7f?#%\\]")


def problem(name: str) -> str | None:
    """What keeps ``name`` from being a model's, as the end of a sentence that begins with it; None when nothing."""
    if _ODD.search(name):
        return "may not hold control characters, nor any of ? # % \\"
    segments = name.split("/")
    if any(segment in {"", ".", ".."} for segment in (segments[1:] if name.startswith("/") else segments)):
        return "may not end with a slash, nor hold '//', '/./' or '/../'"
    if segments[-1] in WORDS:
        return f"may not end in '{segments[-1]}', as routes of the API do"
    if len(segments) > 2 and segments[-2] == "adapters":
        return "may not end in 'adapters/…', as a route of the API does"
    return None


def is_adapter_name(text: str) -> bool:
    """Whether an adapter that is uploaded may have this name: letters, digits, and ``._-`` behind the first."""
    return _ADAPTER.fullmatch(text) is not None
