"""Answers of POST /v1/responses: whole, and as the events of a stream. On the same deltas as chat completions."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.ingress.openai.answer_json import dump
from deploy.ingress.openai.choices import ChoiceDelta, merge
from deploy.ingress.openai.errors import APIError
from deploy.ingress.openai.response_requests import ResponsesRequest
from deploy.ingress.openai.responses import Usage
from deploy.ingress.text.tool_calls import ToolCallDelta

Json = dict[str, Any]

LONG = 1_000_000


@dataclass(slots=True)
class _Item:
    """One item of the answer, as far as it has come."""

    id: str
    call: ToolCallDelta | None = None
    text: str = ""

    def part(self) -> Json:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def as_json(self, status: str) -> Json:
        if self.call is None:
            shown: Json = {"type": "message", "role": "assistant", "content": [self.part()] if self.text else []}
        else:
            named = {"call_id": self.call.id, "name": self.call.name}
            shown = {"type": "function_call", **named, "arguments": self.text}
        return {"id": self.id, "status": status} | shown


@dataclass(slots=True)
class ResponsesResponder:
    request: ResponsesRequest
    model: str
    request_id: str
    created: int = field(default_factory=lambda: int(time.time()))
    _items: list[_Item] = field(default_factory=list)
    _num_events: int = 0
    _reason: str | None = None

    @property
    def id(self) -> str:
        return f"resp_{self.request_id}"

    def response(self, choices: Sequence[Sequence[ChoiceDelta]], usage: Usage) -> Json:
        """The whole answer; `choices` holds the deltas of the only choice."""
        delta = merge(choices[0])
        for _ in self._take(delta):
            pass
        return self._whole(usage)

    @property
    def echo_size(self) -> int:
        """Of the request and of what has been told, in characters. Tools and formats count as long: they may be."""
        request, told = self.request, sum(len(item.text) for item in self._items)
        return told + len(request.instructions or "") + (LONG if request.tools or request.text else 0)

    def opening(self) -> bytes:
        return b"".join(
            self._event(f"response.{kind}", response=self._whole(None)) for kind in ("created", "in_progress")
        )

    def events(self, delta: ChoiceDelta) -> bytes:
        return b"".join(self._take(delta))

    def closing(self, usage: Usage) -> bytes:
        kind = "response.incomplete" if self._is_incomplete else "response.completed"
        return self._event(kind, response=self._whole(usage))

    def failure(self, error: APIError) -> bytes:
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _event(self, kind: str, **content: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._num_events} | content
        self._num_events += 1
        return f"event: {kind}\ndata: ".encode() + dump(event) + b"\n\n"

    def _take(self, delta: ChoiceDelta) -> Iterator[bytes]:
        """Events of what is new: text goes on with the last item, if that is a text; each call is an item. The rest of
        a call that has begun comes before text, and text before new calls.
        """
        going_on = [call for call in delta.tool_calls if call.id is None]
        for call in going_on if self._items and self._items[-1].call else ():
            yield from self._add(call.arguments, "response.function_call_arguments.delta")
        if delta.text:
            if not self._items or self._items[-1].call:
                yield from self._open(_Item(f"msg_{self.request_id}_{len(self._items)}"))
            yield from self._add(delta.text, "response.output_text.delta")
        for call in delta.tool_calls:
            if call.id is None:
                continue
            yield from self._open(_Item(f"fc_{self.request_id}_{len(self._items)}", call))
            if call.arguments:
                yield from self._add(call.arguments, "response.function_call_arguments.delta")
        if delta.finish_reason:
            self._reason = delta.finish_reason
            yield from self._close()

    def _open(self, item: _Item) -> Iterator[bytes]:
        yield from self._close()
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=self._index, item=item.as_json("in_progress"))
        if item.call is None:
            yield self._event("response.content_part.added", **self._place(), part=item.part())

    def _add(self, text: str, kind: str) -> Iterator[bytes]:
        self._items[-1].text += text
        extra: Json = {"logprobs": []} if self._items[-1].call is None else {}
        yield self._event(kind, **self._place(), delta=text, **extra)

    def _close(self) -> Iterator[bytes]:
        if not self._items:
            return
        item = self._items[-1]
        if item.call is None:
            yield self._event("response.output_text.done", **self._place(), text=item.text, logprobs=[])
            yield self._event("response.content_part.done", **self._place(), part=item.part())
        else:
            named = {"name": item.call.name, "arguments": item.text}
            yield self._event("response.function_call_arguments.done", **self._place(), **named)
        yield self._event("response.output_item.done", output_index=self._index, item=item.as_json(self._status))

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    def _place(self) -> Json:
        place: Json = {"item_id": self._items[-1].id, "output_index": self._index}
        return place | ({"content_index": 0} if self._items[-1].call is None else {})

    @property
    def _is_incomplete(self) -> bool:
        return self._reason == "length"

    @property
    def _status(self) -> str:
        return "incomplete" if self._is_incomplete else "completed"

    def _whole(self, usage: Usage | None) -> Json:
        """`usage` is None before the end."""
        request, is_over = self.request, usage is not None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self._status if is_over else "in_progress",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_over and self._is_incomplete else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata,
            "model": self.model,
            "output": [item.as_json(self._status) for item in self._items] if is_over else [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": request.text.get("format") or {"type": "text"}},
            "tool_choice": request.tool_choice,
            "tools": request.tools,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": request.user,
        }


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
