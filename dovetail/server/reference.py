"""The page at /docs: routes and fields as the OpenAPI document has them. No scripts, no outside links."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{text-align:left;padding:.15em 1em .15em 0;vertical-align:top}"
    "code{font-size:.95em}"
)


def page(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as HTML."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
        f"<h1>{title}</h1><p>All as JSON: <a href=/openapi.json>/openapi.json</a>.</p>",
        *(part for path, methods in document["paths"].items() for part in _route(path, methods)),
    ]
    return "\n".join(parts)


def _route(path: str, methods: Mapping[str, Any]) -> Iterator[str]:
    for method, about in methods.items():
        yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(about.get('description', ''))}</p>"
        schema = about.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        if schema is not None:
            rows = "".join(_row(name, field, schema) for name, field in schema.get("properties", {}).items())
            yield f"<table><tr><th>field<th>type<th></tr>{rows}</table>"


def _row(name: str, field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    needed = "required" if name in schema.get("required", ()) else ""
    return f"<tr><td><code>{escape(name)}</code><td>{escape(_kind(field))}<td>{needed}</tr>"


def _kind(field: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(c) for c in choices if c.get("type") != "null"))
    if "$ref" in field:
        return "object"
    kind = str(field.get("type", "anything"))
    return f"array of {_kind(field['items'])}" if kind == "array" and "items" in field else kind
