"""HTML pages and their assets, from the folder ``templates`` of the checkout or from the installed package.

Invariant: only names that were there when first asked for are ever served; no path of a request reaches the file
system. Everything a template prints is escaped. Knows nothing of what the pages show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_bootstrap.errors import NotFound

if TYPE_CHECKING:
    from jinja2 import Environment

PACKAGE = Path(__file__).resolve().parent.parent
MEDIA_TYPES: Mapping[str, str] = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """``tag`` changes with the content; it stands in the address, so that browsers may keep a version for ever."""

    content: bytes
    media_type: str
    tag: str


def folder() -> Path:
    """Where templates lie: inside the installed package, or beside it in a checkout."""
    installed = PACKAGE / "_templates"
    return installed if installed.is_dir() else PACKAGE.parent / "templates"


@cache
def assets() -> Mapping[str, Asset]:
    """All assets by file name. Reads them at the first call."""
    found = {}
    for path in sorted((folder() / "assets").iterdir()):
        if path.suffix in MEDIA_TYPES:
            content = path.read_bytes()
            found[path.name] = Asset(content, MEDIA_TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:12])
    return found


def asset(name: str) -> Asset:
    """One asset. Raises ``NotFound``."""
    if name not in assets():
        raise NotFound("There is no such asset.")
    return assets()[name]


def render(template: str, **values: Any) -> str:
    """A template of the folder with these values; a value it needs and does not get is an error."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    # Imported with the first page: a daemon whose page nobody opens does not pay for it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415

    made = Environment(
        loader=FileSystemLoader(folder()),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.globals["asset"] = lambda name: f"assets/{name}?v={asset(name).tag}"
    return made
