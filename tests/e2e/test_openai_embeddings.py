"""Embeddings, and prompts made of them, through the official `openai` client: transformers is the oracle."""

import base64
import io
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from safetensors.torch import save

from tests.checkpoints import load_reference
from tests.e2e.oracle import Oracle
from tests.e2e.servers import MODEL

TEXTS = ["Hi", "A front holds no expert weights.", "ü", "An expert replica is stateless. " * 20]


@pytest.fixture(scope="module")
def reference(model_dir: Any) -> Any:
    return load_reference(model_dir)


def unit(vector: Any) -> Any:
    return np.asarray(vector) / np.linalg.norm(vector)


def expected(reference: Any, ids: list[int], pooling: str) -> Any:
    with torch.inference_mode():
        hidden_TD = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    return unit(hidden_TD[-1] if pooling == "last" else hidden_TD.mean(0))


class TestEmbeddings:
    @pytest.mark.parametrize("pooling", ["last", "mean"])
    @pytest.mark.parametrize("encoding", ["float", "base64"])
    def test_are_those_of_transformers(
        self, client: OpenAI, oracle: Oracle, reference: Any, pooling: str, encoding: Any
    ) -> None:
        answer = client.embeddings.create(
            model=MODEL, input=TEXTS, encoding_format=encoding, extra_body={"pooling": pooling}
        )
        ids = [oracle.encode(text) for text in TEXTS]
        assert [item.index for item in answer.data] == [0, 1, 2, 3]
        for item, tokens in zip(answer.data, ids, strict=True):
            raw: Any = item.embedding
            vector = np.frombuffer(base64.b64decode(raw), "<f4") if encoding == "base64" else np.asarray(raw)
            assert np.abs(vector - expected(reference, tokens, pooling)).max() < 1e-5
        assert answer.usage.prompt_tokens == sum(map(len, ids))

    def test_dimensions_are_the_first_ones_at_length_one(self, client: OpenAI) -> None:
        whole = client.embeddings.create(model=MODEL, input=TEXTS[0]).data[0].embedding
        some = client.embeddings.create(model=MODEL, input=TEXTS[0], dimensions=5).data[0].embedding
        assert np.abs(unit(whole[:5]) - np.asarray(some)).max() < 1e-6

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": "x" * 9999}, "input"),
            ({"input": [[1], [10**9]]}, "input"), ({"dimensions": 33}, "dimensions"), ({"model": "other"}, "model"),
            ({"extra_body": {"pooling": "max"}}, "pooling"), ({"input": ["a"] * 3000}, "input"),
        ],
    )  # fmt: skip
    def test_what_is_refused_is_named(self, client: OpenAI, fields: dict[str, Any], param: str) -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            client.embeddings.create(**{"model": MODEL, "input": "Hi"} | fields)
        assert (caught.value.status_code in (400, 404), caught.value.param) == (True, param)


def packed(embeds: torch.Tensor, **others: torch.Tensor) -> str:
    return base64.b64encode(save({"embeds": embeds.contiguous(), **others})).decode()


class TestPromptEmbeds:
    OPTIONS: Any = {"model": MODEL, "prompt": "", "temperature": 0, "max_tokens": 12}  # noqa: RUF012

    def ask(self, client: OpenAI, embeds: Any, **extra: Any) -> Any:
        body = {"prompt": None, "prompt_embeds": embeds, "ignore_eos": True, "return_token_ids": True} | extra
        return client.completions.create(**self.OPTIONS, extra_body=body)

    def test_those_of_tokens_are_as_good_as_tokens(self, client: OpenAI, oracle: Oracle, reference: Any) -> None:
        table_VD = reference.get_input_embeddings().weight.detach()
        ids = [oracle.encode(text) for text in TEXTS[:2]]
        answer = self.ask(client, [packed(table_VD[tokens]) for tokens in ids])
        for choice, tokens in zip(answer.choices, ids, strict=True):
            assert choice.model_extra["token_ids"] == oracle.greedy(tokens, 12)
        assert answer.usage.prompt_tokens == sum(map(len, ids))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_types(self, client: OpenAI, dtype: torch.dtype) -> None:
        assert self.ask(client, packed(torch.ones(3, 32, dtype=dtype))).choices[0].text is not None

    @pytest.mark.parametrize(
        ("embeds", "told"),
        [
            ("?", "not base64"),
            (base64.b64encode(b"nothing").decode(), "safetensors"),
            (base64.b64encode((2**40).to_bytes(8, "little")).decode(), "header"),
            (packed(torch.zeros(3, 31)), "width 31"),
            (packed(torch.zeros(3, 32), more=torch.zeros(1)), "one tensor"),
            (packed(torch.zeros(32)), "one tensor"),
            (packed(torch.zeros(3, 32, dtype=torch.int64)), "one tensor"),
            (packed(torch.full((3, 32), torch.nan)), "finite"),
            (packed(torch.full((3, 32), torch.inf, dtype=torch.bfloat16)), "finite"),
            (packed(torch.zeros(3000, 32)), "maximum context length"),
        ],
    )
    def test_what_is_no_prompt_is_refused(self, client: OpenAI, embeds: str, told: str) -> None:
        with pytest.raises(openai.BadRequestError, match=told) as caught:
            self.ask(client, embeds)
        assert caught.value.param == "prompt_embeds"

    def test_a_pickle_is_not_read(self, client: OpenAI) -> None:
        file = io.BytesIO()
        torch.save(torch.zeros(3, 32), file)
        with pytest.raises(openai.BadRequestError, match="safetensors"):
            self.ask(client, base64.b64encode(file.getvalue()).decode())

    @pytest.mark.parametrize("field", [{"echo": True}, {"prompt_logprobs": 1}, {"prompt": "Hi"}])
    def test_fields_that_need_tokens(self, client: OpenAI, field: dict[str, Any]) -> None:
        with pytest.raises(openai.BadRequestError):
            self.ask(client, packed(torch.zeros(3, 32)), **field)
