"""Fields with a form of their own, broken at any depth: nothing but refusals comes of it."""

import json
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.ingress.openai.errors import APIError
from deploy.ingress.openai.parsing import parse_body
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from deploy.ingress.openai.response_requests import ResponsesRequest

ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from(["", "a", "function", "{}", 0.5, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "name"]), inner, max_size=2),
    max_leaves=4,
)
FUNCTION: Any = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
CALLED: Any = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TAG: Any = {"begin": "<a>", "schema": {"type": "object"}, "end": "</a>"}
FORMS: list[tuple[Any, dict[str, Any]]] = [
    (
        ChatCompletionRequest,
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "a", "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "c", "content": "1"},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        },
    ),
    (
        CompletionRequest,
        {"prompt": "a", "structured_outputs": {"structural_tag": {"structures": [TAG], "triggers": ["<"]}}},
    ),
    (CompletionRequest, {"prompt": "a", "structured_outputs": {"choice": ["a"]}}),
    (CompletionRequest, {"prompt_embeds": ["AAAAAAAAAAA="]}),
    (EmbeddingRequest, {"input": ["a"], "dimensions": 3}),
    (
        ResponsesRequest,
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "1"},
            ],
            "tools": [{"type": "function"} | FUNCTION],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}},
        },
    ),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_nothing_but_refusals_comes_of_odd_values(data: st.DataObject) -> None:
    """At any depth of the fields that have a form of their own."""
    model, body = data.draw(st.sampled_from(FORMS))
    body, place = deepcopy(body), data.draw(st.sampled_from(sorted(places(body), key=str)))
    holder = body
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = data.draw(ODD)
    with suppress(APIError):
        request = parse_body(json.dumps(body).encode(), model)
        if isinstance(request, ResponsesRequest):
            request.as_chat()
