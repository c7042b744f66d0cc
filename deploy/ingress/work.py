"""Work that is as long as a request is large, done where it holds up nobody: bodies are read, messages rendered, texts
tokenised.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel

from deploy.ingress.json_pieces import join_pieces
from deploy.ingress.openai.errors import context_length_exceeded, invalid_request
from deploy.ingress.openai.messages import ChatFields, Message
from deploy.ingress.openai.parsing import check_content, parse_body
from deploy.ingress.openai.sampling import check_token_ids
from deploy.ingress.sandbox import Sandbox, rendering, sandboxed
from deploy.ingress.text.tokens import NO_TEMPLATE, Tokenizer, TooManyTokens

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)

# What grows with a request is done on the event loop only up to this many characters, tokens or bytes: longer work,
# which goes to a thread, would hold up everyone's streams. There it must not keep the interpreter's lock for long
# either, which json.loads() does with larger bodies: they are read in a sandbox.
LONG = 10_000
LARGE_BODY = 200_000
# To tokenise a character takes as long as to write so many; so many stand around a message.
ENCODED_CHARS, MESSAGE_CHARS = 10, 50
MAX_THREADS = 4


class Work:
    def __init__(self, tokenizer: Tokenizer, max_model_len: int, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(MAX_THREADS, "requests")
        self._bodies = Sandbox("reading the body")
        template = tokenizer.template
        self._templates = Sandbox("messages: rendering the chat template", template.arguments()) if template else None

    async def warm_up(self) -> None:
        """Raises ModelError if the chat template can't be compiled."""
        if self._templates:
            await self._templates.warm_up()

    async def close(self) -> None:
        await self._bodies.close()
        if self._templates:
            await self._templates.close()

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Do what takes as long as `size` is large, where it holds up nobody."""
        return work() if size < LONG else await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def parse(self, raw: bytes, model: type[B]) -> B:
        """A checked body. Raises APIError."""
        if len(raw) < LARGE_BODY:
            return await self.run(len(raw), lambda: parse_body(raw, model))
        pieces = await sandboxed(self._bodies.read_json(raw))
        return await self.run(len(raw), lambda: check_content(join_pieces(pieces), model, b"\\u" in raw))

    async def render(self, fields: ChatFields, messages: list[Message], tools: list[dict[str, Any]]) -> str:
        """Raises APIError (400)."""
        if self._templates is None:
            raise invalid_request(NO_TEMPLATE, "messages")
        size = sum(MESSAGE_CHARS + len(message.content or "") for message in messages)
        # How much there is in tools, calls and variables is not counted: to count is as long as to write.
        is_nested = tools or fields.chat_template_kwargs or any(message.tool_calls for message in messages)
        options = {
            "add_generation_prompt": fields.add_generation_prompt,
            "continue_final_message": fields.continue_final_message,
            "variables": fields.chat_template_kwargs,
            "tools": tools,
        }
        asked = await self.run(
            LONG if is_nested else size, lambda: rendering([message.for_template() for message in messages], **options)
        )
        text = await sandboxed(self._templates.render(asked), "messages")
        return await self.run(len(text), text.decode)

    async def encode(
        self, text: str, add_special_tokens: bool = True, param: str = "prompt", size: int = 0, most: int = 0
    ) -> tuple[int, ...]:
        """`size`: characters of all texts that are encoded one after the other. Raises APIError (400) where there are
        more tokens than `most`, or than fit; before it has tokenised anything, if that is so whatever the tokens are.
        """
        self.check_fits(len(text) // self.tokenizer.longest_token, param)
        most = most or self.max_model_len
        try:
            return await self.run(
                ENCODED_CHARS * max(size, len(text)),
                lambda: tuple(self.tokenizer.encode(text, add_special_tokens, most)),
            )
        except TooManyTokens as error:
            raise context_length_exceeded(self.max_model_len, error.num_tokens, 0, param) from None

    async def decode(self, tokens: list[int]) -> str:
        """Raises APIError (400)."""
        if len(tokens) > self.max_model_len:
            limit = f"max_model_len={self.max_model_len}"
            raise invalid_request(f"tokens: {len(tokens)} token ids are more than {limit}: send fewer", "tokens")
        await self.run(len(tokens), lambda: check_token_ids(tokens, self.vocab_size, "tokens"))
        return await self.run(len(tokens), lambda: self.tokenizer.decode(tokens, skip_special_tokens=False))

    def check_fits(self, least: int, param: str) -> None:
        """`least`: as many tokens as there must be."""
        if least > self.max_model_len:
            raise context_length_exceeded(self.max_model_len, least, 0, param)
