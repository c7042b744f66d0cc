"""Models, engines and replicas for the checks: random checkpoints in, tokens out, all in this process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from actors.compute import Compute
from actors.dispatch.dispatcher import Dispatcher
from actors.dispatch.local import LocalDispatcher
from actors.dispatch.remote import RemoteDispatcher
from actors.engine.engine import Engine
from actors.engine.kv_cache import BlockAllocator
from actors.engine.scheduler import Scheduler
from actors.experts.fallback import CheckpointExperts
from actors.experts.loading import load_experts, read_layer_experts
from actors.experts.store import ExpertStore
from actors.lanes.lane import Lane, LaneError
from actors.model.graphs import Captures, DecodeGraphs, cuda_capture
from actors.model.loading import load_front
from actors.model.paged_kv import PagedKV
from actors.replica.replica import Replica
from actors.staging import Staging, staging_for
from actors.weights import Weights
from benchmarks.gpu_check.check import Checkpoints
from benchmarks.make_checkpoint import SHAPES, make_checkpoint
from cluster.expert_map import ExpertMap, ReplicaAddress, contiguous_homes
from cluster.messages.actors import ReplicaSpec
from cluster.messages.requests import GenerationRequest, RequestOutput, SamplingParams
from cluster.metrics import Metrics
from cluster.models.checkpoint import Checkpoint

# Heads as wide as those of 1b-a400m, everything else small. In the second one every expert is chosen.
SMALL, ALL_EXPERTS = "gpu-check", "gpu-check-all-experts"
SHAPES[SMALL] = SHAPES["1b-a400m"] | {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
SHAPES[ALL_EXPERTS] = SHAPES[SMALL] | {"num_local_experts": 4, "num_experts_per_tok": 4}

MakeStaging = Callable[[Any], Staging]


def checkpoints_in(directory: Path) -> Checkpoints:
    @cache
    def checkpoint(shape: str, layers: int) -> Checkpoint:
        out = directory / f"{shape}-{layers}"
        make_checkpoint(shape, out, layers)
        return Checkpoint.open(out)

    return checkpoint


@dataclass
class InProcess(Lane):
    """Replicas that answer when they are asked; those that are dead can't be reached."""

    replicas: dict[str, Replica]
    dead: set[str] = field(default_factory=set)
    num_sent: int = 0
    name = "in-process"

    def connect(self, replicas: Any) -> None: ...

    def send(self, replica: ReplicaAddress, message: bytes) -> Any:
        if replica.replica_id in self.dead:
            raise LaneError("dead")
        self.num_sent += 1
        return replica.replica_id, message

    def receive(self, tickets: Sequence[Any], timeout_s: float) -> Any:
        name, message = tickets[0]
        return tickets[0], self.replicas[name].answer(message)

    def forget(self, ticket: Any) -> None: ...

    def probe(self, replica: ReplicaAddress) -> Any: ...

    def is_alive(self, ticket: Any) -> bool:
        return False


def remote(
    checkpoint: Checkpoint,
    front: Compute,
    experts: Compute,
    groups: int,
    staging: Staging | None = None,
    replica_staging: MakeStaging = staging_for,
) -> tuple[RemoteDispatcher, InProcess]:
    """A dispatcher to one replica for each group, and the lane between them."""
    spec = checkpoint.spec
    addresses = tuple(ReplicaAddress(f"expert-g{group}-r0", group, ()) for group in range(groups))
    expert_map = ExpertMap(0, groups, contiguous_homes(spec.num_expert_layers, spec.num_experts, groups))
    expert_map = expert_map.with_replicas(addresses)
    weights, replicas = Weights(checkpoint, experts), {}
    for address in addresses:
        held = expert_map.experts_of(address.group)
        replica_spec = ReplicaSpec(address.replica_id, address.group, "", experts.device.type, "", held, 1)
        store = load_experts(weights, held)
        store = ExpertStore(spec, tuple(store.layers), experts, replica_staging(experts.device))
        replicas[address.replica_id] = Replica(
            replica_spec, store, lambda layer, ids: read_layer_experts(weights, layer, ids), Metrics()
        )
        replicas[address.replica_id].warm_up()
    lane, fallback = InProcess(replicas), CheckpointExperts(weights)
    dispatcher = RemoteDispatcher(lane, Metrics(), fallback.run, staging or staging_for(front.device))
    dispatcher.set_map(expert_map)
    return dispatcher, lane


def local(checkpoint: Checkpoint, compute: Compute) -> LocalDispatcher:
    return LocalDispatcher(load_experts(Weights(checkpoint, compute), checkpoint.all_experts))


def make_engine(
    checkpoint: Checkpoint,
    compute: Compute,
    dispatcher: Dispatcher,
    *,
    num_tokens: int = 8192,
    budget: int | None = 512,
    prefix_caching: bool = False,
    staging: Staging | None = None,
    graphs: bool = False,
) -> Engine:
    """With pages of 256 tokens where flash attention wants them, and a KV cache of `num_tokens`. Graphs are captured by
    warm_up().
    """
    size, max_num_seqs = (256 if compute.attention == "flash" else 16), (64 if graphs else 256)
    max_model_len = min(checkpoint.spec.max_context, num_tokens)
    scheduler = Scheduler(
        BlockAllocator(num_tokens // size, size, prefix_caching),
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )
    kv = PagedKV(checkpoint.spec, num_tokens // size + graphs, size, compute)
    model = load_front(Weights(checkpoint, compute), staging)
    if graphs:
        model.graphs = DecodeGraphs(
            Captures(checkpoint.spec, compute, model.torch_layers, kv, max_model_len, cuda_capture())
        )
    return Engine(model, kv, dispatcher, scheduler, Metrics())


def prompts(number: int, length: int, vocab_size: int = 1000) -> list[tuple[int, ...]]:
    """Each with another beginning and another length; the same ones on every machine."""
    return [tuple((11 * i + 5 * j + i * i) % vocab_size for i in range(length + 7 * j)) for j in range(number)]


def generate(
    engine: Engine, asked: Sequence[Sequence[int]], params: SamplingParams, name: str = ""
) -> list[list[RequestOutput]]:
    """The outputs of each prompt, all of them running at once. Raises RuntimeError where one ends with an error."""
    outputs: dict[str, list[RequestOutput]] = {f"{name}{number}": [] for number in range(len(asked))}
    for request_id, prompt in zip(outputs, asked, strict=True):
        engine.add(GenerationRequest(request_id, "", tuple(prompt), params))
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            outputs[output.request_id].append(output)
        engine.check_integrity()
    return list(outputs.values())


def tokens_of(outputs: list[list[RequestOutput]]) -> list[list[int]]:
    return [[token for output in each for token in output.token_ids] for each in outputs]
