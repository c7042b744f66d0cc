"""Puts a front's parts together: weights, dispatcher and its lane, then KV cache and scheduler."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.compute import Compute, told_if_out_of_memory
from actors.dispatch.dispatcher import Dispatcher
from actors.dispatch.express import ExpressDispatcher
from actors.dispatch.local import LocalDispatcher
from actors.dispatch.remote import RemoteDispatcher
from actors.engine.engine import Engine
from actors.engine.kv_cache import BlockAllocator
from actors.engine.memory import num_kv_blocks
from actors.engine.scheduler import Scheduler
from actors.experts.fallback import CheckpointExperts
from actors.experts.loading import load_experts
from actors.kernels.native import instruction_sets
from actors.lanes.auto import AutoLane
from actors.lanes.lane import Lane
from actors.lanes.object_ref import ObjectRefLane
from actors.lanes.unix_client import UnixLane
from actors.lanes.zmq_client import ZmqLane
from actors.model.attention import why_not_flash
from actors.model.front_half import FrontHalf
from actors.model.graphs import Captures, DecodeGraphs, cuda_capture
from actors.model.loading import load_front
from actors.model.paged_kv import PagedKV
from actors.weights import Weights
from cluster.messages.actors import EngineOptions, FrontSpec, LoadProgress
from cluster.metrics import Metrics
from cluster.models.checkpoint import Checkpoint
from cluster.models.hub import local_copy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrontParts:
    """What is there once a front has loaded."""

    model: FrontHalf
    dispatcher: Dispatcher
    remote: RemoteDispatcher | None
    weight_bytes: int


class _Loading:
    """Adds up the bytes of front and, on the local lane, experts."""

    def __init__(self, total: int, report: Callable[[LoadProgress], None]) -> None:
        self.total, self.loaded, self.report = total, 0, report

    def __call__(self, num_bytes: int) -> None:
        self.loaded += num_bytes
        self.report(LoadProgress(self.loaded, self.total))


def load_parts(spec: FrontSpec, namespace: str, metrics: Metrics, report: Callable[[LoadProgress], None]) -> FrontParts:
    """Raises ConfigError or ModelError."""
    options = spec.engine
    checkpoint = Checkpoint.open(local_copy(options.model_path))
    compute = Compute.choose(options.device, options.dtype, options.kernels)
    of_experts = Compute.choose(options.expert_device, options.dtype, options.kernels, options.expert_dtype)
    is_local = spec.lane == "local"
    loading = _Loading(checkpoint.total_bytes if is_local else checkpoint.front_bytes, report)
    with told_if_out_of_memory("a front's share of the model", "give it more of a GPU: gpus_per_front"):
        model = load_front(Weights(checkpoint, compute, loading))
        if is_local:
            local = LocalDispatcher(load_experts(Weights(checkpoint, of_experts, loading), checkpoint.all_experts))
            return FrontParts(model, local, None, loading.total)
    fallback = CheckpointExperts(Weights(checkpoint, of_experts))
    has_native = options.kernels != "torch" and bool(instruction_sets())
    make = ExpressDispatcher if has_native else RemoteDispatcher
    remote = make(make_lane(spec, namespace), metrics, fallback.run, model.staging)
    return FrontParts(model, remote, remote, loading.total)


def build_engine(spec: FrontSpec, parts: FrontParts, metrics: Metrics, others: Sequence[int] = ()) -> Engine:
    """`others`: see num_kv_blocks. Raises ModelError if the KV cache can't hold one sequence of full length."""
    options, model = spec.engine, parts.model
    num_blocks = num_kv_blocks(options, model.spec, model.compute, others, spec.resources.gpus_per_front)
    if model.compute.attention == "flash" and (reason := why_not_flash(model.spec.head_dim, options.block_size)):
        logger.warning("attention gathers keys, which is slow: flash attention can't be used, as %s", reason)
    has_graphs = options.cuda_graphs
    if has_graphs and (reason := why_no_graphs(model.compute, model.spec.head_dim, options.block_size)):
        logger.warning("cuda_graphs: true has no effect: %s", reason)
        has_graphs = False
    with told_if_out_of_memory("the KV cache", "set kv_cache_gib, or lower gpu_memory_utilization"):
        # The padding of captured steps has a block of its own.
        kv = PagedKV(model.spec, num_blocks + has_graphs, options.block_size, model.compute)
    if has_graphs:
        captures = Captures(model.spec, model.compute, model.torch_layers, kv, options.max_model_len, cuda_capture())
        model.graphs = DecodeGraphs(captures)
    return Engine(model, kv, parts.dispatcher, make_scheduler(options, num_blocks), metrics, spec.actor_id)


def why_no_graphs(compute: Compute, head_dim: int, block_size: int) -> str:
    """Why decode steps can't be captured; empty if they can."""
    if compute.attention != "flash":
        return "only fronts on a GPU of capability 8.0 or more with dtype=bfloat16 have CUDA graphs"
    return why_not_flash(head_dim, block_size)


def make_lane(spec: FrontSpec, namespace: str) -> Lane:
    if spec.lane == "object_ref":
        return ObjectRefLane(namespace)
    if spec.lane == "unix":
        return UnixLane()
    assert spec.lane_keys is not None, "the supervisor hands out keys for the zmq lane"
    zmq = ZmqLane(spec.lane_keys)
    return zmq if spec.lane == "zmq" else AutoLane((UnixLane(), zmq), ObjectRefLane(namespace))


def make_scheduler(options: EngineOptions, num_blocks: int) -> Scheduler:
    return Scheduler(
        BlockAllocator(num_blocks, options.block_size, options.enable_prefix_caching),
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
    )
