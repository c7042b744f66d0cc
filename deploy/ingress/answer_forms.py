"""What an answer is to look like, and how it is read: grammar, thoughts, calls of tools. For one model."""

import asyncio
from dataclasses import replace
from pathlib import Path

from deploy.ingress.openai.answer_json import dump
from deploy.ingress.openai.errors import invalid_request
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest
from deploy.ingress.openai.structured import AskedFormat
from deploy.ingress.sandbox import Sandbox, sandboxed
from deploy.ingress.text.grammar import Thought
from deploy.ingress.text.reasoning import ReasoningSplitter, is_begun, may_think
from deploy.ingress.text.tokens import Tokenizer
from deploy.ingress.text.tool_calls import ToolCallParser, find_format

# Of a processor, for a grammar: usual ones take a millisecond.
GRAMMAR_CPU_S = 0.5
NO_TOOLS = (
    "tools: the model's chat template knows none, or calls them in a form that is not known: set tool_call_parser to "
    "hermes or granite if its answers have that form"
)

Body = CompletionRequest | ChatCompletionRequest


class AnswerForms:
    def __init__(self, model_dir: Path, tokenizer: Tokenizer, tool_call_parser: str) -> None:
        self._tokenizer = tokenizer
        self._thinks = may_think(tokenizer)
        self._tool_format = find_format(tool_call_parser, tokenizer)
        self._sandbox = Sandbox("the format of the answer", cpu_s=GRAMMAR_CPU_S, model_dir=model_dir)

    async def grammar(self, request: Body, prompt: tuple[int, ...]) -> str | None:
        """Raises APIError (400) where it can't be compiled, or not in bounds; or where tools may be called, and nobody
        could read that.
        """
        if not (asked := self._asked(request)):
            return None
        arguments = {"kind": asked.kind, "value": asked.value, "thought": self._thought(request, prompt)}
        return await sandboxed(self._sandbox.grammar(await asyncio.to_thread(dump, arguments)), asked.param)

    def splitter(self, request: Body, prompt: tuple[int, ...]) -> ReasoningSplitter | None:
        """Tells thoughts apart; None where there are none."""
        thought = self._thought(request, prompt)
        return None if thought == "no" else ReasoningSplitter(thought == "begun")

    def call_parser(self, request: Body) -> ToolCallParser | None:
        """Finds calls; None where there can be none."""
        if not isinstance(request, ChatCompletionRequest) or not request.may_call or not self._tool_format:
            return None
        return ToolCallParser(self._tool_format, request.most_calls)

    async def close(self) -> None:
        await self._sandbox.close()

    def _asked(self, request: Body) -> AskedFormat | None:
        if not isinstance(request, ChatCompletionRequest) or not request.may_call:
            return request.asked_format
        form = self._tool_format
        if form is None:
            raise invalid_request(NO_TOOLS, "tools", "unsupported_parameter")
        if not (asked := request.asked_calls):
            return None
        return replace(asked, value=asked.value | {"begin": form.begin, "end": form.end, "is_list": form.is_list})

    def _thought(self, request: Body, prompt: tuple[int, ...]) -> Thought:
        """What may come before an answer."""
        if not self._thinks or not isinstance(request, ChatCompletionRequest):
            return "no"
        return "begun" if is_begun(prompt, self._tokenizer, request.continue_final_message) else "maybe"
