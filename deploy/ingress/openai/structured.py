"""`response_format` (OpenAI) and `structured_outputs` (vLLM): what an answer is to look like.

Here is checked what can be without the model; what a grammar means, and what it costs, shows in a sandbox.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict

from deploy.ingress.openai.bounded import MAX_CHARS, bounded, parsed

MAX_CHOICES = 5000
MAX_TAGS = 64
KINDS = ("json", "regex", "choice", "grammar", "structural_tag")


@dataclass(frozen=True, slots=True)
class AskedFormat:
    """The field that asks, and the arguments of GrammarWriter.write() (deploy/ingress/text/grammar.py)."""

    param: str
    kind: str
    value: Any


class ResponseFormat(TypedDict, total=False):
    """As OpenAPI shows it."""

    type: str
    json_schema: dict[str, Any]


class StructuredOutputs(TypedDict, total=False):
    json: Any
    regex: str
    choice: list[str]
    grammar: str
    structural_tag: Any
    json_object: bool


def as_response_format(value: Any) -> AskedFormat | None:
    """None for free text."""
    field = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_schema":
        return AskedFormat(field, "json", _named_schema(_only(value, field, "type", "json_schema").get("json_schema")))
    if kind == "structural_tag":
        return AskedFormat(field, "structural_tag", _tags({k: v for k, v in value.items() if k != "type"}, field))
    if kind not in ("text", "json_object"):
        raise ValueError(
            'must look like {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}; other types are '
            "'json_object', 'text' and 'structural_tag'"
        )
    _only(value, field, "type")
    return None if kind == "text" else AskedFormat(field, "json", {"type": "object"})


def as_structured_outputs(value: Any) -> AskedFormat:
    field = "structured_outputs"
    if not isinstance(value, dict):
        raise ValueError(f"must be an object with one of {', '.join(KINDS)}")
    given = {key: item for key, item in value.items() if item is not None and item is not False}
    given = _only(given, field, *KINDS, "json_object")
    if len(given) != 1:
        raise ValueError(f"must have exactly one of {', '.join(KINDS)}, json_object; it has {len(given)}")
    [(kind, asked)] = given.items()
    if kind == "json_object":
        return AskedFormat(field, "json", {"type": "object"})
    checks: dict[str, Callable[[Any], Any]] = {
        "json": as_schema,
        "choice": _choices,
        "structural_tag": _structural_tag,
    }
    check = checks.get(kind)
    return AskedFormat(field, kind, check(asked) if check else _text(asked))


def _named_schema(value: Any) -> dict[str, Any]:
    """The `schema` of OpenAI's json_schema. Answers are always held to it, so `strict` changes nothing."""
    if not isinstance(value, dict) or "schema" not in value:
        raise ValueError('json_schema must look like {"name": ..., "schema": {...}, "strict": true}')
    _only(value, "json_schema", "name", "description", "schema", "strict")
    return as_schema(value["schema"])


def as_schema(value: Any) -> dict[str, Any]:
    """A JSON schema, or the text of one."""
    schema = bounded(_parsed(value))
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    return schema


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parsed(_text(value))
    except ValueError as error:
        raise ValueError(f"it is not valid JSON: {error}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CHARS:
        raise ValueError(f"must be a text of 1 to {MAX_CHARS} characters")
    return value


def _choices(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError("choice must be a list of texts")
    if not 0 < len(value) <= MAX_CHOICES or sum(map(len, value)) > MAX_CHARS:
        raise ValueError(f"choice: {len(value)} texts; 1 to {MAX_CHOICES} of {MAX_CHARS} characters in all can be used")
    return value


def _structural_tag(value: Any) -> dict[str, Any]:
    return _tags(_parsed(value), "structural_tag")


def _tags(value: Any, field: str) -> dict[str, Any]:
    """vLLM's older form: structures with begin, schema and end, and the triggers that they begin with."""
    structures, triggers = (value.get("structures"), value.get("triggers")) if isinstance(value, dict) else (None, None)
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise ValueError(
            'structural_tag must look like {"structures": [{"begin", "schema", "end"}], "triggers": [...]}'
        )
    _only(value, field, "structures", "triggers", "type")
    if not 0 < len(structures) <= MAX_TAGS or not all(map(_is_tag, structures)):
        raise ValueError(f"structures must be 1 to {MAX_TAGS} objects with the keys begin, schema and end")
    if not triggers or not all(isinstance(each, str) and each for each in triggers):
        raise ValueError("triggers must be a list of texts")
    tags = [{"begin": tag["begin"], "schema": as_schema(tag["schema"]), "end": tag["end"]} for tag in structures]
    found = {"tags": tags, "triggers": triggers}
    bounded(found)
    return found


def _is_tag(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"begin", "schema", "end"} and isinstance(value["begin"], str)


def _only(value: dict[str, Any], where: str, *known: str) -> dict[str, Any]:
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise ValueError(f"{where} has the key {str(unknown)[:60]!r}, which is not supported: use {', '.join(known)}")
    return value
