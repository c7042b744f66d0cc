"""Request bodies: bytes to a checked request model, or one APIError that names the first bad field."""

import difflib
import json
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deploy.ingress.openai.bounded import is_text, refuse_constant
from deploy.ingress.openai.errors import APIError, invalid_request

T = TypeVar("T", bound=BaseModel)

MAX_DIGITS = 400
# As an error shows them.
MAX_KEY_CHARS, MAX_PATH_CHARS = 100, 400
CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_parameter",
}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def parse_body(raw: bytes, model: type[T]) -> T:
    """Check a body against a request model. Raises APIError (400)."""
    return check_content(read_json(raw), model, b"\\u" in raw)


def check_content(content: dict[str, Any], model: type[T], has_escapes: bool) -> T:
    """Check what a body holds against a request model. Raises APIError (400)."""
    if has_escapes:
        _refuse_surrogates(content)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _first_error(error, model) from None


def read_json(raw: bytes) -> dict[str, Any]:
    """Raises APIError (400)."""
    if not raw.strip():
        raise invalid_request("The body is empty: send a JSON object", code="invalid_json")
    try:
        content = json.loads(raw.decode("utf-8"), parse_int=_number, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise invalid_request(
            f"The body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_json"
        ) from None
    except RecursionError:
        raise invalid_request("The body nests too deeply", code="invalid_json") from None
    except ValueError as error:
        raise invalid_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise invalid_request(f"The body is not a JSON object but {_short.repr(content)}", code="invalid_json")
    return content


def _number(digits: str) -> int | float:
    """No field takes a number of more digits; to read and to show some thousands of them would take long."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _refuse_surrogates(content: dict[str, Any]) -> None:
    """Raises APIError (400), see is_text."""
    for path, text in _strings(content):
        if not is_text(text):
            shown = _shown(path).encode("utf-8", "backslashreplace").decode()
            message = f"{shown} holds half of a surrogate pair (such as \\ud800), which is not text"
            raise invalid_request(message, param=shown)


def _strings(content: dict[str, Any]) -> Iterator[tuple[list[str | int], str]]:
    """Every string in a JSON object (keys too) with its path, a list that changes as the walk goes on. Without
    recursion: a body may nest deeply.
    """
    path: list[str | int] = []
    levels = [_items(content)]
    while levels:
        key, value = next(levels[-1], (None, None))
        if key is None:
            levels.pop()
            continue
        path[len(levels) - 1 :] = [key]
        if isinstance(key, str):
            yield path, key
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, dict | list):
            levels.append(_items(value))


def _items(value: dict[str, Any] | list[Any]) -> Iterator[tuple[str | int, Any]]:
    return iter(value.items() if isinstance(value, dict) else enumerate(value))


def _shown(path: Iterable[str | int]) -> str:
    """A key may be as long as the body, and a path has as many keys as the body is deep."""
    return ".".join(str(key)[:MAX_KEY_CHARS] for key in path)[:MAX_PATH_CHARS]


def _first_error(error: ValidationError, model: type[BaseModel]) -> APIError:
    # An unknown field first: it is often the cause of the others ("promt" makes "prompt" missing).
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")[0]
    context = details.get("ctx", {})
    param = _shown((*details["loc"], *context.get("field", ())))
    return invalid_request(_describe(details, param, model), param or None, CODES.get(details["type"], "invalid_value"))


def _describe(details: ErrorDetails, param: str, model: type[BaseModel]) -> str:
    if details["type"] == "missing":
        return f"{param} is required"
    if details["type"] == "extra_forbidden":
        return f"unknown field {param!r}{_hint(details, model)}"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] in ("invalid", "unsupported"):
        return message
    return f"{param}={_short.repr(details['input'])}: {message}"


def _hint(details: ErrorDetails, model: type[BaseModel]) -> str:
    if len(details["loc"]) != 1:
        return ""
    close = difflib.get_close_matches(_shown(details["loc"]), model.model_fields, n=1)
    return f": did you mean {close[0]!r}?" if close else ""
