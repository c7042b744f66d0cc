"""Answers as JSON, written in pieces: json keeps the interpreter's lock from a text's first character to its last, and
with it everyone's streams.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Writing so much takes a few milliseconds; a row may hold 20 log-probabilities.
PIECE_ROWS, PIECE_CHARS = 64, 100_000


class Rows(Generic[T]):
    """A list that grows with its request; `shape` makes the JSON of each item, only when that is written."""

    def __init__(self, items: Sequence[T], shape: Callable[[T], Any]) -> None:
        self._items = items
        self._shape = shape

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return map(self._shape, self._items)

    def pieces(self) -> Iterator[str]:
        yield "["
        for at in range(0, len(self), PIECE_ROWS):
            some = _encode([self._shape(item) for item in self._items[at : at + PIECE_ROWS]])
            yield f"{',' if at else ''}{some[1:-1]}"
        yield "]"


class Base64:
    """Bytes as a text."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def pieces(self) -> Iterator[str]:
        yield '"'
        size = PIECE_CHARS // 4 * 3  # three bytes are four characters
        yield from (base64.b64encode(self._data[at : at + size]).decode() for at in range(0, len(self._data), size))
        yield '"'


def dump(value: Mapping[str, Any]) -> bytes:
    """Compact JSON; a non-finite number is a bug and raises."""
    return b"".join(piece.encode() for piece in _pieces(value))


def _pieces(value: Any) -> Iterator[str]:
    if not _is_long(value):
        yield _encode(value)
    elif isinstance(value, Rows | Base64):
        yield from value.pieces()
    elif isinstance(value, str):
        yield '"'
        yield from (_encode(value[at : at + PIECE_CHARS])[1:-1] for at in range(0, len(value), PIECE_CHARS))
        yield '"'
    elif isinstance(value, dict):
        for n, (key, item) in enumerate(value.items()):
            yield f"{',' if n else '{'}{_encode(key)}:"
            yield from _pieces(item)
        yield "}"
    else:
        for n, item in enumerate(value):
            yield "," if n else "["
            yield from _pieces(item)
        yield "]"


def _is_long(value: Any) -> bool:
    """Whether it is, or something in it."""
    if isinstance(value, dict):
        return any(map(_is_long, value.values()))
    if isinstance(value, list):
        return len(value) > PIECE_ROWS or any(map(_is_long, value))
    if isinstance(value, str):
        return len(value) > PIECE_CHARS
    return isinstance(value, Base64) or (isinstance(value, Rows) and len(value) > PIECE_ROWS)


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=list).encode
