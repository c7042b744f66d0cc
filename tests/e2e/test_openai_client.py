"""The official `openai` client, as its users call it: prompts in every form, streams, several choices, refusals.

What each sampling field does is in test_openai_fields.py, log-probabilities are in test_openai_logprobs.py.
"""

import asyncio
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam
from pydantic import BaseModel, Field

from tests.e2e.oracle import Oracle
from tests.e2e.servers import MODEL

TEXTS = ["Hi", "A front holds no expert weights."]
NUM_TOKENS = 24
# Greedy, and as long as asked: an untrained model ends a text at any time.
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": NUM_TOKENS}
LONG: dict[str, Any] = {"extra_body": {"ignore_eos": True, "return_token_ids": True}}
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": [{"type": "text", "text": "What is a lane?"}]},
]
RENDERED = (
    "<|start_of_role|>system<|end_of_role|>Answer.<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>What is a lane?<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>"
)


def join_chat(chunks: Iterable[ChatCompletionChunk]) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    return dict(texts)


def join(chunks: Iterable[Completion]) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return dict(texts)


class TestCompletions:
    @pytest.mark.parametrize("form", ["string", "strings", "ids", "lists of ids"])
    def test_greedy_tokens_are_those_of_transformers(self, client: OpenAI, oracle: Oracle, form: str) -> None:
        ids = [oracle.encode(text) for text in TEXTS]
        prompt: Any = {"string": TEXTS[0], "strings": TEXTS, "ids": ids[0], "lists of ids": ids}[form]
        prompts = ids[:1] if form in ("string", "ids") else ids
        answer = client.completions.create(prompt=prompt, **GREEDY, **LONG)
        assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
        for choice, prompt_ids in zip(answer.choices, prompts, strict=True):
            expected = oracle.greedy(prompt_ids, NUM_TOKENS)
            extra = choice.model_extra or {}
            assert extra["token_ids"] == expected
            assert extra["prompt_token_ids"] == prompt_ids
            assert choice.text == oracle.decode(expected)
            assert choice.finish_reason == "length"
        assert answer.usage is not None
        num_prompt = sum(map(len, prompts))
        assert answer.usage.prompt_tokens == num_prompt
        assert answer.usage.completion_tokens == NUM_TOKENS * len(prompts)
        assert answer.usage.total_tokens == num_prompt + NUM_TOKENS * len(prompts)

    def test_the_envelope_is_openais(self, client: OpenAI) -> None:
        answer = client.completions.create(prompt="Hi", user="someone", **GREEDY)
        assert answer.object == "text_completion"
        assert answer.model == MODEL
        assert answer.id.startswith("cmpl-")
        assert answer.choices[0].logprobs is None

    def test_sixteen_tokens_unless_asked_otherwise(self, client: OpenAI) -> None:
        answer = client.completions.create(model=MODEL, prompt="Hi", **LONG)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16

    def test_streamed_text_is_the_whole_text(self, client: OpenAI) -> None:
        whole = client.completions.create(prompt=TEXTS, n=2, **GREEDY, **LONG)
        with client.completions.create(prompt=TEXTS, n=2, stream=True, **GREEDY, **LONG) as stream:
            chunks = list(stream)
        assert join(chunks) == {choice.index: choice.text for choice in whole.choices}
        assert len({chunk.id for chunk in chunks}) == 1
        ends = [(c.index, c.finish_reason) for chunk in chunks for c in chunk.choices if c.finish_reason]
        assert sorted(ends) == [(index, "length") for index in range(4)]

    def test_stream_options_add_a_last_chunk_with_the_usage(self, client: OpenAI) -> None:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        with client.completions.create(prompt="Hi", **options, **GREEDY, **LONG) as stream:
            *chunks, last = list(stream)
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)
        assert not last.choices
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, NUM_TOKENS)

    def test_a_repeated_prompt_is_found_in_the_prefix_cache(self, client: OpenAI) -> None:
        prompt = [3 + i % 100 for i in range(50)]
        answers = [client.completions.create(prompt=prompt, **GREEDY, **LONG) for _ in range(2)]
        cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]  # type: ignore[union-attr]
        assert cached == [0, 48], "3 full blocks of 16 tokens"
        assert answers[0].choices[0].text == answers[1].choices[0].text


