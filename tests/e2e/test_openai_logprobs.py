"""Log-probabilities, teacher-forced scores and routed experts, compared with transformers."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

from tests.e2e.oracle import Oracle
from tests.e2e.servers import MODEL

TEXT = "The front sends each token to its experts; they send back one sum."
NUM_TOKENS = 6
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def ids(oracle: Oracle) -> list[int]:
    return oracle.encode(TEXT)


@pytest.fixture(scope="module")
def continued(oracle: Oracle, ids: list[int]) -> list[int]:
    return ids + oracle.greedy(ids, NUM_TOKENS)


class TestScoringAsEvaluationHarnessesDo:
    """lm-eval's local-completions: token ids as the prompt, echo, logprobs=1, max_tokens 0 or 1."""

    @pytest.mark.parametrize("max_tokens", [0, 1])
    @pytest.mark.parametrize("form", ["text", "ids"])
    def test_a_prompt_is_scored(
        self, client: OpenAI, oracle: Oracle, ids: list[int], continued: list[int], form: str, max_tokens: int
    ) -> None:
        prompt: Any = TEXT if form == "text" else [ids]
        answer = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, logprobs=1, echo=True, seed=1234
        )
        [choice] = answer.choices
        expected = continued[: len(ids) + max_tokens]
        scores = choice.logprobs.token_logprobs  # type: ignore[union-attr]
        assert choice.text == TEXT + oracle.decode(expected[len(ids) :])
        assert scores[0] is None
        assert scores[1:] == pytest.approx(oracle.scores(expected), abs=TOLERANCE)
        assert sum(scores[1 : len(ids)]) == pytest.approx(sum(oracle.scores(ids)), abs=TOLERANCE * len(ids))
        assert answer.usage is not None
        assert answer.usage.completion_tokens == max_tokens
        assert choice.finish_reason == "length"

    def test_the_greedy_token_is_told_beside_each_token(self, client: OpenAI, oracle: Oracle, ids: list[int]) -> None:
        answer = client.completions.create(model=MODEL, prompt=ids, max_tokens=0, logprobs=1, echo=True)
        rows = answer.choices[0].logprobs
        assert rows is not None
        assert rows.top_logprobs[0] is None
        best = oracle.logprobs(ids)[:-1].max(dim=-1)
        for row, own, token, logprob in zip(
            rows.top_logprobs[1:], rows.tokens[1:], best.indices.tolist(), best.values.tolist(), strict=True
        ):
            assert max(row.values()) == pytest.approx(logprob, abs=TOLERANCE)
            assert own in row
            is_greedy = own == max(row, key=row.__getitem__)
            assert is_greedy == (own == client_spelling(oracle, token))

    def test_offsets_point_into_the_text(self, client: OpenAI) -> None:
        answer = client.completions.create(
            model=MODEL, prompt=TEXT, max_tokens=3, logprobs=0, echo=True, logit_bias={"80": 100}
        )
        [choice] = answer.choices
        assert choice.logprobs is not None
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            assert choice.text[offset : offset + len(token)] == token

    def test_several_prompts_are_scored_side_by_side(self, client: OpenAI, oracle: Oracle, ids: list[int]) -> None:
        prompts = [ids, ids[:10], ids[5:40]]
        answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=0, logprobs=1, echo=True)
        for choice, prompt in zip(answer.choices, prompts, strict=True):
            scores = choice.logprobs.token_logprobs[1:]  # type: ignore[union-attr]
            assert scores == pytest.approx(oracle.scores(prompt), abs=TOLERANCE)


def client_spelling(oracle: Oracle, token: int) -> str:
    """A token as logprobs show it: its text, or its bytes if it is no whole character."""
    text = oracle.tokenizer.decode([token], skip_special_tokens=False)
    return f"bytes:\\x{byte_of(oracle, token):02x}" if text == "\ufffd" else text


