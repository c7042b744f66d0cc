"""Calls of tools in the text of a model, however the text is cut into deltas."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benchmarks.byte_tokenizer import CHAT_TEMPLATE
from deploy.ingress.openai.choices import ChoiceDelta, merge
from deploy.ingress.openai.errors import APIError
from deploy.ingress.openai.parsing import parse_body
from deploy.ingress.openai.requests import ChatCompletionRequest
from deploy.ingress.openai.response_events import ResponsesResponder
from deploy.ingress.openai.response_requests import ResponsesRequest
from deploy.ingress.text.chat_template import ChatTemplate
from deploy.ingress.text.json_call import JsonCall
from deploy.ingress.text.tokens import Tokenizer
from deploy.ingress.text.tool_calls import FORMATS, ToolCallParser, find_format, join_calls
from tests import tiny_tokenizers
from tests.checkpoints import MODELS, write_checkpoint

HERMES, GRANITE = FORMATS["hermes"], FORMATS["granite"]
ARGUMENTS = '{"a": 1, "b": [{"c": "}\\"]{"}, null], "d": {}}'
CALL = f'{{"name": "f", "arguments": {ARGUMENTS}}}'
Calls = list[tuple[str | None, str]]
TEXTS: dict[str, tuple[Any, str, str, Calls]] = {
    "one": (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [("f", ARGUMENTS)]),
    "behind text": (HERMES, f"Let me look.\n<tool_call>{CALL}</tool_call>", "Let me look.\n", [("f", ARGUMENTS)]),
    "two": (
        HERMES,
        f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "g"}}\n</tool_call>\n',
        "",
        [("f", ARGUMENTS), ("g", "{}")],
    ),
    "arguments first": (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}', "", [("f", '{"a": 1}')]),
    "arguments as text": (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
    "arguments null": (HERMES, '<tool_call>{"name": "f", "arguments": null}', "", [("f", "{}")]),
    "arguments blank": (HERMES, '<tool_call>{"name": "f", "arguments": ""}', "", [("f", "{}")]),
    "parameters": (HERMES, '<tool_call>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "text behind": (HERMES, f"<tool_call>{CALL}</tool_call> Done.", " Done.", [("f", ARGUMENTS)]),
    "cut off": (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    "cut off early": (HERMES, '<tool_call>{"na', '<tool_call>{"na', []),
    "no name": (HERMES, '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "no JSON": (HERMES, "<tool_call>nothing", "<tool_call>nothing", []),
    "almost a mark": (HERMES, "a <tool and <tool_", "a <tool and <tool_", []),
    "no call": (HERMES, "  plain {text}  ", "  plain {text}  ", []),
    "blanks": (HERMES, " \n ", " \n ", []),
    "a list": (
        GRANITE,
        f'<|tool_call|>[{CALL}, {{"name": "g", "arguments": {{}}}}]',
        "",
        [("f", ARGUMENTS), ("g", "{}")],
    ),
    "no list": (GRANITE, f"<|tool_call|> {CALL}", "", [("f", ARGUMENTS)]),
    "text and list": (GRANITE, f"I see.<|tool_call|>[{CALL}]\n", "I see.", [("f", ARGUMENTS)]),
}  # fmt: skip


def parse(parser: ToolCallParser, pieces: list[str]) -> tuple[str, Calls]:
    content, deltas = "", ()
    for piece in pieces:
        more, new = parser.feed(piece)
        content, deltas = content + more, (*deltas, *new)
    content += parser.flush()
    calls = join_calls(deltas)
    assert [call.index for call in calls] == list(range(len(calls)))
    assert all(call.id and call.id.startswith("call_") for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    return content, [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_content_and_calls(name: str, size: int) -> None:
    form, text, content, calls = TEXTS[name]
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert parse(ToolCallParser(form), pieces) == (content, calls)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_json_in_any_pieces(data: st.DataObject) -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
    arguments = json.dumps(data.draw(st.dictionaries(st.text(), values)), ensure_ascii=data.draw(st.booleans()))
    text = f'Text.<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(ToolCallParser(HERMES), pieces) == ("Text.", [("f", arguments)])


def test_arguments_come_before_they_are_complete() -> None:
    parser = ToolCallParser(HERMES)
    _, (first,) = parser.feed('<tool_call>{"name": "f", "arguments": {"a": ')
    assert (first.name, first.arguments) == ("f", '{"a": ')
    _, (second,) = parser.feed("12")
    assert (second.id, second.name, second.arguments) == (None, None, "12")


def test_blanks_are_looked_at_once() -> None:
    """A model that repeats them must not take longer with each."""
    parser = ToolCallParser(HERMES)
    for text in ("\n" * 6, '<tool_call>{"name": "f", "arguments": {}}</tool_call>'):
        parser.feed(text)
        for _ in range(20):
            parser.feed("\n" * 6)
            assert not parser._held
    assert parser.feed("Text")[0] == "\n" * 120 + "Text"


@pytest.mark.parametrize("arguments", ["[1]", "7", "0", '"seven"', '"[1]"', "[" * 200_000 + "]" * 200_000])
@pytest.mark.parametrize("size", [7, 10_000_000])
def test_arguments_that_are_no_object_are_no_call(arguments: str, size: int) -> None:
    """However they come: a call that a client has seen begin can't be taken back."""
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}'
    content, calls = parse(ToolCallParser(HERMES), [text[at : at + size] for at in range(0, len(text), size)])
    assert not calls
    assert content == text


