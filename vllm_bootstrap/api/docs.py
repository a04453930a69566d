"""``/openapi.json`` and ``/docs``: the description as JSON and as one page without scripts or foreign assets."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from html import escape
from typing import Any

from starlette.responses import HTMLResponse, Response

from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.auth.scopes import MONITOR
from vllm_bootstrap.auth.types import Rule

_STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem}"
    "code{font-family:ui-monospace,monospace}details{border-top:1px solid #8886;padding:.5rem 0}"
    "summary{cursor:pointer;overflow-wrap:anywhere}td{vertical-align:top;padding:.1rem .8rem .1rem 0}"
    ".scopes{opacity:.7}pre{white-space:pre-wrap}"
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def register(routes: Registrar, describe: Callable[[], dict[str, Any]]) -> None:
    """``describe`` makes the document; it is called once, at the first request."""
    rule = Rule(scopes=frozenset({MONITOR}))
    document = cache(describe)

    async def openapi() -> Response:
        """This description."""
        return Response(json.dumps(document()), media_type="application/json")

    async def docs() -> Response:
        """This description as a page."""
        return HTMLResponse(page(document()), headers={"content-security-policy": _POLICY})

    routes.add("GET", "/openapi.json", openapi, rule)
    routes.add("GET", "/docs", docs, rule, response_class=HTMLResponse)


def page(document: dict[str, Any]) -> str:
    """The document as HTML, readable without any script."""
    operations = [
        (tag, path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        for tag in operation.get("tags", ["other"])
    ]
    parts = [f"<h1>{escape(document['info']['title'])}</h1><p>{escape(document['info']['description'])}</p>"]
    for tag in dict.fromkeys(row[0] for row in operations):
        parts.append(f"<h2>{escape(tag)}</h2>")
        parts.extend(_operation(*row[1:]) for row in operations if row[0] == tag)
    parts.append("<h2>Types</h2>")
    parts.extend(_schema(name, schema) for name, schema in sorted(document["components"]["schemas"].items()))
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>vllm-bootstrap API</title><style>{_STYLE}</style>"
    )
    return head + "".join(parts)


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    scopes = ", ".join(operation.get("x-scopes", [])) or "public"
    rows = "".join(_parameter(parameter) for parameter in operation.get("parameters", []))
    for media, body in operation.get("requestBody", {}).get("content", {}).items():
        rows += _row("body", escape(media), _type(body["schema"]))
    for status, answer in operation["responses"].items():
        for media, body in answer.get("content", {}).items():
            rows += _row(escape(status), escape(media), _type(body.get("schema", {})))
    text = escape(operation.get("description") or operation.get("summary", ""))
    return (
        f"<details><summary><code><b>{method.upper()}</b> {escape(path)}</code> "
        f'<span class="scopes">{escape(scopes)}</span></summary><pre>{text}</pre><table>{rows}</table></details>'
    )


def _parameter(parameter: dict[str, Any]) -> str:
    schema = parameter.get("schema", {})
    text = parameter.get("description", "") + (f" (default {schema['default']})" if "default" in schema else "")
    return _row(parameter["in"], f"<code>{escape(parameter['name'])}</code>", escape(text))


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = "".join(
        _row(f"<code>{escape(field)}</code>{'' if field in required else ' ?'}", _type(of))
        for field, of in schema.get("properties", {}).items()
    )
    text = escape(schema.get("description", ""))
    title = f"<summary><code>{escape(name)}</code></summary>"
    return f'<details id="{escape(name)}">{title}<pre>{text}</pre><table>{rows}</table></details>'


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if "enum" in schema or "const" in schema:
        return escape(", ".join(repr(value) for value in schema.get("enum", [schema.get("const")])))
    return escape(str(schema.get("format") or schema.get("type", "any")))
