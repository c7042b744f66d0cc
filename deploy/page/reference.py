"""The page at /docs: an OpenAPI description as plain HTML. It loads nothing and runs nothing."""

from html import escape
from typing import Any

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{background:#8882;padding:.1em .3em;border-radius:.2em}"
    "table{border-collapse:collapse}td,th{text-align:left;padding:.15rem .8rem .15rem 0;vertical-align:top}"
    ":root{color-scheme:light dark}"
)


def reference_page(document: dict[str, Any]) -> str:
    schemas = document["components"]["schemas"]
    parts = [
        f"<section><h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}. "
        f"{_answers(operation)}</p>{_fields(operation, schemas)}</section>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    info = document["info"]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{info["title"]} API</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{info['title']} {escape(info['version'])}: HTTP API</h1>"
        f'<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>{"".join(parts)}</html>'
    )


def _answers(operation: dict[str, Any]) -> str:
    types = ", ".join(operation["responses"]["200"]["content"])
    others = ", ".join(status for status in operation["responses"] if status != "200")
    return f"Answers {escape(types)}" + (f"; or {others}." if others else ".")


def _fields(operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    if "requestBody" not in operation:
        return ""
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    body = schemas[name]
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code><td>{escape(_kind(schema))}"
        f"<td>{'required' if field in body.get('required', ()) else escape(str(schema.get('default', '')))}"
        for field, schema in body["properties"].items()
    )
    return f"<table><tr><th>field<th>type<th>default{rows}</table>"


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum") or [schema["const"]]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type") or schema.get("$ref", "any").rpartition("/")[2])
