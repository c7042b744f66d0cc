"""Fronts and expert replicas: what the supervisor starts them with, and what they tell it. Sizes are bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.expert_map import ExpertMap
from cluster.logs import Format, Level

KernelChoice = Literal["auto", "native", "torch"]


ExpertDtype = Literal["auto", "int8"]


ActorKind = Literal["front", "expert"]


# Actors of a Serve application live in a namespace of their own: this and the application's name.
NAMESPACE_PREFIX = "outcrop-"


# One published sample of a metric: (name, sorted label pairs, value).
Sample = tuple[str, tuple[tuple[str, str], ...], float]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a front needs to run the engine, resolved from ClusterConfig. `expert_device` is where it computes experts
    itself, when no replica answers, or all of them, on the local lane.
    """

    model_path: str
    device: str
    expert_device: str
    dtype: str
    max_model_len: int
    block_size: int
    kv_cache_bytes: int | None
    gpu_memory_utilization: float
    max_num_batched_tokens: int | None
    max_num_seqs: int
    max_num_waiting: int
    enable_prefix_caching: bool
    kernels: KernelChoice
    expert_dtype: ExpertDtype
    cuda_graphs: bool
    num_threads: int


@dataclass(frozen=True, slots=True)
class LogOptions:
    """As set_up_logs (cluster/logs.py) takes them."""

    style: Format = "text"
    level: Level = "info"


@dataclass(frozen=True, slots=True)
class LaneKeys:
    """CURVE key pairs (Z85) of one application: replicas prove the server's, fronts the client's."""

    server_public: bytes
    server_secret: bytes = field(repr=False)
    client_public: bytes
    client_secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Machine:
    """What Ray reports of the cluster."""

    cluster_cpus: float = 1.0
    cluster_gpus: float = 0.0
    largest_node_cpus: float = 1.0


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """What each actor gets of a machine. A device may stay "auto": then an actor takes its GPU if torch can use it.

    `native_threads_per_replica`: of a replica whose experts the native kernels compute.
    """

    machine: Machine = Machine()
    front_device: str = "auto"
    replica_device: str = "auto"
    cpus_per_front: float = 1.0
    cpus_per_replica: float = 1.0
    gpus_per_front: float = 0.0
    gpus_per_replica: float = 0.0
    threads_per_front: int = 1
    threads_per_replica: int = 1
    native_threads_per_replica: int = 1
    front_resources: Mapping[str, float] = field(default_factory=dict)
    replica_resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FrontSpec:
    """`resources`: by what the actor was started; a successor of the supervisor plans for the same machine."""

    actor_id: str
    engine: EngineOptions
    lane: str
    lane_keys: LaneKeys | None = None
    logs: LogOptions = LogOptions()
    resources: ResourcePlan = ResourcePlan()

    @property
    def model_path(self) -> str:
        return self.engine.model_path

    def fits(self, wanted: object) -> bool:
        """True if an actor with this spec can do the work of one with the other: names, keys and what Ray has reserved
        for it don't matter.
        """
        same = {"actor_id": self.actor_id, "lane_keys": self.lane_keys, "resources": self.resources}
        return isinstance(wanted, FrontSpec) and replace(wanted, **same) == self  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """An expert replica to start. `experts[layer]` are the global ids of the experts that it loads, ascending."""

    actor_id: str
    group: int
    model_path: str
    device: str
    dtype: str
    experts: tuple[tuple[int, ...], ...]
    num_threads: int
    lane_keys: LaneKeys | None = None
    logs: LogOptions = LogOptions()
    kernels: KernelChoice = "auto"
    expert_dtype: ExpertDtype = "auto"
    resources: ResourcePlan = ResourcePlan()
    lane: str = "auto"
    native_threads: int = 0  # where the native kernels compute; 0: num_threads

    def fits(self, wanted: object) -> bool:
        """As FrontSpec.fits. Experts don't matter either: an actor can be told to hold others."""
        same = {
            "actor_id": self.actor_id,
            "lane_keys": self.lane_keys,
            "resources": self.resources,
            "experts": self.experts,
        }
        return isinstance(wanted, ReplicaSpec) and replace(wanted, **same) == self  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far an actor is with its weights, in bytes."""

    loaded: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class ReadyReport:
    """What an actor says once it can serve. Fronts have a KV cache, expert replicas have lane endpoints."""

    actor_id: str
    node: str
    pid: int
    gpu: str
    weight_bytes: int
    load_seconds: float
    kv_cache_tokens: int = 0
    kv_cache_bytes: int = 0
    endpoints: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ActorReport:
    """What the supervisor reads from a live actor: counters only grow while the actor lives.

    `expert_counts[layer][expert]` are routed (token, choice) pairs; empty for expert replicas. `num_requests` are those
    that a front has not finished or whose outputs have not been acknowledged. `stuck_seconds`: since a front's engine
    has last ended a step, or looked for work; since the computation that runs in an expert replica has begun.
    """

    actor_id: str
    map_version: int
    tokens: int
    samples: tuple[Sample, ...] = ()
    expert_counts: Sequence[Sequence[int]] | NDArray[np.int64] = field(default=(), compare=False)
    lane: str = ""
    num_requests: int = 0
    stuck_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """How many fronts, and how many replicas of each group, the cluster is to have."""

    fronts: int
    replicas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Legacy:
    """What fronts keep for a successor of the supervisor: how many of each there should be, and what actors and
    ingresses that are gone have counted; without it the cluster's counters would fall.
    """

    wanted: Wanted
    counted: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class Identity:
    """What a live actor tells a new supervisor; `spec.experts` is what a replica holds. The rest is a front's."""

    spec: FrontSpec | ReplicaSpec
    ready: ReadyReport
    expert_map: ExpertMap | None = None
    legacy: Legacy | None = None
    is_draining: bool = False
