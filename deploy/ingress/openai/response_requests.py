"""POST /v1/responses, the part that needs no store: its body, and the chat completion that answers it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator

from deploy.ingress.openai.errors import APIError
from deploy.ingress.openai.neutral import RESPONSES_NEUTRAL
from deploy.ingress.openai.parsing import check_content
from deploy.ingress.openai.requests import ChatCompletionRequest
from deploy.ingress.openai.strict import Strict

MAX_ITEMS = 2000
NAMES = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text"}
# What items and their parts may say. Of these, ids, statuses and the like tell nothing that a prompt could show.
ITEM_KEYS = {
    "message": {"type", "role", "content", "id", "status"},
    "function_call": {"type", "call_id", "name", "arguments", "id", "status"},
    "function_call_output": {"type", "call_id", "output", "id", "status"},
}
PART_KEYS = {"type", "text", "annotations", "logprobs"}
TEXT_PARTS = ("input_text", "output_text", "text")


def as_input(value: Any) -> list[dict[str, Any]]:
    """Items of a conversation as messages of a chat completion."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not 0 < len(value) <= MAX_ITEMS:
        raise ValueError(f"must be a text, or a list of 1 to {MAX_ITEMS} items")
    messages: list[dict[str, Any]] = []
    for item in value:
        message = _as_message(item)
        before = messages[-1] if messages else {}
        if "tool_calls" in message and before.get("role") == "assistant":  # one answer, several items
            before["tool_calls"] = [*before.get("tool_calls", []), *message["tool_calls"]]
        else:
            messages.append(message)
    return messages


def _as_message(item: Any) -> dict[str, Any]:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if isinstance(kind, str) and kind in ITEM_KEYS:
        _check_keys(item, ITEM_KEYS[kind], f"an item of type {kind}")
    if kind == "message" and "role" in item:
        return {"role": item["role"], "content": _content(item.get("content"))}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": function}]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": _content(item.get("output"))}
    raise ValueError(
        f"an item of type {kind!r:.60} is not supported: use message (with a role), function_call, function_call_output"
    )


def _check_keys(value: dict[str, Any], known: set[str], what: str) -> None:
    """null counts as absent."""
    unknown = min((str(key) for key, item in value.items() if item is not None and key not in known), default=None)
    if unknown is not None:
        raise ValueError(f"{what} has the key {unknown[:60]!r}, which is not supported")


def _content(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
            kind = part.get("type") if isinstance(part, dict) else None
            raise ValueError(f"a content part of type {kind!r:.60} is not supported: only {', '.join(TEXT_PARTS)}")
        _check_keys(part, PART_KEYS, "a content part")
    return [{"type": "text", "text": part.get("text")} for part in value]


def as_response_tools(value: Any) -> list[dict[str, Any]]:
    """Tools with their fields beside `type`; in a chat completion they stand in `function`."""
    if not isinstance(value, list):
        raise ValueError("must be a list of tools")
    for tool in value:
        if not isinstance(tool, dict) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, dict) else None
            raise ValueError(f"a tool of type {kind!r:.60} is not supported: only function")
    return value


def as_metadata(value: dict[str, str]) -> dict[str, str]:
    """OpenAI's limits."""
    if len(value) > 16 or any(len(key) > 64 or len(text) > 512 for key, text in value.items()):
        raise ValueError("must have at most 16 keys of up to 64 characters, and texts of up to 512")
    return value


@contextmanager
def renamed() -> Iterator[None]:
    """Errors of the chat completion, as those of the request that it answers."""
    try:
        yield
    except APIError as error:
        if error.param is not None:
            first, dot, rest = error.param.partition(".")
            error.param = NAMES.get(first, first) + (
                "" if first == "messages" else dot + rest
            )  # items are not messages
        raise


class ResponsesRequest(Strict):
    NEUTRAL = RESPONSES_NEUTRAL

    model: str | None = None
    input: Annotated[list[dict[str, Any]], PlainValidator(as_input, json_schema_input_type=str | list[dict[str, Any]])]
    instructions: str | None = None
    tools: Annotated[
        list[dict[str, Any]], PlainValidator(as_response_tools, json_schema_input_type=list[dict[str, Any]])
    ] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: dict[str, Any] = Field(default_factory=dict)
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    stream: bool = False
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str], AfterValidator(as_metadata)] = Field(default_factory=dict)
    user: str | None = None
    seed: int | None = None

    def as_chat(self) -> ChatCompletionRequest:
        """Raises APIError (400) that names fields of this request."""
        asked: dict[str, Any] = {
            "messages": ([{"role": "system", "content": self.instructions}] if self.instructions else []) + self.input,
            "max_completion_tokens": self.max_output_tokens,
            "include_reasoning": False,
            "tools": [_chat_tool(tool) for tool in self.tools],
            "response_format": self._response_format(),
        }
        if self.tools or self.tool_choice not in ("auto", "none"):
            asked |= {"tool_choice": _chat_choice(self.tool_choice), "parallel_tool_calls": self.parallel_tool_calls}
        same = ("model", "temperature", "top_p", "seed", "user", "stream")
        with renamed():
            return check_content(asked | {name: getattr(self, name) for name in same}, ChatCompletionRequest, False)

    def _response_format(self) -> Any:
        """`text.format` as `response_format` of a chat completion."""
        form = self.text.get("format")
        if unknown := sorted({*self.text} - {"format", "verbosity"}):
            message = f"text.{unknown[0][:60]} is not supported: only format"
            raise APIError(400, message, param="text", code="unsupported_parameter")
        if self.text.get("verbosity") not in (None, "medium"):
            raise APIError(400, "text.verbosity is not supported", param="text", code="unsupported_parameter")
        if isinstance(form, dict) and form.get("type") == "json_schema":
            return {"type": "json_schema", "json_schema": {key: form[key] for key in form if key != "type"}}
        return form


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}


def _chat_choice(choice: str | dict[str, Any]) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice
