"""The Responses API through the official `openai` client: the part that needs no store."""

import json
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.e2e.servers import MODEL

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
TOOL: Any = {
    "type": "function",
    "name": "get_replicas",
    "parameters": {
        "type": "object",
        "properties": {"group": {"enum": [0, 1]}},
        "required": ["group"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Verdict(BaseModel):
    state: Literal["good", "bad"]


def text_of_chat(client: OpenAI, messages: Any) -> str | None:
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(messages=messages, **options).choices[0].message.content


class TestText:
    def test_is_that_of_a_chat_completion(self, client: OpenAI) -> None:
        answer = client.responses.create(input="Hi", instructions="Answer.", **GREEDY)
        messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Hi"}]
        assert answer.output_text == text_of_chat(client, messages)
        assert (answer.object, answer.store if "store" in answer.model_fields_set else False) == ("response", False)
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens

    def test_of_a_conversation(self, client: OpenAI) -> None:
        first = client.responses.create(input="Hi", **GREEDY)
        items: list[Any] = [{"role": "user", "content": "Hi"}, *first.output]
        items.append({"role": "user", "content": [{"type": "input_text", "text": "More"}]})
        second = client.responses.create(input=items, **GREEDY)
        said = [("user", "Hi"), ("assistant", first.output_text), ("user", "More")]
        assert second.output_text == text_of_chat(client, [{"role": role, "content": text} for role, text in said])

    def test_streamed(self, client: OpenAI) -> None:
        whole = client.responses.create(input="Hi", **GREEDY)
        with client.responses.stream(input="Hi", **GREEDY) as stream:
            events: list[Any] = list(stream)
        final = events[-1].response
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-1] == ("response.completed" if whole.status == "completed" else "response.incomplete")
        assert (
            "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
        )
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert (final.output_text, final.status) == (whole.output_text, whole.status)
        assert final.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]

    def test_too_few_tokens_are_incomplete(self, client: OpenAI) -> None:
        answer = client.responses.create(**GREEDY | {"max_output_tokens": 2}, input="Hi")
        assert answer.status == "incomplete"
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"

    def test_pydantic_models(self, client: OpenAI) -> None:
        answer = client.responses.parse(model=MODEL, input="Hi", text_format=Verdict, max_output_tokens=300)
        assert isinstance(answer.output_parsed, Verdict)


class TestTools:
    OPTIONS: Any = {"model": MODEL, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}  # noqa: RUF012

    def test_an_agent_of_two_turns(self, client: OpenAI) -> None:
        items: list[Any] = [{"role": "user", "content": "How many?"}]
        first = client.responses.create(input=items, max_output_tokens=300, **self.OPTIONS)
        [call] = first.output
        assert call.type == "function_call"
        assert json.loads(call.arguments) in ({"group": 0}, {"group": 1})
        items += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "2"}]
        second = client.responses.create(**self.OPTIONS | {"tool_choice": "none"}, input=items, max_output_tokens=9)
        assert second.output_text

    def test_streamed_calls(self, client: OpenAI) -> None:
        with client.responses.stream(input="How many?", max_output_tokens=300, **self.OPTIONS) as stream:
            events = list(stream)
            [call] = stream.get_final_response().output
        pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(pieces) == call.arguments  # type: ignore[union-attr]
        assert json.loads("".join(pieces)) in ({"group": 0}, {"group": 1})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"), ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"), ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools"), ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"role": "robot", "content": "Hi"}]}, "input"),
        ({"max_output_tokens": 10**7}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text"), ({"model": "other"}, "model"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(**{"model": MODEL, "input": "Hi"} | fields)
    assert (caught.value.status_code in (400, 404), caught.value.param) == (True, param)
