"""Every family against transformers, through the engine: greedy tokens, scores of prompts, routing, in 1, 2 and 4
groups, whatever the schedule.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.dispatch.remote import RemoteDispatcher
from actors.engine.engine import Engine
from actors.experts.loading import load_experts, read_layer_experts
from actors.replica.replica import Replica
from actors.weights import Weights
from cluster.expert_map import ExpertMap, ReplicaAddress, contiguous_homes
from cluster.messages.actors import ReplicaSpec
from cluster.messages.requests import RoutedExperts, SamplingParams
from cluster.metrics import Metrics
from cluster.models.checkpoint import Checkpoint
from tests.checkpoints import generate, load_reference, write_checkpoint
from tests.engines import Result, make_engine, run
from tests.families import FAMILIES
from tests.specs import PLAIN
from tests.unit.test_failover import ScriptedLane

MODELS = {name: model for models in FAMILIES.values() for name, model in models.items()}
# Shorter and longer than the windows that models have.
PROMPTS = [[(7 * i + 13 * j) % 250 for i in range(length)] for j, length in enumerate((5, 23, 41))]
NUM_NEW = 14
PARAMS = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, prompt_logprobs=0, logprobs=0, return_routed_experts=True)
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=MODELS)
def model_dir(request, tmp_path_factory) -> Path:
    return write_checkpoint(MODELS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def reference(model_dir: Path):
    return load_reference(model_dir)


def in_groups(model_dir: Path, number: int) -> RemoteDispatcher:
    """Experts in replicas of so many groups, which pack and unpack what they are sent."""
    checkpoint = Checkpoint.open(model_dir)
    spec, weights = checkpoint.spec, Weights(checkpoint, PLAIN)
    expert_map = ExpertMap(1, number, contiguous_homes(spec.num_expert_layers, spec.num_experts, number))
    lane = ScriptedLane()
    for group in range(number):
        store = load_experts(weights, expert_map.experts_of(group))
        told = ReplicaSpec(f"expert-g{group}-r0", group, "", "cpu", "float32", (), 1)
        replica = Replica(told, store, lambda layer, ids: read_layer_experts(weights, layer, ids), Metrics())
        lane.behaviour[told.actor_id] = replica.answer
    addresses = tuple(ReplicaAddress(name, group, ((lane.name, name),)) for group, name in enumerate(lane.behaviour))
    dispatcher = RemoteDispatcher(lane, Metrics())
    dispatcher.set_map(ExpertMap(2, number, expert_map.homes, addresses))
    return dispatcher


def check(reference, results: dict[str, Result]) -> None:
    """Tokens, scores and routing of prompts and answers."""
    answers = []
    for name, result in results.items():
        prompt = PROMPTS[int(name)]
        expected = generate(reference, prompt, NUM_NEW)
        assert result.token_ids == expected
        answers += expected
        tokens = prompt + result.token_ids
        with torch.no_grad():
            found = reference(torch.tensor([tokens]), output_router_logits=True)
        wanted_TV = found.logits[0].log_softmax(-1)
        scores = result.outputs[0].prompt_logprobs
        assert scores is not None
        given = [*scores[1:], *(score for output in result.outputs for score in output.logprobs)]
        ours = torch.tensor([score.logprob for score in given])
        theirs = wanted_TV[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert torch.equal(routed(result), chosen(reference, found.router_logits)[:-1])
    assert len(set(answers)) >= 16, "a model that repeats itself would hide mistakes"


def routed(result: Result) -> Tensor:
    joined = RoutedExperts.joined([output.routed_experts for output in result.outputs if output.routed_experts])
    return torch.frombuffer(bytearray(joined.data), dtype=torch.uint8).view(joined.shape).long()


def chosen(reference, router_logits: tuple[Tensor, ...]) -> Tensor:
    top_k = reference.config.num_experts_per_tok
    return torch.stack([logits.topk(top_k).indices for logits in router_logits], dim=1)


def scored(engine: Engine, stagger: int = 0) -> dict[str, Result]:
    return run(engine, {str(i): (prompt, PARAMS) for i, prompt in enumerate(PROMPTS)}, stagger)


def test_prompts_together_in_chunks_and_groups(model_dir: Path, reference) -> None:
    number = 1 + sum(map(ord, model_dir.name)) % 3  # each group size for a third of the models, and more below
    engine = make_engine(model_dir, budget=11)
    engine.dispatcher = in_groups(model_dir, (1, 2, 4)[number - 1])
    check(reference, scored(engine, stagger=2))


def test_preempted_and_from_the_prefix_cache(model_dir: Path, reference) -> None:
    engine = make_engine(model_dir, num_blocks=24, budget=16)
    expected = [generate(reference, prompt, NUM_NEW) for prompt in PROMPTS]
    requests = {str(i): (prompt, GREEDY) for i, prompt in enumerate(PROMPTS)}
    assert [result.token_ids for result in run(engine, requests).values()] == expected
    assert engine.scheduler.num_preemptions, "the test is meant to preempt"
    warm = run(engine, {"2": (PROMPTS[2], GREEDY)})["2"]
    assert warm.token_ids == expected[2]
    assert warm.last.num_cached_tokens >= 16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_models_differ(family: str) -> None:
    assert len(FAMILIES[family]) >= 5
    assert len({re.sub(r"\W", "", str(model)) for model in FAMILIES[family].values()}) == len(FAMILIES[family])
