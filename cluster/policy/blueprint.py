"""What to start: configuration, model and machine turned into the specs of fronts and expert replicas. Pure."""

from dataclasses import dataclass

from cluster.actor_id import ActorId
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.expert_map import ExpertMap, contiguous_homes
from cluster.messages.actors import (
    EngineOptions,
    FrontSpec,
    LaneKeys,
    LogOptions,
    Machine,
    ReplicaSpec,
    ResourcePlan,
    Wanted,
)
from cluster.models.checkpoint import Checkpoint
from cluster.models.spec import ModelSpec
from cluster.policy.resources import plan_resources

GIB = 2**30
# Flash attention over block tables wants pages of 256 tokens; smaller blocks find more equal prefixes.
CPU_BLOCK, GPU_BLOCK = 16, 256


@dataclass(frozen=True, slots=True)
class Blueprint:
    """`expert_map` is version 0: homes without replicas. `slots_per_layer` are places for experts in all groups."""

    resources: ResourcePlan
    engine: EngineOptions
    lane: str
    lane_keys: LaneKeys | None
    logs: LogOptions
    expert_map: ExpertMap
    wanted: Wanted
    slots_per_layer: int
    bytes_per_expert: int

    def front(self, index: int) -> FrontSpec:
        return FrontSpec(str(ActorId(None, index)), self.engine, self.lane, self.lane_keys, self.logs, self.resources)

    def replica(self, group: int, index: int, expert_map: ExpertMap) -> ReplicaSpec:
        """A replica that holds what the map has at home in its group."""
        return ReplicaSpec(
            actor_id=str(ActorId(group, index)),
            group=group,
            model_path=self.engine.model_path,
            device=self.resources.replica_device,
            dtype=self.engine.dtype,
            experts=expert_map.experts_of(group),
            num_threads=self.resources.threads_per_replica,
            lane_keys=self.lane_keys,
            logs=self.logs,
            kernels=self.engine.kernels,
            expert_dtype=self.engine.expert_dtype,
            resources=self.resources,
            lane=self.lane,
            native_threads=self.resources.native_threads_per_replica,
        )


def recall_blueprint(spec: FrontSpec, expert_map: ExpertMap, wanted: Wanted) -> Blueprint:
    """What a live front knows of the blueprint that it was started by: all but the size of an expert and the room for
    redundant ones. Enough to watch by; to start or move anything takes one that is drawn.
    """
    num_experts = len(expert_map.homes[0])
    return Blueprint(
        spec.resources, spec.engine, spec.lane, spec.lane_keys, spec.logs, expert_map, wanted, num_experts, 0
    )


def check_config(config: ClusterConfig, spec: ModelSpec) -> ExpertMap:
    """The initial map. Raises ConfigError where settings and model don't fit."""
    max_model_len(config, spec)
    return ExpertMap(0, config.groups, contiguous_homes(spec.num_expert_layers, spec.num_experts, config.groups))


def max_model_len(config: ClusterConfig, spec: ModelSpec) -> int:
    longest = spec.max_context
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is more than the model's context of {longest} tokens "
            f"(max_position_embeddings, rope scaling): choose {longest} or less"
        )
    return config.max_model_len or longest


def served_dtype(config: ClusterConfig, checkpoint: Checkpoint) -> str:
    """What the operator says, or config.json, or the files; float16 is served as bfloat16, which has its range."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if (checkpoint.spec.dtype or checkpoint.dtype) == "float32" else "bfloat16"


def check_expert_dtype(config: ClusterConfig, dtype: str, device: str) -> None:
    """Raises ConfigError where int8 experts can't be computed. `device` is the one that experts are computed on, as
    planned: an actor whose device stays auto has a GPU.
    """
    if config.expert_dtype == "int8" and device != "cpu":
        raise ConfigError("expert_dtype='int8' is computed on CPUs only: choose auto, or replica_device cpu")
    if config.expert_dtype == "int8" and dtype == "float32":
        raise ConfigError(
            "expert_dtype='int8' wants the rest in bfloat16, and this is served in float32: set dtype bfloat16"
        )


def device_of_experts(config: ClusterConfig) -> str:
    """Of replicas; on the local lane a front has them."""
    return config.device_of("front" if config.lane == "local" else "expert")


def draw_blueprint(
    config: ClusterConfig,
    checkpoint: Checkpoint,
    model_path: str,
    machine: Machine,
    lane_keys: LaneKeys | None = None,
) -> Blueprint:
    """`model_path` is what actors of all nodes are told: the checkpoint may be a copy of it. `lane_keys` open the zmq
    lane; the other lanes need none. Raises ConfigError.
    """
    expert_map = check_config(config, checkpoint.spec)
    resources = plan_resources(config, machine)
    dtype = served_dtype(config, checkpoint)
    check_expert_dtype(config, dtype, resources.front_device if config.lane == "local" else resources.replica_device)
    num_replicas = 0 if config.lane == "local" else config.replicas
    return Blueprint(
        resources=resources,
        engine=_engine_options(config, checkpoint.spec, resources, model_path, dtype),
        lane=config.lane,
        lane_keys=lane_keys,
        logs=LogOptions(config.log_format, config.log_level),
        expert_map=expert_map,
        wanted=Wanted(config.fronts, (num_replicas,) * config.groups),
        slots_per_layer=checkpoint.spec.num_experts + config.redundant_experts,
        bytes_per_expert=checkpoint.bytes_per_expert,
    )


def _engine_options(
    config: ClusterConfig, spec: ModelSpec, resources: ResourcePlan, model_path: str, dtype: str
) -> EngineOptions:
    front, replica = resources.front_device, resources.replica_device
    return EngineOptions(
        model_path=model_path,
        device=front,
        # What a front computes in a replica's place must be what the replica would have computed.
        expert_device="cpu" if replica == "cpu" and config.lane != "local" else front,
        dtype=dtype,
        max_model_len=max_model_len(config, spec),
        block_size=config.block_size or (CPU_BLOCK if front == "cpu" else GPU_BLOCK),
        kv_cache_bytes=None if config.kv_cache_gib is None else int(config.kv_cache_gib * GIB),
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_num_waiting=config.max_num_waiting,
        enable_prefix_caching=config.enable_prefix_caching,
        kernels=config.kernels,
        expert_dtype=config.expert_dtype,
        cuda_graphs=config.cuda_graphs,
        num_threads=resources.threads_per_front,
    )
