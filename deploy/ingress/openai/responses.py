"""Answers of both endpoints for dump(): whole objects and stream chunks. Knows no transport but the SSE line."""

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from deploy.ingress.openai import logprobs
from deploy.ingress.openai.answer_json import Rows, dump
from deploy.ingress.openai.choices import Choice, ChoiceDelta, merge
from deploy.ingress.openai.errors import APIError
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest
from deploy.ingress.text.tokens import Tokenizer
from deploy.ingress.text.tool_calls import ToolCallDelta

Json = dict[str, Any]

SSE_DONE = b"data: [DONE]\n\n"


def sse(event: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(event) + b"\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole request. A prompt counts once, however many choices continue it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @classmethod
    def of(cls, choices: Sequence[Choice], n: int) -> "Usage":
        """`choices` in the order of their index: n for each prompt."""
        return cls(
            sum(len(choice.prompt_token_ids) for choice in choices[::n]),
            sum(choice.num_tokens for choice in choices),
            sum(choice.num_cached_tokens for choice in choices[::n]),
            sum(choice.num_reasoning_tokens for choice in choices),
        )

    def as_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class _Responder:
    """What the answers to both endpoints have in common."""

    request: CompletionRequest | ChatCompletionRequest
    tokenizer: Tokenizer
    model: str
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    kind: ClassVar[str]  # of stream chunks
    id_prefix: ClassVar[str]

    @property
    def id(self) -> str:
        return f"{self.id_prefix}-{self.request_id}"

    @property
    def echo_size(self) -> int:
        """How much beginning and end of a stream repeat, in characters."""
        return 0

    def opening(self) -> bytes:
        """What a stream begins with."""
        return b""

    def events(self, delta: ChoiceDelta) -> bytes:
        """What a stream says of a delta."""
        return sse(self.chunk(delta))

    def closing(self, usage: Usage) -> bytes:
        return (sse(self.usage_chunk(usage)) if self.request.include_usage else b"") + SSE_DONE

    def failure(self, error: APIError) -> bytes:
        """What a stream that has begun ends with."""
        return sse(error.body())

    def chunk(self, delta: ChoiceDelta) -> Json:
        """One chunk of a stream."""
        raise NotImplementedError

    def usage_chunk(self, usage: Usage) -> Json:
        """The last chunk, when stream_options.include_usage asks for it."""
        return self._head(self.kind, []) | {"usage": usage.as_json()}

    def _head(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _chunk(self, choice: Json) -> Json:
        """OpenAI: with include_usage every chunk but the last has usage null."""
        return self._head(self.kind, [choice]) | ({"usage": None} if self.request.include_usage else {})

    def _extras(self, delta: ChoiceDelta) -> Json:
        """Fields of a choice that are there only if asked for."""
        extras: Json = {}
        if self.request.return_token_ids:
            extras["token_ids"] = Rows(delta.token_ids, int)
        if self.request.return_routed_experts and delta.routed_experts is not None:
            extras["routed_experts"] = logprobs.routed_experts(delta.routed_experts)
        return extras

    def _prompt_extras(self, delta: ChoiceDelta) -> Json:
        """Fields about the prompt, in the first delta only."""
        request, extras = self.request, Json()
        if request.return_token_ids and delta.is_first:
            extras["prompt_token_ids"] = Rows(delta.prompt_token_ids, int)
        if request.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            scores = logprobs.prompt_logprobs(delta.prompt_logprobs, request.prompt_logprobs, self.tokenizer)
            extras["prompt_logprobs"] = scores
        return extras


class CompletionResponder(_Responder):
    """Answers one /v1/completions request."""

    __slots__ = ()
    kind, id_prefix = "text_completion", "cmpl"

    def response(self, choices: Iterable[Sequence[ChoiceDelta]], usage: Usage) -> Json:
        """The whole answer; `choices` holds the deltas of each choice."""
        return self._head(self.kind, [self._choice(merge(deltas)) for deltas in choices]) | {"usage": usage.as_json()}

    def chunk(self, delta: ChoiceDelta) -> Json:
        return self._chunk(self._choice(delta))

    def _choice(self, delta: ChoiceDelta) -> Json:
        num_top = self.request.num_logprobs
        choice: Json = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": None if num_top is None else logprobs.completion_logprobs(delta.rows, num_top, self.tokenizer),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return choice | self._extras(delta) | self._prompt_extras(delta)


class ChatResponder(_Responder):
    """Answers one /v1/chat/completions request. Fields about the prompt stand beside `choices`, as in vLLM."""

    __slots__ = ()
    kind, id_prefix = "chat.completion.chunk", "chatcmpl"

    def response(self, choices: Iterable[Sequence[ChoiceDelta]], usage: Usage) -> Json:
        """The whole answer; `choices` holds the deltas of each choice."""
        whole = [merge(deltas) for deltas in choices]
        messages = [self._choice(delta, "message", self._message(delta)) for delta in whole]
        return self._head("chat.completion", messages) | {"usage": usage.as_json()} | self._prompt_extras(whole[0])

    def events(self, delta: ChoiceDelta) -> bytes:
        return b"".join(sse(self.chunk(piece)) for piece in _one_call_each(delta))

    def _message(self, delta: ChoiceDelta) -> Json:
        message: Json = {"role": "assistant", "content": delta.text, "refusal": None} | _reasoning(delta)
        if not delta.tool_calls:
            return message
        calls = [{"id": call.id, "type": "function", "function": _function(call)} for call in delta.tool_calls]
        return message | {"content": delta.text or None, "tool_calls": calls}

    def chunk(self, delta: ChoiceDelta) -> Json:
        """The first chunk of a choice names the role, the first one of a call its id and name."""
        content = {"role": "assistant", "content": delta.text} if delta.is_first else {"content": delta.text}
        shown: Json = (content if delta.text or delta.is_first else {}) | _reasoning(delta)
        if delta.tool_calls:
            shown = shown | {"tool_calls": [_call_chunk(call) for call in delta.tool_calls]}
        return self._chunk(self._choice(delta, "delta", shown)) | self._prompt_extras(delta)

    def _choice(self, delta: ChoiceDelta, name: str, content: Json) -> Json:
        num_top = self.request.num_logprobs
        choice: Json = {
            "index": delta.index,
            name: content,
            "logprobs": None if num_top is None else logprobs.chat_logprobs(delta.rows, num_top, self.tokenizer),
            "finish_reason": "tool_calls"
            if delta.has_called and delta.finish_reason == "stop"
            else delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return choice | self._extras(delta)


def _reasoning(delta: ChoiceDelta) -> Json:
    return {"reasoning_content": delta.reasoning} if delta.reasoning else {}


def _one_call_each(delta: ChoiceDelta) -> list[ChoiceDelta]:
    """As OpenAI streams calls: clients expect content, each call and the end in chunks of their own."""
    if not delta.tool_calls:
        return [delta]
    content = replace(delta, tool_calls=(), finish_reason=None, stop_reason=None, routed_experts=None)
    only = ChoiceDelta(delta.index, has_called=delta.has_called)
    pieces = [replace(only, tool_calls=(call,)) for call in delta.tool_calls]
    end = replace(
        only, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason, routed_experts=delta.routed_experts
    )
    return [piece for piece in (content, *pieces, end) if not piece.is_empty]


def _function(call: ToolCallDelta) -> Json:
    return {"name": call.name, "arguments": call.arguments}


def _call_chunk(call: ToolCallDelta) -> Json:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, "id": call.id, "type": "function", "function": _function(call)}
