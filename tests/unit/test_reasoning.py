"""Thoughts are told apart from answers, however the text is cut."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.ingress.text.reasoning import ReasoningSplitter, is_begun, may_think
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
    told = [splitter.feed(piece, False) for piece in ("<think>", "One", " two.", "\n</th", "ink>", "\n", "Three", " four")]
    assert told == [("", ""), ("One", ""), (" two.", ""), ("", ""), ("", ""), ("", ""), ("", "Three"), ("", " four")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("user: hi\n<think>\n", True), ("hi\n<think>\n\n</think>\n\n", False), ("hi", False), ("</think><think>", True)],
)
def test_the_prompt_tells_whether_a_thought_has_begun(tmp_path: Path, prompt: str, expected: bool) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}</think>{% endif %}"
    tokenizer = Tokenizer.load(tiny_tokenizers.write(tiny_tokenizers.byte_level(), tmp_path, template))
    assert may_think(tokenizer)
    assert is_begun(tokenizer.encode(prompt, add_special_tokens=False), tokenizer) == expected
