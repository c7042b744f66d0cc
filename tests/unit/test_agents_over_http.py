"""What the official `openai` client makes of answers with calls, of responses and embeddings. A front without a model
says what it is told to: tokens of a text, one after the other.
"""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI

from benchmarks.byte_tokenizer import CHAT_TEMPLATE
from cluster.messages.requests import GenerationRequest, RequestOutput
from deploy.ingress.fronts import client as front_client
from deploy.ingress.openai.response_events import ResponsesResponder
from tests.unit.fake_front import FakeFront, fronts_state
from tests.unit.fake_supervisor import Open

CALLS = (
    '<tool_call>\n{"name": "f", "arguments": {"a": "ü"}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n'
    "</tool_call>"
)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "g"}},
]
FLAT_TOOLS: Any = [{"type": "function"} | tool["function"] for tool in TOOLS]
ASKED: Any = [{"role": "user", "content": "Hi"}]


class ScriptedFront(FakeFront):
    """Answers each request with `text`, or with `embedding`."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.reason: Any = "stop"
        self.encode: Callable[[str], list[int]] = lambda text: []
        self.after["submit"] = self.answer

    def answer(self, request: GenerationRequest) -> None:
        if mailbox := self.mailboxes.get(request.lease):
            embedding = np.arange(1, 129, dtype=np.float32).tobytes() if request.params.pooling else None
            mailbox.put([RequestOutput(request.request_id, (token,)) for token in self.encode(self.text)])
            end = (0,) if self.reason == "stop" and not embedding else ()
            mailbox.put([RequestOutput(request.request_id, end, finish_reason=self.reason, embedding=embedding)])


Say = Callable[..., Awaitable[tuple[AsyncOpenAI, ScriptedFront]]]


@pytest.fixture
async def say(open_api: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    async def start(text: str = "", reason: str = "stop", template: str = CHAT_TEMPLATE) -> Any:
        path = tmp_path / "template.jinja"
        path.write_text(template)
        front = ScriptedFront()
        monkeypatch.setattr(front_client.ray, "get_actor", lambda *_: front)
        http = await open_api(chat_template=str(path))
        service: Any = http.service  # type: ignore[attr-defined]
        service._follow.cancel()
        service.state = fronts_state(a=front)
        service.client.update(service.state)
        front.text, front.reason, front.encode = text, reason, service.tokenizer.encode
        return AsyncOpenAI(api_key="k", base_url="http://127.0.0.1:8000/v1", http_client=http, max_retries=0), front

    return start


async def test_a_grammar_that_fails_on_its_way_is_the_request_s_fault(say: Say) -> None:
    client, front = await say()
    front.after["submit"] = lambda request: front.say(request, end="error", error="too many states", is_refusal=True)
    asked: Any = {"model": "demo", "messages": ASKED, "extra_body": {"structured_outputs": {"regex": "a+"}}}
    with pytest.raises(openai.BadRequestError, match="form that was asked for: too many states"):
        await client.chat.completions.create(**asked)
    with pytest.raises(openai.APIError, match="too many states") as told:
        async for _ in await client.chat.completions.create(**asked, stream=True):
            pass
    assert told.value.type == "invalid_request_error"


class TestTools:
    async def test_whole(self, say: Say) -> None:
        client, front = await say(f"Let me look.\n{CALLS}")
        answer = await client.chat.completions.create(model="demo", messages=ASKED, tools=TOOLS)
        [choice] = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.\n")
        calls: Any = choice.message.tool_calls
        assert [(call.function.name, call.function.arguments) for call in calls] == [("f", '{"a": "ü"}'), ("g", "{}")]
        assert front.taken[0].params.grammar is None, "nothing is strict"

    async def test_streamed(self, say: Say) -> None:
        client, _ = await say(f"Let me look.\n{CALLS}")
        async with client.chat.completions.stream(model="demo", messages=ASKED, tools=TOOLS) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_completion()
        [choice] = final.choices
        calls: Any = choice.message.tool_calls
        assert [(call.function.name, call.function.arguments) for call in calls] == [("f", '{"a": "ü"}'), ("g", "{}")]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.\n")
        done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
        assert [event.name for event in done] == ["f", "g"]

    @pytest.mark.parametrize(
        ("text", "reason", "shown"), [("Hello.", "stop", "stop"), (CALLS[:50], "length", "length")]
    )
    async def test_other_ends(self, say: Say, text: str, reason: str, shown: str) -> None:
        client, _ = await say(text, reason)
        answer = await client.chat.completions.create(model="demo", messages=ASKED, tools=TOOLS)
        assert answer.choices[0].finish_reason == shown

    async def test_who_may_not_call_does_not(self, say: Say) -> None:
        client, _ = await say(CALLS)
        answer = await client.chat.completions.create(model="demo", messages=ASKED, tools=TOOLS, tool_choice="none")
        assert answer.choices[0].message.content == CALLS
        one = await client.chat.completions.create(model="demo", messages=ASKED, tools=TOOLS, parallel_tool_calls=False)
        assert len(one.choices[0].message.tool_calls or []) == 1

    @pytest.mark.parametrize(
        ("options", "is_constrained"),
        [
            ({}, False), ({"tool_choice": "required"}, True), ({"tool_choice": "none"}, False),
            ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, True),
            ({"response_format": {"type": "json_object"}}, True),
        ],
    )  # fmt: skip
    async def test_grammars(self, say: Say, options: dict[str, Any], is_constrained: bool) -> None:
        client, front = await say("Hello.")
        await client.chat.completions.create(**{"model": "demo", "messages": ASKED, "tools": TOOLS} | options)
        assert (front.taken[0].params.grammar is not None) == is_constrained

    async def test_a_model_that_knows_no_tools(self, say: Say) -> None:
        client, _ = await say("Hello.", template="{{ messages[0].content }}")
        with pytest.raises(openai.BadRequestError, match="tool_call_parser") as caught:
            await client.chat.completions.create(model="demo", messages=ASKED, tools=TOOLS)
        assert caught.value.param == "tools"


class TestResponses:
    @pytest.mark.parametrize("reason", ["stop", "length"])
    async def test_text(self, say: Say, reason: str) -> None:
        client, _ = await say("Hello there.", reason)
        options: Any = {"model": "demo", "input": "Hi", "instructions": "Be short."}
        whole = await client.responses.create(**options)
        assert whole.output_text == "Hello there."
        assert whole.status == {"stop": "completed", "length": "incomplete"}[reason]
        async with client.responses.stream(**options) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response() if reason == "stop" else None
        assert final is None or (final.output_text, final.usage) == (whole.output_text, whole.usage)
        assert [event.sequence_number for event in events if event.type.startswith("response.")]
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Hello there."
        assert events[0].type == "response.created"
        assert events[-1].type == f"response.{whole.status}"

    async def test_calls_and_their_results(self, say: Say) -> None:
        client, front = await say(f"I see.{CALLS}")
        options: Any = {"model": "demo", "tools": FLAT_TOOLS}
        items: list[Any] = [{"role": "user", "content": "Hi"}]
        first = await client.responses.create(input=items, **options)
        text, f, g = first.output
        assert (text.type, f.type, g.type) == ("message", "function_call", "function_call")
        assert (f.name, json.loads(f.arguments), g.arguments) == ("f", {"a": "ü"}, "{}")  # type: ignore[union-attr]
        async with client.responses.stream(input=items, **options) as stream:
            streamed = (await stream.get_final_response()).output
        assert [item.type for item in streamed] == [item.type for item in first.output]
        front.text = "Done."
        results = [{"type": "function_call_output", "call_id": c.call_id, "output": "1"} for c in (f, g)]  # type: ignore[union-attr]
        last = await client.responses.create(input=[*items, *first.output, *results], **options)
        assert last.output_text == "Done."

    async def test_thoughts_are_counted(self, say: Say) -> None:
        thought = "<think>Who asks?</think>"
        client, front = await say(f"{thought}Hello.", template=f"{CHAT_TEMPLATE}{{# </think> #}}")
        whole = await client.responses.create(model="demo", input="Hi")
        assert whole.output_text == "Hello."
        assert whole.usage is not None
        counted = whole.usage.output_tokens_details.reasoning_tokens
        assert counted == len(front.encode(thought)) < whole.usage.output_tokens
        front.text = "Hello."
        whole = await client.responses.create(model="demo", input="Hi")
        assert whole.usage is not None
        assert whole.usage.output_tokens_details.reasoning_tokens == 0

    async def test_what_repeats_tools_holds_up_nobody(self, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
        written = []
        real = ResponsesResponder._whole

        def whole(*args: Any) -> Any:
            written.append(threading.current_thread() is threading.main_thread())
            return real(*args)

        monkeypatch.setattr(ResponsesResponder, "_whole", whole)
        client, _ = await say("Hello.")
        for stream in (False, True):
            answer: Any = await client.responses.create(model="demo", input="Hi", tools=FLAT_TOOLS, stream=stream)
            if stream:
                assert [event.type async for event in answer][-1] == "response.completed"
        assert written == [False] * 4

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"store": True}, "store"), ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"background": True}, "background"), ({"include": ["reasoning.encrypted_content"]}, "include"),
            ({"tools": [{"type": "web_search"}]}, "tools"), ({"input": [{"type": "item_reference"}]}, "input"),
            ({"input": [{"role": "robot", "content": "Hi"}]}, "input"), ({"text": {"format": {"type": "xml"}}}, "text"),
            ({"max_output_tokens": 10**6}, "max_output_tokens"), ({"input": "Hi " * 4000}, "input"),
            ({"input": [{"type": "function_call_output", "output": "1"}]}, "input"),
            ({"input": [{"role": "user", "content": "Hi", "name": "me"}]}, "input"),
            ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi", "x": 1}]}]}, "input"),
            ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "", "x": 1}]}, "input"),
        ],
    )  # fmt: skip
    async def test_what_is_refused_is_named(self, say: Say, fields: dict[str, Any], param: str) -> None:
        client, _ = await say("Hello.")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(**{"model": "demo", "input": "Hi"} | fields)
        assert caught.value.param == param


class TestEmbeddings:
    async def test_are_unit_vectors_in_both_encodings(self, say: Say) -> None:
        client, front = await say()
        expected = np.arange(1, 129) / np.linalg.norm(np.arange(1, 129))
        texts = ["Hi"] * 70
        for encoding in ("float", "base64", None):
            options: Any = {} if encoding is None else {"encoding_format": encoding}
            answer = await client.embeddings.create(model="demo", input=texts, **options)
            assert [item.index for item in answer.data] == list(range(70))
            raw: Any = answer.data[69].embedding
            if encoding == "base64":
                raw = np.frombuffer(__import__("base64").b64decode(raw), "<f4")
            assert np.abs(np.asarray(raw) - expected).max() < 1e-6
        assert {request.params.max_tokens for request in front.taken} == {0}

    async def test_a_front_that_fails_ends_all(self, say: Say) -> None:
        client, front = await say(reason="error")
        front.after.clear()
        asking = asyncio.create_task(client.embeddings.create(model="demo", input=["Hi"] * 5))
        while len(front.taken) < 5:
            await asyncio.sleep(0.01)
        request = front.taken[2]
        mailbox = front.mailboxes.get(request.lease)
        assert mailbox is not None
        mailbox.put([RequestOutput(request.request_id, finish_reason="error", error="broken")])
        with pytest.raises(openai.InternalServerError):
            await asyncio.wait_for(asking, 5)
        while len(front.aborted) < 4:
            await asyncio.sleep(0.01)
