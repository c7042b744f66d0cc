"""The native way of dispatches against the same dispatches in Python: replicas in threads, real sockets, real kernels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.compute import Compute
from actors.dispatch.dispatcher import Dispatcher
from actors.dispatch.express import ExpressDispatcher
from actors.dispatch.local import LocalDispatcher
from actors.dispatch.remote import RemoteDispatcher
from actors.experts.fallback import CheckpointExperts
from actors.experts.loading import load_experts, read_layer_experts
from actors.experts.store import ExpertStore
from actors.kernels import native
from actors.lanes.unix_client import UnixLane
from actors.lanes.unix_server import UnixServer
from actors.replica.replica import Replica
from actors.weights import Weights
from cluster.expert_map import ExpertMap, ReplicaAddress, contiguous_homes
from cluster.messages.actors import ReplicaSpec
from cluster.messages.requests import SamplingParams
from cluster.metrics import Metrics
from cluster.models.checkpoint import Checkpoint
from tests.checkpoints import MODELS, write_checkpoint
from tests.engines import make_engine, run

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="no native kernels here: not built, or no AVX2")

DTYPES = ("float32", "bfloat16")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
REQUESTS = {str(n): ([(11 * i + 5 * n) % 250 for i in range(length)], GREEDY) for n, length in enumerate((6, 19, 1))}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("model"))


@dataclass
class Group:
    """Replicas of one group in threads of this process."""

    name: str
    replica: Replica
    server: UnixServer
    address: ReplicaAddress


@dataclass
class Groups:
    """Replicas by model, group and number; all end with the test."""

    model_dir: Path
    dtype: str
    running: list[Group] = field(default_factory=list)

    @property
    def weights(self) -> Weights:
        return Weights(Checkpoint.open(self.model_dir), Compute.choose("cpu", self.dtype))

    def start(self, num_groups: int, num_replicas: int = 1, *, is_native: bool = True) -> ExpertMap:
        spec = self.weights.spec
        expert_map = ExpertMap(0, num_groups, contiguous_homes(spec.num_layers, spec.num_experts, num_groups))
        here = [self._one(expert_map, g, r, is_native) for g in range(num_groups) for r in range(num_replicas)]
        self.running += here
        return expert_map.with_replicas(tuple(one.address for one in here))

    def _one(self, expert_map: ExpertMap, group: int, number: int, is_native: bool) -> Group:
        name, weights = f"expert-g{group}-r{number}", self.weights
        held = expert_map.experts_of(group)
        spec = ReplicaSpec(name, group, str(self.model_dir), "cpu", self.dtype, held, 1)
        read = lambda layer, ids: read_layer_experts(weights, layer, ids)  # noqa: E731
        replica = Replica(spec, load_experts(weights, held), read, Metrics())
        server = UnixServer(name, replica.answer_batch, "/tmp", replica.serving if is_native else None)
        return Group(name, replica, server, ReplicaAddress(name, group, server.start()))

    def local(self) -> ExpertStore:
        weights = self.weights
        return load_experts(weights, weights.checkpoint.all_experts)

    def fallback(self) -> CheckpointExperts:
        return CheckpointExperts(self.weights)


@pytest.fixture(params=DTYPES)
def groups(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Groups]:
    groups = Groups(model_dir, request.param)
    yield groups
    for one in groups.running:
        one.server.stop()


Connect = Callable[..., RemoteDispatcher]


@pytest.fixture
def connect() -> Iterator[Connect]:
    made: list[RemoteDispatcher] = []

    def make(
        expert_map: ExpertMap, kind: type[RemoteDispatcher] = ExpressDispatcher, **options: object
    ) -> RemoteDispatcher:
        made.append(kind(UnixLane(), Metrics(), **options))
        made[-1].set_map(expert_map)
        return made[-1]

    yield make
    for dispatcher in made:
        dispatcher.lane.close()


def tokens(model_dir: Path, dtype: str, dispatcher: Dispatcher) -> list[list[int]]:
    results = run(make_engine(model_dir, dispatcher=dispatcher, budget=16, dtype=dtype), REQUESTS)
    return [result.token_ids for result in results.values()]


def message(groups: Groups, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    spec, generator = groups.weights.spec, torch.Generator().manual_seed(seed)
    dtype = groups.weights.compute.dtype
    x_TD = torch.randn(num_tokens, spec.hidden_size, generator=generator).to(dtype)
    order = torch.rand(num_tokens, spec.num_experts, generator=generator).argsort(1)
    return x_TD, order[:, : spec.top_k].contiguous(), torch.rand(num_tokens, spec.top_k, generator=generator).to(dtype)


def went_native(dispatcher: RemoteDispatcher) -> bool:
    return isinstance(dispatcher, ExpressDispatcher) and dispatcher._native is not None


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("is_native", [True, False], ids=["native replica", "replica in Python"])
def test_partial_sums_are_the_same_bits_with_and_without_the_native_way(
    groups: Groups, connect: Connect, num_groups: int, is_native: bool
) -> None:
    expert_map = groups.start(num_groups, is_native=is_native)
    express, plain = connect(expert_map), connect(expert_map, RemoteDispatcher)
    for num_tokens in (1, 2, 7, 200):
        for layer in range(groups.weights.spec.num_layers):
            routed = message(groups, num_tokens, layer)
            assert torch.equal(express.exchange(layer, *routed), plain.exchange(layer, *routed))
    assert went_native(express)
    assert express.step.compute_seconds > 0
    for one in groups.running:
        assert one.replica.num_tokens > 0


def test_tokens_are_those_of_all_experts_in_one_process(groups: Groups, connect: Connect) -> None:
    expected = tokens(groups.model_dir, groups.dtype, LocalDispatcher(groups.local()))
    expert_map = groups.start(1)
    express = connect(expert_map)
    assert tokens(groups.model_dir, groups.dtype, express) == expected
    assert went_native(express)
    if groups.dtype == "float32":  # with bfloat16 partial sums are rounded once per group
        assert tokens(groups.model_dir, groups.dtype, connect(groups.start(2))) == expected


def test_a_whole_step_counts_and_routes_as_layers_one_by_one(groups: Groups, connect: Connect) -> None:
    expert_map = groups.start(2)
    engines = [
        make_engine(groups.model_dir, dispatcher=connect(expert_map, kind), budget=16, dtype=groups.dtype)
        for kind in (ExpressDispatcher, RemoteDispatcher)
    ]
    params = SamplingParams(max_tokens=8, temperature=0.0, return_routed_experts=True)
    results = [run(engine, {"a": ([5, 6, 7, 8, 9], params)})["a"] for engine in engines]
    assert results[0].token_ids == results[1].token_ids
    routed = [b"".join(o.routed_experts.data for o in r.outputs if o.routed_experts) for r in results]
    assert routed[0] == routed[1]
    assert torch.equal(engines[0].expert_counts, engines[1].expert_counts)
    assert int(engines[0].expert_counts.sum()) > 0


def samples(metrics: Metrics, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    return {labels: value for sample, labels, value in metrics.samples() if sample == f"outcrop_{name}"}


def test_metrics_are_the_same_as_without(groups: Groups, connect: Connect) -> None:
    expert_map = groups.start(2)
    seen = []
    for kind in (ExpressDispatcher, RemoteDispatcher):
        dispatcher = connect(expert_map, kind)
        tokens(groups.model_dir, groups.dtype, dispatcher)
        dispatcher.publish_counters()
        bytes_ = samples(dispatcher.metrics, "lane_bytes_total")
        seen.append((bytes_, samples(dispatcher.metrics, "dispatch_seconds_count"), +dispatcher._num_sent))
    assert seen[0] == seen[1]
    for one in groups.running:
        one.replica.publish_counters()
        labels = (("group", str(one.replica.spec.group)), ("replica", one.name))
        assert samples(one.replica.metrics, "expert_tokens_total")[labels] == one.replica.num_tokens
        counted = samples(one.replica.metrics, "expert_compute_seconds_count")
        assert counted[(("group", str(one.replica.spec.group)),)] > 0
