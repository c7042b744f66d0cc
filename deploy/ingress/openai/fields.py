"""Checks of single fields that a type alone can't express, each with one readable message.

Every function takes the JSON value and returns the checked one, or raises what pydantic turns into an error.
"""

from typing import Any

from pydantic_core import PydanticCustomError

from deploy.ingress.openai.bounded import bounded

MAX_STOP_CHARS = 1000
MAX_BIASES = 1024
MAX_STOP_TOKEN_IDS = 1024
# Variables of a chat template that are made of other fields.
TEMPLATE_FIELDS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


def refuse(field: str | tuple[str, ...], message: str, kind: str = "invalid") -> PydanticCustomError:
    """An error of the whole model that belongs to one field (or a path). `kind`: "invalid" or "unsupported"."""
    path = (field,) if isinstance(field, str) else field
    return PydanticCustomError(kind, "{message}", {"message": message, "field": path})


def is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def as_prompts(value: Any) -> list[str] | list[list[int]]:
    """A prompt or several, as text or as token ids, always as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if is_token_ids(value):
            return [value]
        if all(is_token_ids(item) and item for item in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")


def as_token_ids(value: Any) -> list[int]:
    if is_token_ids(value):
        return value  # type: ignore[no-any-return]
    raise ValueError("must be a list of token ids (integers from 0)")


def as_template_kwargs(value: Any) -> dict[str, Any]:
    """Variables of the chat template; not those that the request has fields for."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    if taken := value.keys() & TEMPLATE_FIELDS:
        raise ValueError(f"{min(taken)} is a field of the request, or made of its fields: send it there")
    bounded(value)
    return value


def as_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise ValueError("must be a string or a list of strings")
    if any(not item or len(item) > MAX_STOP_CHARS for item in stops):
        raise ValueError(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(stops))


def as_stop_token_ids(value: Any) -> list[int]:
    if len(as_token_ids(value)) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"must have at most {MAX_STOP_TOKEN_IDS} entries")
    return as_token_ids(value)


def as_logit_bias(value: Any) -> dict[int, float]:
    """JSON keys are strings, so token ids come as decimal digits."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"must be an object of at most {MAX_BIASES} token ids and biases")
    for key, bias in value.items():
        # 18 digits fit an int64; whether the id is in the vocabulary is checked later.
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 18):
            raise ValueError(f"key {key!r:.60} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


def as_content(value: Any) -> str:
    """A message's content: text, or a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    return "\n".join(_text_of(part) for part in value)


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None:
        raise ValueError('a content part must look like {"type": "text", "text": "..."}')
    if kind != "text":
        raise PydanticCustomError(
            "unsupported", "{message}", {"message": f"content part type {kind!r:.60} is not supported: only 'text'"}
        )
    if part.keys() - {"type", "text"} or not isinstance(part.get("text"), str):
        raise ValueError("a text part has the keys 'type' and 'text', and text is a string")
    return str(part["text"])
