"""JSON within fields whose shape is the client's own: schemas, tools, variables of templates. Bounded before use."""

import json
import math
from typing import Any, NoReturn

MAX_CHARS = 100_000
MAX_DEPTH = 50


def bounded(value: Any) -> Any:
    """The same value, if it is at most about MAX_CHARS long and MAX_DEPTH deep, and can be written as JSON. Without
    recursion, and without looking at more than it allows. Raises ValueError.
    """
    left, level = MAX_CHARS, [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            left -= _size(item)
            if left < 0:
                raise ValueError(f"it has more than {MAX_CHARS} characters")
            if isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                inner += item
        if not inner:
            return value
        level = inner
    raise ValueError(f"it nests more than {MAX_DEPTH} levels deep")


def _size(item: Any) -> int:
    """Characters of an item, with one for each that a list or an object holds. Raises ValueError."""
    if isinstance(item, str):
        if not is_text(item):
            raise ValueError("it holds half of a surrogate pair (such as \\ud800), which is not text")
        return len(item)
    if isinstance(item, float) and not math.isfinite(item):
        raise ValueError("it holds a number that is too large")
    return len(item) if isinstance(item, dict | list) else 1


def parsed(text: str) -> Any:
    """JSON in a text. Raises ValueError."""
    if len(text) > MAX_CHARS:
        raise ValueError(f"it has more than {MAX_CHARS} characters")
    try:
        return bounded(json.loads(text, parse_constant=refuse_constant))
    except RecursionError:
        raise ValueError(f"it nests more than {MAX_DEPTH} levels deep") from None


def is_text(text: str) -> bool:
    """Half of a surrogate pair is legal JSON but no text: no tokenizer can take it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