class TestChat:
    def test_greedy_answer_is_that_of_transformers(self, client: OpenAI, oracle: Oracle) -> None:
        answer = client.chat.completions.create(messages=MESSAGES, **GREEDY, **LONG)
        expected = oracle.greedy(oracle.encode(RENDERED), NUM_TOKENS)
        [choice] = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", oracle.decode(expected))
        assert (choice.model_extra or {})["token_ids"] == expected
        assert (choice.finish_reason, answer.object) == ("length", "chat.completion")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(oracle.encode(RENDERED))

    def test_streamed_text_is_the_whole_text(self, client: OpenAI) -> None:
        whole = client.chat.completions.create(messages=MESSAGES, n=2, seed=1, model=MODEL, max_tokens=9, **LONG)
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        with client.chat.completions.create(
            messages=MESSAGES, n=2, seed=1, model=MODEL, max_tokens=9, **options, **LONG
        ) as stream:
            *chunks, last = list(stream)
        assert join_chat(chunks) == {choice.index: choice.message.content for choice in whole.choices}
        roles = [(c.index, c.delta.role) for chunk in chunks for c in chunk.choices if c.delta.role]
        assert sorted(roles) == [(0, "assistant"), (1, "assistant")], "each choice names its role once"
        assert last.usage == whole.usage.model_copy(update={"prompt_tokens_details": last.usage.prompt_tokens_details})

    def test_max_completion_tokens_limits_as_max_tokens_does(self, client: OpenAI) -> None:
        limits: list[dict[str, int]] = [{"max_completion_tokens": 5}, {"max_tokens": 5}]
        answers = [
            client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, **limit, **LONG)
            for limit in limits
        ]
        assert answers[0].choices[0].message == answers[1].choices[0].message
        assert [answer.usage.completion_tokens for answer in answers] == [5, 5]  # type: ignore[union-attr]

    def test_the_final_message_can_be_continued(self, client: OpenAI, oracle: Oracle) -> None:
        messages: Any = [{"role": "assistant", "content": "One, two,"}]
        extra = {"continue_final_message": True, "add_generation_prompt": False} | LONG["extra_body"]
        answer = client.chat.completions.create(messages=messages, **GREEDY, extra_body=extra)
        prompt = oracle.encode("<|start_of_role|>assistant<|end_of_role|>One, two,")
        assert (answer.choices[0].model_extra or {})["token_ids"] == oracle.greedy(prompt, NUM_TOKENS)


async def test_async_clients_share_the_server(async_client: AsyncOpenAI, client: OpenAI) -> None:
    alone = client.chat.completions.create(messages=MESSAGES, **GREEDY, **LONG).choices[0].message.content

    async def streamed() -> str | None:
        stream = await async_client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY, **LONG)
        return join_chat([chunk async for chunk in stream])[0]

    async def whole() -> str | None:
        answer = await async_client.chat.completions.create(messages=MESSAGES, **GREEDY, **LONG)
        return answer.choices[0].message.content

    assert await asyncio.gather(streamed(), whole(), streamed(), whole()) == [alone] * 4


class TestModels:
    def test_the_served_model_is_listed(self, client: OpenAI) -> None:
        [card] = client.models.list().data
        assert (card.id, card.object, card.owned_by) == (MODEL, "model", "outcrop")
        assert (card.model_extra or {})["max_model_len"] == 2048
        assert client.models.retrieve(MODEL) == card

    def test_an_unknown_model_is_not_found(self, client: OpenAI) -> None:
        asks: list[Any] = [
            lambda: client.models.retrieve("gpt-9"),
            lambda: client.completions.create(model="gpt-9", prompt="Hi"),
            lambda: client.chat.completions.create(model="gpt-9", messages=MESSAGES, stream=True),
        ]
        for ask in asks:
            with pytest.raises(openai.NotFoundError, match=f"use '{MODEL}'") as caught:
                ask()
            assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


class Step(BaseModel):
    number: Literal[1, 2]
    done: bool


class Report(BaseModel):
    state: Literal["ready", "starting"]
    steps: Annotated[list[Step], Field(max_length=2)]
    note: Annotated[str, Field(max_length=3)] | None


class TestStructuredOutput:
    """The model was never trained: what fits, fits because nothing else could be sampled."""

    def test_pydantic_models(self, client: OpenAI) -> None:
        answer = client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, response_format=Report, seed=2, max_tokens=900
        )
        [choice] = answer.choices
        assert isinstance(choice.message.parsed, Report)
        assert choice.finish_reason == "stop"

    def test_streamed_text_is_the_whole_text(self, client: OpenAI) -> None:
        extra: Any = {"structured_outputs": {"regex": "[a-d]{20}-[0-9]{20}"}}
        options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "seed": 3, "extra_body": extra}
        whole = client.chat.completions.create(**options).choices[0].message.content
        with client.chat.completions.create(stream=True, **options) as stream:
            assert join_chat(stream) == {0: whole}
        assert re.fullmatch("[a-d]{20}-[0-9]{20}", whole or "")

    async def test_a_hundred_constrained_requests_beside_a_hundred_free_ones(
        self, async_client: AsyncOpenAI, client: OpenAI
    ) -> None:
        """Free ones have the tokens that they have alone."""
        options: dict[str, Any] = {"model": MODEL, "max_tokens": 16}
        forms: list[Any] = [{"regex": "[a-d]{9}!"}, {"choice": ["left", "right"]}, {"json": {"enum": [1, "b"]}}]

        async def ask(seed: int, form: Any = None) -> str:
            extra = {"ignore_eos": True} if form is None else {"structured_outputs": form}
            answer = await async_client.completions.create(prompt="Hi", seed=seed, extra_body=extra, **options)
            return answer.choices[0].text

        alone = [await ask(seed) for seed in range(0, 100, 20)]
        asked = [ask(n // 2, forms[n % 3] if n % 2 else None) for n in range(200)]
        answers = await asyncio.gather(*asked)
        assert answers[::40] == alone
        fits = [r"[a-d]{9}!", "left|right", r'1|"b"']
        assert all(re.fullmatch(fits[n % 3], answers[n]) for n in range(1, 200, 2))

    def test_what_cannot_be_promised_is_named(self, client: OpenAI) -> None:
        schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
        asked: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=asked)
        assert caught.value.param == "response_format"