@pytest.mark.parametrize("begin", ['{"arguments": {"a": "', '{"name": "f", "arguments": "', '{"', '{"a": "'])
def test_long_calls_are_read_in_pieces(begin: str) -> None:
    """Nothing that grows with a call is copied with each of its characters."""
    call = JsonCall()
    call.feed(begin + "x" * 50_000)
    texts = [value for value in vars(call).values() if isinstance(value, str)]
    assert max(map(len, texts)) < 100


def test_later_calls_than_allowed_are_dropped() -> None:
    text = TEXTS["two"][1]
    assert parse(ToolCallParser(HERMES, most=1), list(text)) == ("", [("f", ARGUMENTS)])


class TestForm:
    def tokenizer(self, source: str) -> Tokenizer:
        return Tokenizer(tiny_tokenizers.byte_level(), {}, ChatTemplate(source, {}))

    @pytest.mark.parametrize(
        ("setting", "source", "name"),
        [
            ("auto", "{% if tools %}call as <tool_call>{% endif %}", "hermes"),
            ("auto", "{% if tools %}call as <|tool_call|>{% endif %}", "granite"),
            ("auto", "{{ tools }}", None),
            ("auto", "<tool_call>", None),
            ("none", "{% if tools %}<tool_call>{% endif %}", None),
            ("granite", "", "granite"),
        ],
    )
    def test_is_that_of_the_template_or_of_the_setting(self, setting: str, source: str, name: str | None) -> None:
        form = find_format(setting, self.tokenizer(source))
        assert (form and form.name) == name


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
ASKED = {"role": "user", "content": "Hi"}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_body(json.dumps({"messages": [ASKED]} | fields).encode(), ChatCompletionRequest)


