"""Guards the public API against breaking changes: compares the description with the committed snapshot.

    python scripts/openapi_snapshot.py            # tells what would break clients; exit code 1 when something would
    python scripts/openapi_snapshot.py --update   # accepts the description as it is now

Breaking is: an operation, parameter, answer field or content type that is gone; a parameter or request field that is
new and required; a type, word or bound that became narrower for what clients send, or wider for what they read.
Adding an optional thing is not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = ROOT / "tests" / "fixtures" / "openapi.json"
METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
WORDS = "enum"


def current() -> dict[str, Any]:
    """The description as the code makes it now."""
    sys.path.insert(0, str(ROOT))
    from tests.support.control_plane import make  # noqa: PLC0415  (needs the path set above)
    from vllm_bootstrap.api.app import build_api  # noqa: PLC0415
    from vllm_bootstrap.api.openapi import describe  # noqa: PLC0415

    app = build_api(make())
    document: dict[str, Any] = json.loads(json.dumps(describe(app, app.state.routes.entries)))
    return document


def breaking_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One sentence for each change that can break a client of ``old``."""
    found: list[str] = []
    for path, item in old["paths"].items():
        for method in METHODS:
            if method not in item:
                continue
            where = f"{method.upper()} {path}"
            if method not in new["paths"].get(path, {}):
                found.append(f"{where} is gone")
            else:
                _Operation(where, old, new, found).compare(item[method], new["paths"][path][method])
    return found


class _Operation:
    """Compares one operation of two documents."""

    def __init__(self, where: str, old: dict[str, Any], new: dict[str, Any], found: list[str]) -> None:
        self._where, self._old, self._new, self._found = where, old, new, found
        self._seen: set[tuple[str, str, bool]] = set()

    def compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        self._parameters(old.get("parameters", []), new.get("parameters", []))
        self._scopes(old.get("x-scopes", []), new.get("x-scopes", []))
        self._body(old.get("requestBody", {}), new.get("requestBody", {}))
        for status, answer in old["responses"].items():
            if status not in new["responses"]:
                self._say(f"answers no {status} any more")
                continue
            for media, content in answer.get("content", {}).items():
                other = new["responses"][status].get("content", {}).get(media)
                if other is None:
                    self._say(f"answers no {media} with {status} any more")
                else:
                    self._schema(f"answer {status}", content.get("schema", {}), other.get("schema", {}), sent=False)

    def _say(self, what: str) -> None:
        self._found.append(f"{self._where}: {what}")

    def _scopes(self, old: list[str], new: list[str]) -> None:
        if new and not old:
            self._say("needs a key now")
        elif old and new and not set(old) <= set(new):
            self._say(f"the scopes {sorted(set(old) - set(new))} do not suffice any more")

    def _parameters(self, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        before = {(p["in"], p["name"]): p for p in old}
        after = {(p["in"], p["name"]): p for p in new}
        for place, name in before.keys() - after.keys():
            self._say(f"the {place} parameter {name} is gone")
        for (place, name), parameter in after.items():
            earlier = before.get((place, name))
            if parameter.get("required") and not (earlier and earlier.get("required")):
                self._say(f"the {place} parameter {name} is required now")
            if earlier is not None:
                self._schema(f"{place} {name}", earlier.get("schema", {}), parameter.get("schema", {}), sent=True)

    def _body(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if new.get("required") and not old.get("required"):
            self._say("a body is required now")
        for media, content in old.get("content", {}).items():
            other = new.get("content", {}).get(media)
            if other is None:
                self._say(f"takes no {media} any more")
            else:
                self._schema("body", content["schema"], other["schema"], sent=True)

    def _schema(self, where: str, old: dict[str, Any], new: dict[str, Any], *, sent: bool) -> None:
        mark = (json.dumps(old, sort_keys=True), json.dumps(new, sort_keys=True), sent)
        if mark in self._seen:
            return
        self._seen.add(mark)
        old, new = self._resolved(old, self._old), self._resolved(new, self._new)
        self._types(where, old, new, sent=sent)
        self._bounds(where, old, new, sent=sent)
        fields, others = old.get("properties", {}), new.get("properties", {})
        for name in fields.keys() - others.keys():
            self._say(f"{where}: the field {name} is gone")
        for name in fields.keys() & others.keys():
            self._schema(f"{where}.{name}", fields[name], others[name], sent=sent)
        was, now = set(old.get("required", ())), set(new.get("required", ()))
        for name in sorted(now - was if sent else was - now):
            self._say(f"{where}: the field {name} is {'required now' if sent else 'not always there any more'}")
        if "items" in old and "items" in new:
            self._schema(f"{where}[]", old["items"], new["items"], sent=sent)

    @staticmethod
    def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            found: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            return found
        return schema

    def _types(self, where: str, old: dict[str, Any], new: dict[str, Any], *, sent: bool) -> None:
        before, after = self._kinds(old, self._old), self._kinds(new, self._new)
        if not before or not after:  # one side takes anything
            narrower = sent and bool(after) and not before
            wider = not sent and bool(before) and not after
            if narrower or wider:
                self._say(f"{where}: the type changed")
            return
        lost = before - after if sent else after - before
        if lost:
            self._say(
                f"{where}: {', '.join(sorted(lost))} {'is not taken any more' if sent else 'can be answered now'}"
            )

    def _kinds(self, schema: dict[str, Any], document: dict[str, Any]) -> set[str]:
        """Types and words a schema allows; empty when it allows everything."""
        schema = self._resolved(schema, document)
        if "anyOf" in schema:
            return set().union(*(self._kinds(part, document) for part in schema["anyOf"]))
        if "const" in schema:
            return {repr(schema["const"])}
        if WORDS in schema:
            return {repr(word) for word in schema[WORDS]}
        return {schema["type"]} if isinstance(schema.get("type"), str) else set()

    def _bounds(self, where: str, old: dict[str, Any], new: dict[str, Any], *, sent: bool) -> None:
        if not sent:
            return
        for name in ("minimum", "exclusiveMinimum", "minLength", "minItems"):
            if name in new and (name not in old or new[name] > old[name]):
                self._say(f"{where}: {name} is {new[name]} now")
        for name in ("maximum", "exclusiveMaximum", "maxLength", "maxItems"):
            if name in new and (name not in old or new[name] < old[name]):
                self._say(f"{where}: {name} is {new[name]} now")
        if "pattern" in new and new["pattern"] != old.get("pattern"):
            self._say(f"{where}: the pattern changed")


def main(arguments: list[str]) -> int:
    document = current()
    if arguments == ["--update"]:
        SNAPSHOT.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"written: {SNAPSHOT.relative_to(ROOT)}")
        return 0
    if arguments:
        print(__doc__)
        return 2
    stored = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    breaking = breaking_changes(stored, document)
    print("\n".join(breaking) or ("nothing changed" if stored == document else "changed, but nothing breaks"))
    return 1 if breaking else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