def byte_of(oracle: Oracle, token: int) -> int:
    """The alphabet of a byte-level tokenizer, in GPT-2's order: printable bytes first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    piece = ord(oracle.tokenizer.id_to_token(token))
    return piece if piece < 0x100 else others[piece - 0x100]


class TestGeneratedTokens:
    def test_completion_logprobs(self, client: OpenAI, oracle: Oracle, ids: list[int], continued: list[int]) -> None:
        answer = client.completions.create(
            model=MODEL, prompt=ids, max_tokens=NUM_TOKENS, temperature=0, logprobs=5, extra_body={"ignore_eos": True}
        )
        rows = answer.choices[0].logprobs
        assert rows is not None
        assert rows.token_logprobs == pytest.approx(oracle.scores(continued)[-NUM_TOKENS:], abs=TOLERANCE)
        top = oracle.logprobs(continued)[len(ids) - 1 : -1].topk(5).values.tolist()
        for row, expected in zip(rows.top_logprobs, top, strict=True):
            assert list(row.values()) == pytest.approx(expected, abs=TOLERANCE)

    @pytest.mark.parametrize("stream", [False, True])
    def test_chat_logprobs(self, client: OpenAI, oracle: Oracle, stream: bool) -> None:
        messages: Any = [{"role": "user", "content": "Hi"}]
        settings: dict[str, Any] = {
            "model": MODEL, "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": True,
            "top_logprobs": 3, "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        prompt = oracle.encode(
            "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        )
        expected = prompt + oracle.greedy(prompt, NUM_TOKENS)
        if stream:
            choices: Any = [chunk.choices[0] for chunk in client.chat.completions.create(**settings, stream=True)]
        else:
            choices = client.chat.completions.create(**settings).choices
        rows = [row for choice in choices for row in choice.logprobs.content]
        assert [row.logprob for row in rows] == pytest.approx(oracle.scores(expected)[-NUM_TOKENS:], abs=TOLERANCE)
        assert [len(row.top_logprobs) for row in rows] == [3] * NUM_TOKENS
        text = b"".join(bytes(row.bytes) for row in rows).decode(errors="replace")
        assert text == oracle.decode(expected[-NUM_TOKENS:])

    def test_logprobs_are_the_models_own_whatever_the_sampling(
        self, client: OpenAI, oracle: Oracle, ids: list[int]
    ) -> None:
        answer = client.completions.create(
            model=MODEL, prompt=ids, max_tokens=NUM_TOKENS, temperature=3, frequency_penalty=1, seed=2, logprobs=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        [choice] = answer.choices
        drawn = (choice.model_extra or {})["token_ids"]
        scores = choice.logprobs.token_logprobs  # type: ignore[union-attr]
        assert scores == pytest.approx(oracle.scores(ids + drawn)[-NUM_TOKENS:], abs=TOLERANCE)


class TestExtensions:
    def test_prompt_logprobs_have_vllms_shape(self, client: OpenAI, oracle: Oracle, ids: list[int]) -> None:
        answer = client.completions.create(model=MODEL, prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": 2})
        first, *rows = (answer.choices[0].model_extra or {})["prompt_logprobs"]
        assert first is None
        logprobs_TV = oracle.logprobs(ids)
        for row, logprobs_V, token in zip(rows, logprobs_TV, ids[1:], strict=False):
            own = row[str(token)]
            assert own["logprob"] == pytest.approx(float(logprobs_V[token]), abs=TOLERANCE)
            assert own["rank"] == int((logprobs_V > logprobs_V[token]).sum()) + 1
            assert 2 <= len(row) <= 3
            assert {str(t) for t in logprobs_V.topk(2).indices.tolist()} <= row.keys()

    @pytest.mark.parametrize("stops", [False, True])
    def test_routed_experts_are_the_routers_choice(
        self, client: OpenAI, oracle: Oracle, ids: list[int], stops: bool
    ) -> None:
        extra = {"return_routed_experts": True, "return_token_ids": True}
        settings: dict[str, Any] = {"model": MODEL, "prompt": ids, "max_tokens": NUM_TOKENS, "temperature": 0}
        answer = client.completions.create(**settings, extra_body=extra)
        if stops:
            stop = answer.choices[0].text[1:3]
            answer = client.completions.create(**settings, stop=stop, extra_body=extra)
            assert answer.choices[0].finish_reason == "stop"
        more = answer.choices[0].model_extra or {}
        routed = np.load(io.BytesIO(base64.b64decode(more["routed_experts"])))
        computed = [*ids, *more["token_ids"]][:-1]
        expected = oracle.routed_experts(computed).numpy()
        assert routed.shape == expected.shape == (len(computed), 6, 2)
        assert (np.sort(routed, axis=-1) == expected).all()
