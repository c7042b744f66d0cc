"""Tools through the official `openai` client. The model was never trained: a call is there because it has to be."""

import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessage

from tests.e2e.servers import MODEL

GROUPS = {"type": "object", "properties": {"group": {"enum": [0, 1]}}, "required": ["group"]}
SCALE = {
    "type": "object",
    "properties": {"to": {"type": "integer", "minimum": 1, "maximum": 4}, "why": {"type": "string", "maxLength": 3}},
    "required": ["to", "why"],
}


def tool(name: str, parameters: dict[str, Any], strict: bool = False) -> Any:
    closed = parameters | {"additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": closed, "strict": strict}}


TOOLS = [tool("get_replicas", GROUPS), tool("scale", SCALE)]
ASKED: Any = {"role": "user", "content": "How many replicas are there?"}


def ask(client: OpenAI, **options: Any) -> Any:
    defaults = {"model": MODEL, "messages": [ASKED], "tools": TOOLS, "seed": 1, "max_tokens": 500}
    return client.chat.completions.create(**defaults | options)


def check_calls(message: ChatCompletionMessage) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for call in message.tool_calls or []:
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_replicas":
            assert arguments in ({"group": 0}, {"group": 1})
        else:
            assert (call.function.name, {*arguments}) == ("scale", {"to", "why"})
            assert arguments["to"] in range(1, 5)
        found.append((call.function.name, arguments))
    return found


class TestRequired:
    def test_a_call_is_there_and_fits(self, client: OpenAI) -> None:
        [choice] = ask(client, tool_choice="required", parallel_tool_calls=False).choices
        assert len(check_calls(choice.message)) == 1
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)

    def test_the_function_that_was_named(self, client: OpenAI) -> None:
        for name in ("get_replicas", "scale"):
            choice = ask(client, tool_choice={"type": "function", "function": {"name": name}}).choices[0]
            assert [called for called, _ in check_calls(choice.message)] == [name]

    def test_streamed_calls_are_the_whole_calls(self, client: OpenAI) -> None:
        options = {"tool_choice": "required", "n": 2}
        whole = ask(client, **options)
        calls: dict[tuple[int, int], dict[str, Any]] = {}
        reasons = {}
        with ask(client, stream=True, **options) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
                    for delta in choice.delta.tool_calls or []:
                        key = choice.index, delta.index
                        if key not in calls:
                            assert delta.id
                            assert delta.type == "function"
                            calls[key] = {"name": delta.function.name, "arguments": ""}
                        else:
                            assert (delta.id, delta.function.name) == (None, None)
                        calls[key]["arguments"] += delta.function.arguments
        expected = {
            (choice.index, number): {"name": call.function.name, "arguments": call.function.arguments}
            for choice in whole.choices
            for number, call in enumerate(choice.message.tool_calls or [])
        }
        assert calls == expected
        assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}

    def test_too_few_tokens_end_with_length(self, client: OpenAI) -> None:
        choice = ask(client, tool_choice="required", max_tokens=30).choices[0]
        assert choice.finish_reason == "length"


class TestAuto:
    def test_text_is_content(self, client: OpenAI) -> None:
        choice = ask(client, max_tokens=20, temperature=0).choices[0]
        assert choice.message.content
        assert (choice.message.tool_calls, choice.finish_reason) == (None, "length")

    def test_an_answer_of_a_schema_or_a_call(self, client: OpenAI) -> None:
        properties = {"ok": {"type": "boolean"}}
        schema = {"type": "object", "properties": properties, "required": ["ok"], "additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        tools = [tool("get_replicas", GROUPS, strict=True), tool("scale", SCALE, strict=True)]
        found = [ask(client, tools=tools, response_format=form, seed=seed).choices[0] for seed in range(4)]
        for choice in found:
            if choice.finish_reason == "tool_calls":
                assert check_calls(choice.message)
            elif choice.finish_reason == "stop":
                assert json.loads(choice.message.content) in ({"ok": True}, {"ok": False})
        assert {choice.finish_reason for choice in found} != {"length"}


def test_an_agent_of_three_turns(client: OpenAI) -> None:
    """What the client library sends back is taken as it is."""
    messages: list[Any] = [ASKED]
    lengths = []
    for _ in range(2):
        answer = ask(client, messages=messages, tool_choice="required", parallel_tool_calls=False)
        message = answer.choices[0].message
        lengths.append(answer.usage.prompt_tokens)
        messages.append(message)
        [call] = message.tool_calls
        messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps({"replicas": 2})})
    last = ask(client, messages=messages, tool_choice="none", max_tokens=20)
    assert last.choices[0].message.content
    assert not last.choices[0].message.tool_calls
    assert lengths[0] < lengths[1]


def test_a_schema_that_cannot_be_promised_is_named(client: OpenAI) -> None:
    tools = [tool("f", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}})]
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        ask(client, tools=tools, tool_choice="required")
    assert caught.value.param == "tools"
    assert ask(client, tools=tools, max_tokens=5).choices, "who is not held to it need not understand it"
