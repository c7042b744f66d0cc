"""Bodies that are wrong in a thousand places, or in a place with a long name: refusing them takes little."""

import difflib
import json
import tracemalloc

import pytest
from pydantic import ValidationError

from deploy.ingress.openai.errors import APIError
from deploy.ingress.openai.parsing import parse_body
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest


def test_many_strings_under_a_long_key_take_little_memory() -> None:
    raw = b'{"%s": [%s], "x": "\\u0041"}' % (b"k" * 20_000, b",".join([b'""'] * 2_000))
    tracemalloc.start()
    with pytest.raises(APIError):
        parse_body(raw, CompletionRequest)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * len(raw), "a path for each of them would take 1,500 times as much"


def test_thousands_of_errors_are_as_good_as_some() -> None:
    content = {"messages": [{}] * 3000} | {str(n): n for n in range(1000)}
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate(content)
    assert [error["loc"] for error in caught.value.errors()] == [
        ("messages", 0, "role"),
        ("0",),
    ]


def test_a_long_name_is_not_compared_with_every_field(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda word, *_, **__: compared.append(word) or [])
    with pytest.raises(APIError, match="unknown field"):
        parse_body(json.dumps({"t" * 5000: 1}).encode(), CompletionRequest)
    assert compared == ["t" * 100]


def test_a_path_is_shown_cut() -> None:
    raw = b'{"%s": ' % (b"k" * 5_000) * 90 + rb'"\ud800"' + b"}" * 90
    with pytest.raises(APIError, match="half of a surrogate pair") as caught:
        parse_body(raw, CompletionRequest)
    assert caught.value.param is not None
    assert caught.value.param == ".".join(["k" * 100] * 90)[:400]
