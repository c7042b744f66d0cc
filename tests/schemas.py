"""JSON schemas of every keyword that structured output claims, small enough that an untrained model can finish them."""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

WORD: Schema = {"type": "string", "maxLength": 4}
NUMBERS: list[Schema] = [
    {"type": "integer", "minimum": low, "maximum": high}
    for low, high in ((0, 9), (-5, 5), (10, 99), (-300, -7), (3, 3))
]
NUMBERS += [
    {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 4},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70},
]
NUMBERS += [
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -2.5, "maximum": 2.5},
]
TEXTS: list[Schema] = [
    {"type": "string", "minLength": low, "maxLength": high} for low, high in ((0, 0), (1, 1), (2, 5), (4, 4))
]
TEXTS += [
    {"type": "string", "pattern": p} for p in ("^[a-c]{2,4}$", r"^\d{3}-\d{2}$", "^(yes|no)$", "^[A-Z][a-z]?$", "^$")
]
TEXTS += [{"type": "string", "format": f} for f in ("date", "time", "date-time", "uuid", "ipv4")]
FIXED: list[Schema] = [
    {"type": "null"}, {"type": "boolean"}, {"const": 7}, {"const": "a \"quoted\" ü"}, {"const": [1, {"a": None}]},
    {"enum": ["red", "green"]}, {"enum": [1, "1", None, True]}, {"enum": [{"a": 1}, []]},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
]  # fmt: skip
SCALARS = [*NUMBERS, *TEXTS, *FIXED]


def closed(properties: Schema, **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False} | more


def _arrays(item: Schema) -> Iterator[Schema]:
    yield {"type": "array", "items": item, "minItems": 1, "maxItems": 2}
    yield {"type": "array", "prefixItems": [item, {"type": "boolean"}], "items": False, "minItems": 2}


def _objects(item: Schema) -> Iterator[Schema]:
    yield closed({"value": item})
    yield closed({"a": item, "b": {"type": "boolean"}}, required=["b"])
    yield {"type": "object", "patternProperties": {"^k[0-9]$": item}, "additionalProperties": False, "maxProperties": 1}
    yield {
        "type": "object",
        "properties": {"n": item},
        "required": ["n"],
        "additionalProperties": {"type": "null"},
        "maxProperties": 2,
    }


def _combined(item: Schema) -> Iterator[Schema]:
    yield {"anyOf": [item, {"type": "null"}]}
    yield {"allOf": [item]}
    yield {"$ref": "#/$defs/it", "$defs": {"it": item}}
    yield closed(
        {"kind": {"enum": ["x", "y"]}, "it": {"$ref": "#/$defs/it"}},
        **{"$defs": {"it": item}, "title": "T", "description": "d"},
    )
    yield {"oneOf": [closed({"t": {"const": "a"}, "v": item}), closed({"t": {"const": "b"}})]}


CHILDREN: Schema = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}
TREE: Schema = {
    "$ref": "#/$defs/node",
    "$defs": {"node": closed({"name": {"enum": ["n"]}, "children": CHILDREN})},
}  # fmt: skip


def all_schemas() -> list[Schema]:
    made = [*SCALARS, TREE]
    for make in (_arrays, _objects, _combined):
        made += [schema for item in SCALARS for schema in make(item)]
    return made
