"""Answers are written in pieces, of which none is long, and say the same as in one piece."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages.requests import RoutedExperts, TokenLogprob
from deploy.ingress.openai import answer_json
from deploy.ingress.openai.answer_json import Base64, Rows, dump
from deploy.ingress.openai.choices import ChoiceDelta, TokenRow
from deploy.ingress.openai.parsing import parse_body
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest
from deploy.ingress.openai.responses import ChatResponder, CompletionResponder, Usage
from deploy.ingress.text.tokens import Tokenizer
from tests import tiny_tokenizers

TOKENIZER = Tokenizer(tiny_tokenizers.byte_level())
SCORED = TokenLogprob(5, -1.5, 3, ((6, -0.5), (7, -1.0)))
ASKED = {"return_token_ids": True, "return_routed_experts": True, "prompt_logprobs": 2}


def delta(num_tokens: int) -> ChoiceDelta:
    """All that an answer can hold, `num_tokens` times."""
    rows = tuple(TokenRow(5, SCORED, n) for n in range(num_tokens))
    scores = (None, *[SCORED] * num_tokens)
    routed = RoutedExperts((num_tokens, 1, 1), "uint8", bytes(num_tokens))
    ids = (5,) * num_tokens
    return ChoiceDelta(0, 'x"€😀\n' * num_tokens, ids, rows, True, ids, scores, "length", None, routed)


def answer(is_chat: bool, num_tokens: int) -> Any:
    if is_chat:
        fields = ASKED | {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
        chat = parse_body(json.dumps(fields).encode(), ChatCompletionRequest)
        return ChatResponder(chat, TOKENIZER, "demo", "r", 1).response([[delta(num_tokens)]] * 2, Usage())
    fields = ASKED | {"prompt": "Hi", "logprobs": 2}
    completion = parse_body(json.dumps(fields).encode(), CompletionRequest)
    return CompletionResponder(completion, TOKENIZER, "demo", "r", 1).response([[delta(num_tokens)]] * 2, Usage())


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_json, "PIECE_ROWS", 2)
    monkeypatch.setattr(answer_json, "PIECE_CHARS", 8)


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 8])
def test_pieces_say_what_the_whole_says(short_pieces: None, is_chat: bool, num_tokens: int) -> None:
    written = dump(answer(is_chat, num_tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_json, "PIECE_ROWS", 1000)
        patch.setattr(answer_json, "PIECE_CHARS", 1000)
        assert written == dump(answer(is_chat, num_tokens))
    assert json.loads(written)["choices"][0]["index"] == 0


@pytest.mark.parametrize("is_chat", [False, True])
def test_no_piece_grows_with_the_answer(is_chat: bool) -> None:
    short, long = (list(answer_json._pieces(answer(is_chat, num_tokens))) for num_tokens in (500, 30_000))
    assert sum(map(len, long)) > 50 * sum(map(len, short))
    assert max(map(len, long)) < 150_000


@given(st.lists(st.integers() | st.text()), st.text(), st.binary())
def test_rows_texts_and_bytes(rows: list[Any], text: str, data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_json, "PIECE_ROWS", 2)
        patch.setattr(answer_json, "PIECE_CHARS", 8)
        text = text.encode("utf-8", "replace").decode()
        rows = [row.encode("utf-8", "replace").decode() if isinstance(row, str) else row for row in rows]
        written = json.loads(dump({"a": [{"rows": Rows(rows, lambda row: [row])}], text: text, "data": Base64(data)}))
    expected = {"a": [{"rows": [[row] for row in rows]}], text: text, "data": base64.b64encode(data).decode()}
    assert written == expected


def test_items_are_made_when_they_are_written() -> None:
    made: list[int] = []
    pieces = answer_json._pieces({"rows": Rows(range(1000), lambda n: made.append(n) or n)})  # type: ignore[func-returns-value]
    for _ in range(3):
        next(pieces)
    assert len(made) == answer_json.PIECE_ROWS
