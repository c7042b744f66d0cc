"""Tools in requests (`tools`, `tool_choice`) and calls in messages, checked and made ready for a chat template."""

from dataclasses import dataclass
from typing import Any, Literal

from deploy.ingress.openai.bounded import bounded, parsed
from deploy.ingress.openai.structured import as_schema

MAX_TOOLS = 128
MAX_NAME_CHARS = 64
ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Tool:
    """`shown` is what the chat template gets: the tool as it was sent."""

    name: str
    parameters: dict[str, Any]
    is_strict: bool
    shown: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`name` is that of the function that must be called."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None


def as_tools(value: Any) -> tuple[Tool, ...]:
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise ValueError(f"must be a list of at most {MAX_TOOLS} tools")
    tools = tuple(map(_as_tool, value))
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two functions are named {twice!r}")
    return tools


def _as_tool(value: Any) -> Tool:
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(value.get("function"), dict):
        raise ValueError('a tool must look like {"type": "function", "function": {"name": ..., "parameters": {...}}}')
    function = bounded(value)["function"]
    unknown = {*value} - {"type", "function"} | {*function} - {"name", "description", "parameters", "strict"}
    if unknown:
        raise ValueError(f"a tool has the key {min(map(str, unknown))[:60]!r}, which is not supported")
    if not isinstance(function.get("description") or "", str) or not isinstance(function.get("strict") or False, bool):
        raise ValueError("description must be a text, strict true or false")
    parameters = function.get("parameters")
    schema = as_schema(ANY_OBJECT | {"properties": {}} if parameters is None else parameters)
    return Tool(_name(function.get("name")), schema, bool(function.get("strict")), value)


def _name(value: Any) -> str:
    is_name = isinstance(value, str) and value.replace("_", "a").replace("-", "a").replace(".", "a").isalnum()
    if not is_name or not value.isascii() or len(value) > MAX_NAME_CHARS:
        raise ValueError(f"a function's name must be up to {MAX_NAME_CHARS} letters, digits and _-.")
    return str(value)


def as_tool_choice(value: Any) -> ToolChoice:
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        return ToolChoice("required", _name(value["function"].get("name")))
    raise ValueError('must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')


def as_tool_calls(value: Any) -> tuple[dict[str, Any], ...]:
    """Calls of an earlier answer, for a template: arguments as an object, as transformers' templates expect them."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise ValueError(f"must be a list of at most {MAX_TOOLS} calls")
    return tuple(map(_as_call, value))


def _as_call(value: Any) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or value.get("type", "function") != "function":
        raise ValueError('a call must look like {"id": ..., "type": "function", "function": {"name", "arguments"}}')
    if not isinstance(function.get("name"), str) or not isinstance(value.get("id", ""), str):
        raise ValueError("a call's id and name must be texts")
    shown = {"type": "function", "function": {"name": function["name"], "arguments": _arguments(function)}}
    return {"id": value["id"]} | shown if "id" in value else shown


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    try:
        read = parsed(arguments) if isinstance(arguments, str) and arguments.strip() else bounded(arguments or {})
    except ValueError as error:
        raise ValueError(f"the arguments of {function['name']!r:.70} can't be used: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"the arguments of {function['name']!r:.70} are no JSON object")
    return read
