"""Embeddings and prompts made of embeddings, in the engine: transformers is the oracle, alone and in a batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine.engine import Engine
from cluster.messages.requests import GenerationRequest, PoolingKind, PromptEmbeds, RequestOutput, SamplingParams
from tests.checkpoints import MODELS, generate, load_reference, write_checkpoint
from tests.engines import make_engine

PROMPTS = [[(7 * i + 13 * j) % 250 + 3 for i in range(length)] for j, length in enumerate((5, 23, 1, 90, 17, 9))]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("granite"))


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    return load_reference(model_dir)


def run(engine: Engine, requests: list[GenerationRequest]) -> dict[str, RequestOutput]:
    """The last output of each, with the tokens of all."""
    for request in requests:
        engine.add(request)
    tokens: dict[str, tuple[int, ...]] = {}
    last: dict[str, RequestOutput] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            tokens[output.request_id] = tokens.get(output.request_id, ()) + output.token_ids
            last[output.request_id] = replace(output, token_ids=tokens[output.request_id])
        engine.check_integrity()
    return last


def pooled(output: RequestOutput) -> np.ndarray[Any, Any]:
    assert output.embedding is not None
    return unit(np.frombuffer(output.embedding, np.float32))


def unit(vector: Any) -> np.ndarray[Any, Any]:
    """As the API sends it."""
    return vector / np.linalg.norm(vector)  # type: ignore[no-any-return]


def embedding_of(number: int, kind: PoolingKind) -> GenerationRequest:
    params = SamplingParams(max_tokens=0, pooling=kind)
    return GenerationRequest(f"{kind} {number}", "t", tuple(PROMPTS[number]), params)


def expected(reference: Any, number: int, kind: PoolingKind) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        hidden_TD = reference(torch.tensor([PROMPTS[number]]), output_hidden_states=True).hidden_states[-1][0]
    return unit((hidden_TD[-1] if kind == "last" else hidden_TD.mean(0)).numpy())


@pytest.mark.parametrize("options", [{}, {"budget": 7}, {"num_blocks": 28, "budget": 16}], ids=str)
def test_pooled_states_are_those_of_transformers(model_dir: Path, reference: Any, options: dict[str, Any]) -> None:
    """Beside generations, in pieces, and computed again after a preemption."""
    kinds: tuple[PoolingKind, ...] = ("last", "mean")
    requests = [embedding_of(number, kind) for number in range(len(PROMPTS)) for kind in kinds]
    texts = [GenerationRequest(f"text {n}", "t", tuple(PROMPTS[n]), GREEDY) for n in range(len(PROMPTS))]
    engine = make_engine(model_dir, **options)
    outputs = run(engine, [*requests[:6], *texts, *requests[6:]])
    for number in range(len(PROMPTS)):
        for kind in kinds:
            found = outputs.get(f"{kind} {number}")
            assert found is not None
            assert np.abs(pooled(found) - expected(reference, number, kind)).max() < 1e-5
    assert engine.scheduler.allocator.num_used == 0


def test_a_mean_that_is_preempted_begins_anew(model_dir: Path) -> None:
    """Texts that grow take the blocks of a prompt that is half read."""
    prompt = tuple(PROMPTS[3][:60])
    asked = GenerationRequest("mean", "t", prompt, SamplingParams(max_tokens=0, pooling="mean"))
    texts = [GenerationRequest(f"text {n}", "t", tuple(PROMPTS[n]), replace(GREEDY, max_tokens=30)) for n in (4, 5)]
    engine = make_engine(model_dir, num_blocks=25, budget=6)
    for text in texts:
        engine.add(text)
    for _ in range(5):
        engine.step()
    disturbed = run(engine, [asked])["mean"]
    assert engine.scheduler.num_preemptions > 0
    assert np.abs(pooled(disturbed) - pooled(run(make_engine(model_dir), [asked])["mean"])).max() < 1e-5


def test_a_cached_prefix_changes_nothing(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    cold = run(engine, [embedding_of(3, "last"), embedding_of(3, "mean")])
    warm = run(engine, [embedding_of(3, "last"), embedding_of(3, "mean")])
    assert (warm["last 3"].num_cached_tokens, warm["mean 3"].num_cached_tokens) == (88, 0)
    for name in cold:
        assert np.abs(pooled(cold[name]) - pooled(warm[name])).max() < 1e-5


class TestPromptEmbeds:
    def request(self, reference: Any, number: int, name: str = "embeds", **params: Any) -> GenerationRequest:
        table_VD = reference.get_input_embeddings().weight.detach()
        embeds_TD = table_VD[PROMPTS[number]].float().contiguous()
        shape = (embeds_TD.shape[0], embeds_TD.shape[1])
        given = PromptEmbeds(shape, "float32", embeds_TD.numpy().tobytes())
        return GenerationRequest(name, "t", (0,) * shape[0], replace(GREEDY, **params), prompt_embeds=given)

    @pytest.mark.parametrize("options", [{}, {"budget": 7}, {"block_size": 1, "num_blocks": 300}], ids=str)
    def test_those_of_tokens_are_as_good_as_tokens(
        self, model_dir: Path, reference: Any, options: dict[str, Any]
    ) -> None:
        requests = [self.request(reference, n, f"embeds {n}") for n in range(len(PROMPTS))]
        texts = [GenerationRequest(f"text {n}", "t", tuple(PROMPTS[n]), GREEDY) for n in range(len(PROMPTS))]
        outputs = run(make_engine(model_dir, **options), [*requests, *texts])
        for n, prompt in enumerate(PROMPTS):
            tokens = list(outputs[f"embeds {n}"].token_ids)
            assert tokens == list(outputs[f"text {n}"].token_ids) == generate(reference, prompt, GREEDY.max_tokens)

    def test_they_are_never_found_in_the_prefix_cache_nor_find_anything(self, model_dir: Path, reference: Any) -> None:
        """Their placeholders are equal, and equal to a prompt of zeros; what they stand for is not."""
        engine = make_engine(model_dir)
        first = self.request(reference, 3)
        other = replace(first, request_id="other")
        assert other.prompt_embeds is not None
        noise = (torch.randn(other.prompt_embeds.shape, generator=torch.Generator().manual_seed(1)) / 9).numpy()
        other = replace(other, prompt_embeds=replace(other.prompt_embeds, data=noise.tobytes()))
        zeros = GenerationRequest("zeros", "t", (0,) * 90, GREEDY)
        every = (first, other, zeros)
        alone = {each.request_id: run(make_engine(model_dir), [each])[each.request_id] for each in every}
        assert len({output.token_ids for output in alone.values()}) == 3
        for request in (first, other, zeros, first, other):
            output = run(engine, [request])[request.request_id]
            assert output.token_ids == alone[request.request_id].token_ids
            assert output.num_cached_tokens == 0

    def test_another_front_goes_on(self, model_dir: Path, reference: Any) -> None:
        request = self.request(reference, 1)
        whole = run(make_engine(model_dir), [request])["embeds"].token_ids
        rest = run(make_engine(model_dir), [replace(request, output_token_ids=whole[:5], attempt=1)])["embeds"]
        assert whole[:5] + rest.token_ids == whole

    def test_placeholders_are_not_repeated_words(self, model_dir: Path, reference: Any) -> None:
        engine = make_engine(model_dir)
        options: dict[str, Any] = {"max_tokens": 1, "logit_bias": ((0, 5.0),)}
        penalised = self.request(reference, 1, "penalised", repetition_penalty=99.0, **options)
        outputs = run(engine, [self.request(reference, 1, **options), penalised])
        assert outputs["embeds"].token_ids == outputs["penalised"].token_ids == (0,)