def called_with(arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def with_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "code"}]}, "tools", "must look like"),
    ({"tools": [TOOL, TOOL]}, "tools", "two functions are named 'f'"),
    ({"tools": [TOOL | {"cache": 1}]}, "tools", "'cache', which is not supported"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "letters, digits"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "not among"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "required"),
    ({"tools": [TOOL], "tool_choice": "required", "min_tokens": 2}, "min_tokens", "leave one out"),
    ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs", "only be a JSON schema"),
    ({"messages": [{"role": "tool", "content": "1"}]}, "messages.0.tool_call_id", "role 'tool'"),
    ({"messages": [{"role": "assistant"}]}, "messages.0.content", "required"),
    ({"messages": [ASKED | {"tool_calls": [{"function": {"name": "f"}}]}]}, "messages.0.tool_calls", "assistant"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        "messages.0.tool_calls",
        "no JSON object",
    ),
    *(
        ({"messages": [called_with(arguments)]}, "messages.0.tool_calls", told)
        for arguments, told in (
            ('{"a": NaN}', "NaN is not a JSON number"),
            ('{"a": "\\ud800"}', "surrogate"),
            ('{"a": %s}' % ("[" * 60 + "]" * 60), "nests more than 50"),
            ('{"a": "%s"}' % ("x" * 100_001), "more than 100000 characters"),
        )
    ),
    ({"tools": [with_parameters({"enum": [0] * 100_001})]}, "tools", "more than 100000 characters"),
    ({"chat_template_kwargs": {"a": [0] * 100_001}}, "chat_template_kwargs", "more than 100000 characters"),
]


@pytest.mark.parametrize(("fields", "param", "told"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(fields: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(APIError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert told in caught.value.message


TURNS: list[dict[str, Any]] = [
    ASKED,
    {"role": "assistant", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}}
    ]},
    {"role": "tool", "tool_call_id": "call_1", "content": "42"},
]  # fmt: skip


def test_a_turn_renders_as_transformers_renders_it(tmp_path: Path) -> None:
    write_checkpoint(MODELS["granite"], tmp_path)
    request = chat(messages=TURNS, tools=[TOOL])
    ours = Tokenizer.load(tmp_path).render_chat([m.for_template() for m in request.messages], tools=request.shown_tools)
    turns = json.loads(json.dumps(TURNS))
    turns[1] |= {"content": ""}
    turns[1]["tool_calls"][0]["function"]["arguments"] = {"a": "ü"}
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        turns, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert ours == theirs
    assert '<tool_call>{"name": "f", "arguments": {"a": "ü"}}</tool_call>' in ours
    assert "tools" in CHAT_TEMPLATE


def test_who_may_not_call_is_not_told_of_tools() -> None:
    assert chat(tools=[TOOL], tool_choice="none").shown_tools == []
    assert chat(tools=[TOOL]).shown_tools == [TOOL]


@pytest.mark.parametrize("number", ["1e999", "9" * 500])
def test_numbers_that_json_cannot_hold_are_refused(number: str) -> None:
    for field in ('"chat_template_kwargs": {"a": %s}', '"structured_outputs": {"json": {"const": %s}}'):
        with pytest.raises(APIError, match="number that is too large") as caught:
            parse_body(
                b'{"messages": [{"role": "user", "content": "Hi"}], %s}' % (field % number).encode(),
                ChatCompletionRequest,
            )
        assert caught.value.status == 400


def test_a_response_ends_a_call_before_the_text_behind_it() -> None:
    """A reader that is behind gets both at once."""
    request = parse_body(b'{"input": "Hi"}', ResponsesRequest)
    responder, calls = ResponsesResponder(request, "m", "r"), ToolCallParser(HERMES)
    deltas = []
    for text in ('<tool_call>{"name": "f", "arguments": {"a":', " 1}}</tool_call>", "Done."):
        content, new = calls.feed(text)
        deltas.append(ChoiceDelta(0, content, tool_calls=new))
    events = responder.events(deltas[0]) + responder.events(merge(deltas[1:]))
    told = [json.loads(line[6:]) for line in events.decode().splitlines() if line.startswith("data: ")]
    done = next(event for event in told if event["type"] == "response.function_call_arguments.done")
    assert done["arguments"] == '{"a": 1}'
    assert [item.text for item in responder._items] == ['{"a": 1}', "Done."]


def test_what_responses_do_not_know_is_not_ignored() -> None:
    for fields, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"verbosity": "high"}}, "text"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
    ):
        with pytest.raises(APIError) as caught:
            parse_body(json.dumps({"input": "Hi"} | fields).encode(), ResponsesRequest).as_chat()
        assert (caught.value.status, caught.value.param) == (400, param)
