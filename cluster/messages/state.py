"""What the supervisor tells of the cluster: to ingresses, and through them to people."""

from dataclasses import dataclass, field
from typing import Literal

from cluster.expert_map import Homes
from cluster.messages.actors import ActorKind, LoadProgress, Wanted

ActorState = Literal["starting", "loading", "ready", "draining", "dead"]
State = Literal["starting", "ready", "degraded", "recovering", "failed", "stopping"]


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


@dataclass(frozen=True, slots=True)
class ExpertsReport:
    """Load and placement of experts, for GET /v1/experts. Counts are [layer][expert]: since the start, and those of
    the last `window_seconds`, by which balance is judged.
    """

    counts: tuple[tuple[int, ...], ...]
    recent_counts: tuple[tuple[int, ...], ...]
    window_seconds: float
    balancedness: float
    map_version: int
    placement: Homes


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What an ingress needs to know of the cluster, published by the supervisor. `draining` fronts finish what they
    have and take nothing new; so does a front of which a new supervisor does not know yet whether it is well.
    """

    state: State
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

    @property
    def is_up(self) -> bool:
        """True if all is as configured, but for members that are being replaced; a front is there."""
        return self.state in ("ready", "degraded")

    @property
    def is_serving(self) -> bool:
        """True if requests are taken. While it recovers, there may be no front for the moment, or the supervisor may
        not know yet which there are: they wait.
        """
        return self.is_up or self.state == "recovering"
