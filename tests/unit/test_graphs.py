"""Decode steps that are replayed have the tokens of those that are computed."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.compute import Compute
from actors.engine.engine import Engine
from actors.engine.kv_cache import BlockAllocator
from actors.engine.scheduler import Scheduler
from actors.model.graphs import Captures, DecodeGraphs
from actors.model.loading import load_front
from actors.model.paged_kv import PagedKV
from actors.weights import Weights
from benchmarks.gpu_check.models import generate, local, prompts, tokens_of
from cluster.errors import ModelError
from cluster.messages.requests import GenerationRequest, SamplingParams
from cluster.metrics import Metrics
from cluster.models.checkpoint import Checkpoint
from tests.checkpoints import GRANITE, TinyModel, write_checkpoint
from tests.families import QWEN2, SWA
from tests.unit import flash_attention, tape

FLASH = Compute(torch.device("cpu"), torch.float32, attention="flash")
BLOCKS, PAGE = 12, 256
GREEDY = SamplingParams(max_tokens=9, temperature=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    model = TinyModel(GRANITE | {"max_position_embeddings": 2 * PAGE})
    return Checkpoint.open(write_checkpoint(model, tmp_path_factory.mktemp("granite")))


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tape.as_one_operation(flash_attention.varlen_attn)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)


def engine_of(checkpoint: Checkpoint, capture: Any = None) -> Engine:
    model, length = load_front(Weights(checkpoint, FLASH)), checkpoint.spec.max_context
    kv = PagedKV(checkpoint.spec, BLOCKS + 1, PAGE, FLASH)
    for cache in (kv.k_LBSGC, kv.v_LBSGC):
        cache.fill_(float("nan"))
    scheduler = Scheduler(
        BlockAllocator(BLOCKS, PAGE, True), max_num_batched_tokens=64, max_num_seqs=4, max_model_len=length
    )
    if capture:
        model.graphs = DecodeGraphs(Captures(checkpoint.spec, FLASH, model.torch_layers, kv, length, capture))
    return Engine(model, kv, local(checkpoint, FLASH), scheduler, Metrics())


def test_replayed_steps_have_the_tokens_of_computed_ones(checkpoint: Checkpoint) -> None:
    """Sequences come and go, so steps of one to four are padded or not; one crosses into another page."""
    engine, plain = engine_of(checkpoint, tape.capture), engine_of(checkpoint)
    engine.warm_up()
    for number in (4, 1, 3):
        asked = [*prompts(number, 6, 250)[1:], tuple(i % 250 for i in range(PAGE - 4))]
        params = SamplingParams(max_tokens=8 + number, temperature=0.0)
        name = f"{number}-"
        assert tokens_of(generate(engine, asked, params, name)) == tokens_of(generate(plain, asked, params, name))
    assert engine.model.graphs
    assert engine.model.graphs.num_replayed > 10


@pytest.mark.parametrize("name", ["windows and sinks", "layers without experts"])
def test_other_models_are_replayed(name: str, tmp_path: Path) -> None:
    context = {"max_position_embeddings": 2 * PAGE}
    models = {
        "windows and sinks": TinyModel(SWA | context | {"layer_rope_theta": [0, 1e4, 1e3, 0]}, family="granitemoe_swa"),
        "layers without experts": TinyModel(QWEN2 | context | {"mlp_only_layers": [1]}, family="qwen2_moe"),
    }
    found = Checkpoint.open(write_checkpoint(models[name], tmp_path))
    engine, plain = engine_of(found, tape.capture), engine_of(found)
    engine.warm_up()
    assert tokens_of(generate(engine, prompts(3, 20, 250), GREEDY)) == tokens_of(
        generate(plain, prompts(3, 20, 250), GREEDY)
    )
    assert torch.equal(engine.expert_counts, plain.expert_counts)
    assert engine.model.graphs
    assert engine.model.graphs.num_replayed > 5


def test_the_padding_writes_to_nobodys_keys(checkpoint: Checkpoint) -> None:
    """Two of four sequences end, and one comes that gets their KV blocks: what the last step of four has left in the
    inputs must not be computed again.
    """

    def tokens(engine: Engine) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        lengths = {"a": 40, "b": 40, "c": 3, "d": 3}
        for name, length in lengths.items():
            engine.add(GenerationRequest(name, "", (ord(name), 7, 8), replace(GREEDY, max_tokens=length)))
        while engine.has_work:
            for output in engine.step():
                found[output.request_id] += output.token_ids
                if output.request_id == "d" and output.finish_reason:
                    engine.add(GenerationRequest("e", "", tuple(range(30)), GREEDY))
        return found

    engine = engine_of(checkpoint, tape.capture)
    engine.warm_up()
    assert tokens(engine) == tokens(engine_of(checkpoint))


def test_experts_and_counts_are_those_of_computed_steps(checkpoint: Checkpoint) -> None:
    engine, plain = engine_of(checkpoint, tape.capture), engine_of(checkpoint)
    engine.warm_up()
    params = SamplingParams(max_tokens=9, temperature=0.0, return_routed_experts=True)
    ours, theirs = (generate(each, prompts(3, 5, 250), params) for each in (engine, plain))
    assert [[o.routed_experts for o in each] for each in ours] == [[o.routed_experts for o in each] for each in theirs]
    assert torch.equal(engine.expert_counts, plain.expert_counts)


def test_prompts_and_larger_steps_are_computed(checkpoint: Checkpoint) -> None:
    engine = engine_of(checkpoint, tape.capture)
    assert engine.model.graphs
    engine.model.graphs.capture(2)
    generate(engine, prompts(4, 6, 250), SamplingParams(max_tokens=1, temperature=0.0))
    assert engine.model.graphs.num_replayed == 0


def test_graphs_are_for_as_many_sequences_as_can_run(checkpoint: Checkpoint) -> None:
    """Each has a KV block of its own, whatever max_num_seqs says."""
    engine = engine_of(checkpoint, tape.capture)
    engine.scheduler.max_num_seqs = 10**6
    engine.warm_up()
    assert engine.model.graphs
    assert [each.size for each in engine.model.graphs._by_size] == [1, 2, 4, 8, 16]


def test_what_cannot_be_captured_names_the_setting(checkpoint: Checkpoint) -> None:
    def refuse(compute: Any) -> Any:
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")  # as torch does

    with pytest.raises(ModelError, match=r"set cuda_graphs to false \(CUDA error: operation not permitted"):
        engine_of(checkpoint, refuse).warm_up()
