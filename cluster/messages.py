"""Everything that crosses a process boundary, as frozen dataclasses.

Knows no Ray, no torch and no HTTP. Token ids are plain ints, times are seconds, sizes are bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.logs import Format, Level

OverlapMode = Literal["auto", "always", "never"]
KernelChoice = Literal["auto", "native", "torch"]
ExpertDtype = Literal["auto", "int8"]

FinishReason = Literal["stop", "length", "abort", "error"]
ActorKind = Literal["front", "expert"]
ActorState = Literal["starting", "loading", "ready", "draining", "dead"]

# Actors of a Serve application live in a namespace of their own: this and the application's name.
NAMESPACE_PREFIX = "outcrop-"

# One published sample of a metric: (name, sorted label pairs, value).
Sample = tuple[str, tuple[tuple[str, str], ...], float]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is continued. Every field has been validated at the ingress.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and penalties 0 (repetition: 1) switch a rule off.
    `stop_token_ids` ends the sequence; it already holds the model's end-of-sequence ids unless the request
    said ignore_eos. They can't be sampled before `min_tokens` tokens. `logprobs` is the number of
    alternatives reported per token (0: the token itself only); None reports nothing.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_routed_experts: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to continue, as it is offered to one front.

    `request_id` is the ingress's own, another one for each offer, and never parsed; `label` is what people call the
    request, for log lines, and may be anything a client chose. Outputs go to the mailbox of `lease`.
    `output_token_ids` are tokens that an earlier front has already emitted; `attempt` counts the fronts that have lost
    the sequence. Outputs of a traced request carry a Timing.
    """

    request_id: str
    lease: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    is_traced: bool = False
    label: str = ""
    attempt: int = 0

    @property
    def is_replay(self) -> bool:
        return self.attempt > 0 or bool(self.output_token_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the model's own distribution, before penalties and temperature.

    `rank` counts from 1 (the most likely token). `top` lists the most likely (token id, logprob), best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """Which experts computed tokens of a sequence: uint8 or int16 numbers in C order, shape (tokens, layers, top_k).

    `first` is the position of the first of these tokens.
    """

    shape: tuple[int, int, int]
    dtype: str
    data: bytes
    first: int = 0

    @classmethod
    def joined(cls, pieces: "Sequence[RoutedExperts]") -> "RoutedExperts":
        """The sequence from its start; what a later piece repeats, as after a replay, counts once."""
        _, num_layers, top_k = pieces[0].shape
        row = len(pieces[0].data) // pieces[0].shape[0]
        data = bytearray()
        for piece in pieces:
            data[piece.first * row :] = piece.data
        return cls((len(data) // row, num_layers, top_k), pieces[0].dtype, bytes(data))


@dataclass(frozen=True, slots=True)
class Timing:
    """What a sequence has taken since its last output, or since its first step. Durations alone: hosts' clocks differ.

    Steps, and so what their experts cost (Step in actors/lanes/dispatcher.py), are shared with all of the batch.
    Only the first output of a front has `queue_seconds`, from the request's arrival to its first step.
    """

    seconds: float
    num_steps: int
    expert_wait_seconds: float
    expert_compute_seconds: float
    num_failovers: int
    num_local_tokens: int
    queue_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a step added to one sequence. Prompt log-probabilities come with the first output of a request; on their way
    those of a long prompt come in parts, which hold nothing else, before it.

    `routed_experts` are those of the tokens computed since the last output: the ingress may end a sequence at any.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    routed_experts: RoutedExperts | None = None
    error: str | None = None
    timing: Timing | None = None
    is_part: bool = False

    @property
    def num_logprobs(self) -> int:
        """Of tokens and their alternatives; all tokens have as many."""
        kinds = (self.prompt_logprobs or (), self.logprobs)
        return sum(len(scores) * (1 + len(scores[-1].top if scores[-1] else ())) for scores in kinds if scores)


@dataclass(frozen=True, slots=True)
class Delivery:
    """Outputs for one ingress, in order. The first has the number `first`; numbers count up from 1 within a lease."""

    first: int
    outputs: tuple[RequestOutput, ...] = ()


@dataclass(frozen=True, slots=True)
class Submitted:
    """A front's answer to a request: accepted, or why not ("full": ask again later; "dropped": the lease has ended)."""

    accepted: bool
    reason: Literal["", "full", "draining", "dropped"] = ""
    num_waiting: int = 0


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a front needs to run the engine, resolved from ClusterConfig."""

    model_path: str
    device: str
    dtype: str
    max_model_len: int
    block_size: int
    kv_cache_bytes: int | None
    gpu_memory_utilization: float
    max_num_batched_tokens: int | None
    max_num_seqs: int
    max_num_waiting: int
    enable_prefix_caching: bool
    overlap: OverlapMode
    kernels: KernelChoice
    expert_dtype: ExpertDtype
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
    """What each actor gets of a machine. `device` may stay "auto": then an actor takes its GPU if torch can use it."""

    machine: Machine = Machine()
    device: str = "auto"
    cpus_per_front: float = 1.0
    cpus_per_replica: float = 1.0
    gpus_per_front: float = 0.0
    gpus_per_replica: float = 0.0
    threads_per_front: int = 1
    threads_per_replica: int = 1
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
class ActorInfo:
    """One row of GET /v1/cluster. `since` is the Unix time at which the actor entered `state`."""

    id: str
    kind: ActorKind
    group: int | None
    node: str
    pid: int
    gpu: str
    state: ActorState
    lane: str
    map_version: int
    tokens: int
    since: float
    detail: str = ""
    weight_bytes: int = 0


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
    expert_counts: tuple[tuple[int, ...], ...] = ()
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
class RebalanceReport:
    """What a rebalance has done, or would do. `reason` says why nothing is changed, `error` what went wrong."""

    is_dry_run: bool
    balancedness_before: float = 1.0
    balancedness_after: float = 1.0
    layers: int = 0
    experts_moved: int = 0
    bytes_to_move: int = 0
    reason: str = ""
    error: str = ""
    map_version: int = 0
    seconds: float = 0.0


class NotRunning(RuntimeError):  # noqa: N818 - it will be
    """The supervisor can't do that now; the message says why."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What an ingress needs to know of the cluster, published by the supervisor. `draining` fronts finish what they
    have and take nothing new; so does a front of which a new supervisor does not know yet whether it is well.
    """

    state: Literal["starting", "ready", "degraded", "recovering", "failed", "stopping"]
    phase: str
    namespace: str
    map_version: int = 0
    fronts: tuple[str, ...] = ()
    draining: tuple[str, ...] = ()
    actors: tuple[ActorInfo, ...] = ()
    progress: LoadProgress = field(default_factory=LoadProgress)
    error: str | None = None
    started: float = 0.0
    kv_cache_tokens: int = 0
    max_model_len: int = 0
    wanted: Wanted | None = None
