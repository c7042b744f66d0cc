"""What the supervisor tells of the cluster: its state, and the metrics of all processes as one text."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

from cluster.control.fleet import Fleet
from cluster.messages.actors import LoadProgress, Sample
from cluster.messages.state import ActorState, ClusterState
from cluster.metrics import Metrics, cumulative, exposition, merge
from cluster.policy.expert_load import ExpertLoad

# An ingress pushes its samples each second. One that has been silent for this long does not come back.
INGRESS_GONE_S = 600.0


def describe(state: ClusterState, fleet: Fleet, lane: str) -> ClusterState:
    """`state` with all that the fleet knows. `lane` is shown until a front has said which it uses."""
    fronts, version = fleet.of_kind("front"), fleet.expert_map.version
    lane = next((m.report.lane for m in fronts if m.report), lane)
    progress = [m.progress for m in fleet.members]
    return replace(
        state,
        map_version=version,
        fronts=tuple(m.spec.actor_id for m in fronts if m.state == "ready"),
        draining=tuple(m.spec.actor_id for m in fronts if m.state == "draining" or m.is_unknown),
        actors=tuple(member.info(lane, version) for member in fleet.members),
        progress=LoadProgress(sum(p.loaded for p in progress), sum(p.total for p in progress)),
        kv_cache_tokens=sum(m.ready.kv_cache_tokens for m in fleet.members if m.ready),
        max_model_len=fleet.blueprint.engine.max_model_len,
        wanted=fleet.wanted,
    )


class Reports:
    """Keeps the newest samples of each ingress; actors' samples come with their reports."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.metrics = metrics
        self.clock = clock
        self._ingress: dict[str, tuple[float, tuple[Sample, ...]]] = {}
        self._gone: tuple[Sample, ...] = ()  # what ingresses that are no more have counted

    def hear(self, ingress_id: str, samples: tuple[Sample, ...]) -> None:
        now = self.clock()
        self._ingress[ingress_id] = now, samples
        for other, (heard, last) in tuple(self._ingress.items()):
            if now - heard > INGRESS_GONE_S:
                self._gone = merge((self._gone, cumulative(last)))
                del self._ingress[other]

    def take_gone(self) -> tuple[Sample, ...]:
        """What ingresses that are no more have counted, for who keeps it in a place that outlives the supervisor."""
        gone, self._gone = self._gone, ()
        return gone

    def exposition(self, fleet: Fleet | None, load: ExpertLoad | None) -> bytes:
        """Prometheus text over all processes."""
        actors: list[tuple[Sample, ...]] = []
        if fleet:
            self._publish_gauges(fleet)
            actors = [fleet.gone, *(m.report.samples for m in fleet.members if m.report)]
        if fleet and load:
            self.metrics.set("expert_balancedness", load.balancedness(fleet.expert_map))
        return exposition(
            merge([self.metrics.samples(), *actors, self._gone, *(samples for _, samples in self._ingress.values())])
        )

    def _publish_gauges(self, fleet: Fleet) -> None:
        self.metrics.set("expert_map_version", fleet.expert_map.version)
        for group, wanted in enumerate(fleet.wanted.replicas):
            self.metrics.set("expert_replicas_wanted", wanted, group=str(group))
            for state in get_args(ActorState):
                number = len(fleet.replicas(group, state))
                self.metrics.set("expert_replicas", number, group=str(group), state=state)
        for state in get_args(ActorState):
            self.metrics.set("fronts", len(fleet.of_kind("front", state)), state=state)
