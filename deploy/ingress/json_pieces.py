"""JSON without long calls: json keeps the interpreter's lock from a text's first character to its last, and with it
everyone's streams. A sandbox reads a body and hands it on in pieces, which are put together again here.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from deploy.ingress.openai.errors import invalid_request

# Reading a piece of this size takes a few milliseconds.
PIECE_ITEMS, PIECE_CHARS = 4096, 50_000
MAX_CONTAINERS = 10_000
# No field has such a name, and a key can't be divided.
MAX_KEY_CHARS = 1000


def in_pieces(content: dict[str, Any]) -> Iterator[str]:
    """A JSON object as short texts for join_pieces(). Raises APIError (400).

    Each text is a list of parts, [number, items]. The object is number 0. Lists, objects and long strings are left
    empty where they are met: each has the next number, and follows in parts of its own.
    """
    piece: list[str] = []
    size = 0
    for part in _parts(content):
        if piece and size + len(part) > PIECE_CHARS:
            yield f"[{','.join(piece)}]"
            piece, size = [], 0
        piece.append(part)
        size += len(part)
    yield f"[{','.join(piece)}]"


def _parts(content: dict[str, Any]) -> Iterator[str]:
    met: list[Any] = [content]
    num_fields = 0
    for number, value in enumerate(met):
        if isinstance(value, str):
            yield from (_dump([number, value[at : at + PIECE_CHARS]]) for at in range(0, len(value), PIECE_CHARS))
            continue
        keys = _keys(value) if isinstance(value, dict) else []
        num_fields += len(keys)
        values = list(value.values()) if isinstance(value, dict) else value
        for at in range(0, len(values), PIECE_ITEMS):
            some = values[at : at + PIECE_ITEMS]
            apart = [item for item in some if _is_apart(item)] if _holds(some, list, dict, str) else []
            met += apart
            if len(met) + num_fields > MAX_CONTAINERS:
                raise invalid_request(f"The body holds more than {MAX_CONTAINERS} lists, objects and fields")
            left = [_left(item) for item in some] if apart else some
            yield from _texts(number, dict(zip(keys[at:], left, strict=False)) if keys else left)


def _keys(value: dict[str, Any]) -> list[str]:
    longest = max(map(len, value), default=0)
    if longest > MAX_KEY_CHARS:
        raise invalid_request(f"The body holds a key of {longest} characters: no field has more than {MAX_KEY_CHARS}")
    return list(value)


def _holds(values: Iterable[Any], *types: type) -> bool:
    """Millions of numbers are to be passed over quickly."""
    return not frozenset(types).isdisjoint(map(type, values))


def _is_apart(value: Any) -> bool:
    return isinstance(value, list | dict) or (isinstance(value, str) and len(value) > PIECE_CHARS)


def _left(value: Any) -> Any:
    """What is left of a value where it is met."""
    if not _is_apart(value):
        return value
    return {} if isinstance(value, dict) else []


def _texts(number: int, part: list[Any] | dict[str, Any]) -> Iterator[str]:
    """A part, divided where it is long."""
    text = _dump([number, part])
    if len(text) <= PIECE_CHARS or len(part) == 1:
        yield text
        return
    items, kind = (list(part.items()), dict) if isinstance(part, dict) else (part, list)
    yield from _texts(number, kind(items[: len(items) // 2]))
    yield from _texts(number, kind(items[len(items) // 2 :]))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def join_pieces(pieces: list[bytes]) -> Any:
    """The object that was read. For a thread: between pieces others get their turn."""
    root: dict[str, Any] = {"": {}}
    places: list[tuple[Any, Any]] = [(root, "")]  # where the value of each number stands
    texts: set[int] = set()
    for piece in pieces:
        for number, part in json.loads(piece):
            holder, key = places[number]
            if isinstance(part, str):
                texts.add(number)
                holder[key].append(part)
            else:
                places += _add(holder[key], part)
    for holder, key in (places[number] for number in texts):
        holder[key] = "".join(holder[key])
    return root[""]


def _add(value: Any, part: Any) -> list[tuple[Any, Any]]:
    """Returns the places of what is still empty."""
    if isinstance(part, dict):
        value.update(part)
        return [(value, key) for key, item in part.items() if isinstance(item, list | dict)]
    first = len(value)
    value += part
    if not _holds(part, list, dict):
        return []
    return [(value, n) for n, item in enumerate(part, first) if isinstance(item, list | dict)]
