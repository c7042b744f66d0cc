"""Fronts and expert replicas as the supervisor sees them: states, restarts and their pauses. Plain data, no calls."""

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable

from cluster.actor_id import ActorId, slot_of
from cluster.control.actors import Handle
from cluster.control.clock import now
from cluster.expert_map import ReplicaAddress
from cluster.messages.actors import ActorKind, ActorReport, FrontSpec, Legacy, LoadProgress, ReadyReport, ReplicaSpec
from cluster.messages.state import ActorInfo, ActorState

# Pause before a restart: it doubles while an actor keeps dying, and starts anew once one has lived long enough.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0
STABLE_S = 60.0


@dataclasses.dataclass(slots=True)
class Member:
    """`since` is Unix time, for people. All else is on `clock`."""

    spec: FrontSpec | ReplicaSpec
    kind: ActorKind
    clock: Callable[[], float] = now
    handle: Handle = None
    state: ActorState = "starting"
    since: float = 0.0
    detail: str = ""
    progress: LoadProgress = dataclasses.field(default_factory=LoadProgress)
    ready: ReadyReport | None = None
    report: ActorReport | None = None
    num_restarts: int = 0
    restart_at: float | None = None
    silent_since: float | None = None
    told_at: float = -math.inf  # when a front was last handed the expert map
    told: Legacy | None = None  # what it has then taken
    map_version: int = 0  # of the map that it has then taken
    telling: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)  # what it is told must not be overtaken
    speaks_from: float = -math.inf  # when a replica may be asked for the reports of others on its node
    work: asyncio.Task[None] | None = None  # what is bringing it up or draining it
    _pause: float = FIRST_PAUSE_S
    _entered: float = 0.0  # when it entered its state

    def __post_init__(self) -> None:
        self.enter(self.state, self.detail)

    @property
    def slot(self) -> str:
        return slot_of(self.spec.actor_id)

    @property
    def group(self) -> int | None:
        return self.spec.group if isinstance(self.spec, ReplicaSpec) else None

    @property
    def is_unknown(self) -> bool:
        """True for a live actor that has not told a new supervisor who it is."""
        return self.state == "starting" and self.handle is not None and self.ready is None

    @property
    def is_leaving(self) -> bool:
        """True for one that drains, and for one that has died while it did."""
        return self.state == "draining" or (self.state == "dead" and self.restart_at is None)

    @property
    def address(self) -> ReplicaAddress | None:
        """How fronts reach a replica that is ready."""
        if self.state != "ready" or self.ready is None:
            return None
        name = self.spec.actor_id
        return ReplicaAddress(name, self.group or 0, (("object_ref", name), *self.ready.endpoints))

    def enter(self, state: ActorState, detail: str = "") -> None:
        self.state, self.detail = state, detail
        self.since, self._entered = time.time(), self.clock()

    def become_ready(self, ready: ReadyReport) -> None:
        self.ready = ready
        self.progress = LoadProgress(ready.weight_bytes, ready.weight_bytes)
        self.enter("ready")

    def bury(self, why: str) -> None:
        """The actor is dead: plan the next one for this slot."""
        lived = self.clock() - self._entered if self.state == "ready" else 0.0
        self._pause = FIRST_PAUSE_S if lived >= STABLE_S else self._pause
        self.restart_at = self.clock() + self._pause
        self.enter("dead", f"{why}; restart {self.num_restarts + 1} in {self._pause:.1f} s")
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        self.report, self.handle = None, None

    @property
    def is_lost(self) -> bool:
        """True until the successor of an actor that died is ready, and for one of a predecessor that lacks experts. A
        new member that still loads is not lost.
        """
        lacks_experts = self.state == "starting" and self.ready is not None
        return (
            self.state == "dead" or lacks_experts or (self.num_restarts > 0 and self.state in ("starting", "loading"))
        )

    def hear(self, report: ActorReport | None) -> float:
        """Take in a report, or that none came; returns for how many seconds none has come."""
        if report:
            self.report, self.silent_since = report, None
            return 0.0
        if self.silent_since is None:
            self.silent_since = self.clock()
        return self.clock() - self.silent_since

    def held(self, layer: int) -> tuple[int, ...]:
        assert isinstance(self.spec, ReplicaSpec)
        return self.spec.experts[layer]

    def hold(self, layer: int, experts: tuple[int, ...]) -> None:
        """Note that the replica now holds these experts of a layer."""
        assert isinstance(self.spec, ReplicaSpec)
        held = self.spec.experts
        self.spec = dataclasses.replace(self.spec, experts=(*held[:layer], experts, *held[layer + 1 :]))

    @property
    def is_due(self) -> bool:
        return self.state == "dead" and self.restart_at is not None and self.restart_at <= self.clock()

    def renew(self) -> None:
        """A new actor for the slot is about to be started, under a name of its own."""
        self.num_restarts += 1
        name = dataclasses.replace(ActorId.parse(self.slot), restart=self.num_restarts)
        self.spec = dataclasses.replace(self.spec, actor_id=str(name))
        self.restart_at, self.silent_since = None, None
        self.ready, self.progress = None, LoadProgress()
        self.told, self.map_version = None, 0
        self.enter("starting", f"restart {self.num_restarts}")

    def info(self, lane: str, map_version: int) -> ActorInfo:
        """The member's row in GET /v1/cluster."""
        ready, report = self.ready, self.report
        return ActorInfo(
            id=self.spec.actor_id,
            kind=self.kind,
            group=self.group,
            node=ready.node if ready else "",
            pid=ready.pid if ready else 0,
            gpu=ready.gpu if ready else "",
            state=self.state,
            lane=lane,
            map_version=report.map_version if report and self.kind == "front" else map_version,
            tokens=report.tokens if report else 0,
            since=self.since,
            detail=self.detail,
            weight_bytes=ready.weight_bytes if ready else 0,
        )
