"""Bodies in pieces: whatever they hold, no piece is long, and together they are what was sent."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.ingress import json_pieces
from deploy.ingress.json_pieces import in_pieces, join_pieces
from deploy.ingress.openai.errors import APIError

CHARS = 50
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=2 * CHARS),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=5), inner, max_size=9),
    max_leaves=40,
)


@pytest.fixture(scope="module", autouse=True)
def short_pieces() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_pieces, "PIECE_CHARS", CHARS)
        patch.setattr(json_pieces, "PIECE_ITEMS", 4)
        yield


def pieces_of(content: dict[str, Any]) -> list[bytes]:
    return [piece.encode("utf-8", "surrogatepass") for piece in in_pieces(content)]


@given(content=st.dictionaries(st.text(max_size=5), JSON, max_size=9))
def test_together_they_are_the_whole(content: dict[str, Any]) -> None:
    assert join_pieces(pieces_of(content)) == content


MANY = {
    "short lists": {"prompt": [[1, 2, 3]] * 500},
    "messages": {"messages": [{"role": "user", "content": "Hi"}] * 500},
    "a text": {"prompt": "x" * 5000},
    "half of a surrogate pair": {"prompt": "\ud800" * 5000},
    "texts": {"prompt": ["x" * CHARS] * 100},
    "numbers": {"prompt": [10**20] * 500},
    "fields": {str(n): n for n in range(500)},
    "keys": {"k" * CHARS: {"k" * CHARS: [1] * 500}},
}


@pytest.mark.parametrize("name", MANY)
def test_no_piece_is_long(name: str) -> None:
    """A key, a text of its own length, and what stands around them."""
    pieces = pieces_of(MANY[name])
    assert max(len(piece.decode("utf-8", "surrogatepass")) for piece in pieces) < 3 * CHARS
    assert join_pieces(pieces) == MANY[name]


def test_a_key_is_sent_once() -> None:
    content = {"k" * 1000: [1] * 10_000}
    assert sum(map(len, pieces_of(content))) < 1000 + 10_000 * 6


def test_a_key_that_is_no_field_is_refused() -> None:
    with pytest.raises(APIError, match="a key of 1001 characters: no field has more than 1000"):
        pieces_of({"metadata": {"k" * 1001: 1}})


def test_depth_is_no_matter() -> None:
    content: dict[str, Any] = {}
    for _ in range(4000):
        content = {"a": content}
    assert len(join_pieces(pieces_of(content))) == 1


@pytest.mark.parametrize("content", [{"a": [{}] * 10_000}, {str(n): 0 for n in range(10_000)}, {"a": [[]] * 10_000}])
def test_containers_are_counted(content: dict[str, Any]) -> None:
    with pytest.raises(APIError, match="more than 10000 lists, objects and fields"):
        pieces_of(content)
