"""Thoughts are told apart from answers, however the text is cut."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages.requests import RequestOutput, SamplingParams
from deploy.ingress.openai.choices import Choice, ChoiceDelta, merge
from deploy.ingress.openai.errors import APIError
from deploy.ingress.openai.parsing import parse_body
from deploy.ingress.openai.requests import ChatCompletionRequest
from deploy.ingress.openai.responses import ChatResponder, Usage
from deploy.ingress.text.reasoning import MARKS, ReasoningSplitter, is_begun, may_think
from deploy.ingress.text.tokens import Tokenizer
from tests import tiny_tokenizers

CASES = [
    ("<think>\nI count.\n</think>\n\nThree.", False, "I count.", "Three."),
    ("\n<think>a < b </think c</think>x", False, "a < b </think c", "x"),
    ("It goes on.\n</think>\n\nThree.", True, "It goes on.", "Three."),
    ("no thought <think>here</think>", False, "", "no thought <think>here</think>"),
    ("  blanks first", False, "", "  blanks first"),
    ("<think>cut off by the length \n", False, "cut off by the length", ""),
    ("<think>\n\n</think>\n\nanswer</think>", False, "", "answer</think>"),
    ("<thi", False, "", "<thi"),
    ("", True, "", ""),
    ("one\n\ntwo</thin", True, "one\n\ntwo</thin", ""),
]


def split(pieces: list[str], begun: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(begun)
    told = [splitter.feed(piece, number == len(pieces) - 1) for number, piece in enumerate(pieces)]
    return "".join(thought for thought, _ in told), "".join(answer for _, answer in told)


@pytest.mark.parametrize(("text", "begun", "thought", "answer"), CASES)
@given(data=st.data())
def test_however_the_text_is_cut(text: str, begun: bool, thought: str, answer: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(pieces, begun) == (thought, answer)
    assert split(list(text) or [""], begun) == (thought, answer)


def test_what_is_sure_is_told_at_once() -> None:
    splitter = ReasoningSplitter(False)
    told = [
        splitter.feed(piece, False) for piece in ("<think>", "One", " two.", "\n</th", "ink>", "\n", "Three", " four")
    ]
    assert told == [("", ""), ("One", ""), (" two.", ""), ("", ""), ("", ""), ("", ""), ("", "Three"), ("", " four")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("user: hi\n<think>\n", True),
        ("hi\n<think>\n\n</think>\n\n", False),
        ("hi", False),
        ("</think><think>", True),
        ("say <think>\nnow", False),
    ],
)
def test_the_prompt_tells_whether_a_thought_has_begun(tmp_path: Path, prompt: str, expected: bool) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}</think>{% endif %}"
    tokenizer = Tokenizer.load(tiny_tokenizers.write(tiny_tokenizers.byte_level(), tmp_path, template))
    assert may_think(tokenizer)
    tokens = tokenizer.encode(prompt, add_special_tokens=False)
    assert is_begun(tokens, tokenizer) == expected
    assert is_begun(tokens, tokenizer, continues_message=True) == (expected or prompt.startswith("say"))


THOUGHT = "<think>\nI count.\n</think>\n\nThree."


def chat_choice(
    text: str, tokenizer: Tokenizer | None = None, **fields: Any
) -> tuple[ChatResponder, list[ChoiceDelta]]:
    """A choice of an answer that comes in pieces of three tokens."""
    tokenizer = tokenizer or Tokenizer(tiny_tokenizers.byte_level())
    body = {"messages": [{"role": "user", "content": "Hi"}]} | fields
    request = parse_body(json.dumps(body).encode(), ChatCompletionRequest)
    params = SamplingParams(max_tokens=500, stop_token_ids=(0,))
    choice = Choice(0, request, params, (1, 2), tokenizer, (0,), (), ReasoningSplitter(False))
    ids = tokenizer.encode(text, add_special_tokens=False)
    outputs = [RequestOutput("a", tuple(ids[at : at + 3])) for at in range(0, len(ids), 3)]
    deltas = [choice.feed(output) for output in [*outputs, RequestOutput("a", (0,), finish_reason="stop")]]
    return ChatResponder(request, tokenizer, "m"), [delta for delta in deltas if not delta.is_empty]


@pytest.mark.parametrize("include", [True, False])
def test_answers_and_streams_have_thoughts_of_their_own(include: bool) -> None:
    responder, deltas = chat_choice(THOUGHT, include_reasoning=include)
    message = responder.response([deltas], Usage(2, 9, 0))["choices"][0]["message"]
    assert message["content"] == "Three."
    assert message.get("reasoning_content") == ("I count." if include else None)
    chunks = [responder.chunk(delta)["choices"][0]["delta"] for delta in deltas]
    assert "".join(chunk.get("content", "") for chunk in chunks) == "Three."
    assert "".join(chunk.get("reasoning_content", "") for chunk in chunks) == ("I count." if include else "")
    assert all(not (chunk.get("content") and chunk.get("reasoning_content")) for chunk in chunks)


def test_what_the_request_may_say_of_the_template() -> None:
    def parse(**fields: Any) -> ChatCompletionRequest:
        body = {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]} | fields
        return parse_body(json.dumps(body).encode(), ChatCompletionRequest)

    request = parse(chat_template_kwargs={"enable_thinking": False})
    assert request.chat_template_kwargs == {"enable_thinking": False}
    assert request.messages[0].for_template() == {"role": "assistant", "content": "x", "reasoning_content": "y"}
    for bad in ({"messages": []}, {"tools": 1}, ["enable_thinking"]):
        with pytest.raises(APIError, match="chat_template_kwargs"):
            parse(chat_template_kwargs=bad)


def test_marks_that_are_special_tokens_are_seen_all_the_same() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.add_special_tokens(list(MARKS))
    _, deltas = chat_choice(THOUGHT, tokenizer=Tokenizer(tokenizer))
    assert (merge(deltas).reasoning, merge(deltas).text) == ("I count.", "Three.")
