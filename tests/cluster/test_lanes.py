"""Tokens through real expert processes are the tokens of transformers, however many groups and replicas there are."""

import threading
from pathlib import Path

import pytest
import ray
import torch

from actors.compute import Compute
from actors.dispatch.remote import RemoteDispatcher
from actors.experts.fallback import CheckpointExperts
from actors.weights import Weights
from cluster.expert_map import ExpertMap
from cluster.messages.actors import ExpertDtype
from cluster.messages.requests import SamplingParams
from cluster.models.checkpoint import Checkpoint
from tests.checkpoints import MODELS, generate, load_reference, write_checkpoint
from tests.cluster.hosts import ExpertHost, connect, place
from tests.engines import make_engine, run

PROMPTS = [[(11 * i + 5 * j) % 250 for i in range(length)] for j, length in enumerate((6, 19, 1))]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0)
REQUESTS = {str(i): (prompt, GREEDY) for i, prompt in enumerate(PROMPTS)}


def num_groups_of(name: str) -> list[int]:
    num_experts = MODELS[name].config.get("num_local_experts", 8)
    return [n for n in (1, 2, 4) if num_experts % n == 0]


LANES = ["object_ref", "unix", "zmq", "tcp"]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_transformers_with_any_number_of_groups(
    hosts: list[ExpertHost], tmp_path: Path, name: str
) -> None:
    model_dir = write_checkpoint(MODELS[name], tmp_path)
    reference = load_reference(model_dir)
    expected = [generate(reference, prompt, GREEDY.max_tokens) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 8, "the reference must vary"
    # What differs by model is computed alike whatever the lane: tests/unit/test_families.py has more of it.
    for num_groups in num_groups_of(name):
        expert_map = place(hosts, model_dir, num_groups)
        for lane in ("object_ref", "unix", "zmq") if name == "granite" else ("unix",):
            dispatcher = connect(expert_map, lane)
            results = run(make_engine(model_dir, dispatcher=dispatcher, budget=16), REQUESTS)
            tokens = [results[str(i)].token_ids for i in range(len(PROMPTS))]
            assert tokens == expected, f"{num_groups} groups over {lane}"
            dispatcher.lane.close()


@pytest.mark.parametrize("lane", LANES)
def test_every_replica_of_a_group_takes_part_and_none_changes_the_tokens(
    hosts: list[ExpertHost], granite_dir: Path, lane: str
) -> None:
    both = place(hosts, granite_dir, 2)
    first = both.with_replicas(both.replicas[:2])
    second = both.with_replicas(both.replicas[2:])
    results = []
    for expert_map in (both, first, second):
        results.append(run(make_engine(granite_dir, dispatcher=connect(expert_map, lane)), REQUESTS))
    assert len({tuple(tuple(r.token_ids) for r in result.values()) for result in results}) == 1
    both = place(hosts, granite_dir, 2)
    run(make_engine(granite_dir, dispatcher=connect(both, lane)), REQUESTS)
    tokens = [ray.get(host.handle.report.remote()).tokens for host in hosts]
    for a, b in ((tokens[0], tokens[2]), (tokens[1], tokens[3])):
        assert 0.8 < a / b < 1.25, f"replicas of a group share the load, got {tokens}"


def test_a_refused_dispatch_waits_for_the_next_map(hosts: list[ExpertHost], granite_dir: Path) -> None:
    """The experts have moved: the replica says so, and the part follows the newer map."""
    old = place(hosts, granite_dir, 4)
    dispatcher = connect(old)
    expected = run(make_engine(granite_dir, dispatcher=dispatcher), REQUESTS)
    moved = place(list(reversed(hosts)), granite_dir, 4)
    newer = ExpertMap(dispatcher.map_version + 1, 4, moved.homes, moved.replicas)
    engine = make_engine(granite_dir, dispatcher=dispatcher)
    threading.Timer(0.3, lambda: dispatcher.set_map(newer)).start()
    results = run(engine, REQUESTS)
    assert {k: r.token_ids for k, r in results.items()} == {k: r.token_ids for k, r in expected.items()}
    assert dispatcher.map_version == newer.version


@pytest.mark.parametrize("lane", LANES)
def test_a_lost_replica_s_part_goes_to_another(hosts: list[ExpertHost], granite_dir: Path, lane: str) -> None:
    spare = ExpertHost(f"spare-{lane}")
    expert_map = place([*hosts[:2], spare], granite_dir, 2)  # hosts 0 and spare serve group 0
    dispatcher = connect(expert_map, lane)
    expected = run(make_engine(granite_dir, dispatcher=connect(expert_map, lane)), REQUESTS)
    engine = make_engine(granite_dir, dispatcher=dispatcher)
    ray.kill(spare.handle)
    results = run(engine, REQUESTS)
    assert {k: r.token_ids for k, r in results.items()} == {k: r.token_ids for k, r in expected.items()}


def test_without_a_replica_the_front_computes_from_the_checkpoint(hosts: list[ExpertHost], granite_dir: Path) -> None:
    expert_map = place(hosts, granite_dir, 2)
    expected = run(make_engine(granite_dir, dispatcher=connect(expert_map)), REQUESTS)
    lonely = expert_map.with_replicas(expert_map.replicas_of(0))
    fallback = CheckpointExperts(Weights(Checkpoint.open(granite_dir), Compute.choose("cpu", "float32")))
    dispatcher = connect(lonely)
    with pytest.raises(AssertionError, match="no replica of expert group 1 answers"):
        run(make_engine(granite_dir, dispatcher=dispatcher), REQUESTS)
    dispatcher._fallback = fallback.run
    results = run(make_engine(granite_dir, dispatcher=dispatcher), REQUESTS)
    assert {k: r.token_ids for k, r in results.items()} == {k: r.token_ids for k, r in expected.items()}


def test_int8_experts_are_the_same_bits_in_replicas_and_in_the_front(
    hosts: list[ExpertHost], granite_dir: Path
) -> None:
    expert_map = place(hosts, granite_dir, 2, "bfloat16", "int8")
    checkpoint = Checkpoint.open(granite_dir)
    spec = checkpoint.spec
    x_TD = torch.randn(7, spec.hidden_size).bfloat16()
    ids_TK = torch.stack([torch.randperm(spec.num_experts)[: spec.top_k] for _ in x_TD])
    gates_TK = torch.rand(ids_TK.shape).bfloat16()
    lonely = connect(expert_map.with_replicas(expert_map.replicas_of(0)))

    def compute_here(expert_dtype: ExpertDtype) -> None:
        compute = Compute.choose("cpu", "bfloat16", "auto", expert_dtype)
        lonely._fallback = CheckpointExperts(Weights(checkpoint, compute)).run

    def answer(dispatcher: RemoteDispatcher) -> torch.Tensor:
        return dispatcher.combine(dispatcher.dispatch(0, x_TD, ids_TK, gates_TK))

    by_replicas = answer(connect(expert_map))
    compute_here("int8")
    assert answer(lonely).equal(by_replicas)
    compute_here("auto")
    assert not answer(lonely).equal(by_replicas), "int8 is not bfloat16"
