"""The expected access, read from tests/access.json, as cases to walk. Knows the table and nothing of the code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE: dict[str, Any] = json.loads((Path(__file__).resolve().parent.parent / "access.json").read_text(encoding="utf-8"))
SCOPES: list[str] = TABLE["scopes"]


@dataclass(frozen=True)
class Route:
    """``access`` None: public."""

    method: str
    path: str
    access: frozenset[str] | None
    data_plane: bool
    entry: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    def target(self, launch_id: str) -> str:
        values = {
            "{launch_id}": launch_id,
            "{model}": "org/no-such-model",
            "{response_id}": "resp_none",
            "{name}": "no-such-asset.css",
            "{request_id}": "no-such-request",
            "{file_id}": "no-such-file",
            "{batch_id}": "no-such-batch",
            "{item_id}": "no-such-item",
            "{adapter}": "no-such-adapter",
        }
        found = self.path
        for name, value in values.items():
            found = found.replace(name, value)
        return found

    def request_body(self) -> tuple[bytes, str | None]:
        """Body and content type that a route's rule takes; what it asks for never succeeds and harms nothing."""
        if "body" in self.entry:
            return json.dumps(self.entry["body"]).encode(), "application/json"
        if "multipart" in self.entry:
            fields = self.entry["multipart"].items()
            parts = [f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields]
            return ("".join(parts) + "--b--\r\n").encode(), "multipart/form-data; boundary=b"
        return b"", None


def routes() -> list[Route]:
    return [_route(entry) for entry in TABLE["routes"]]


def nowhere() -> list[Route]:
    """What no route claims: for no scope, and told only to those with a key."""
    return [_route({**entry, "access": []}) for entry in TABLE["nowhere"]]


def details() -> list[Route]:
    return [_route(entry) for entry in TABLE["details"]]


def _route(entry: dict[str, Any]) -> Route:
    access = None if entry["access"] == "public" else frozenset(entry["access"])
    return Route(entry["method"], entry["path"], access, entry.get("plane") == "data", entry)
