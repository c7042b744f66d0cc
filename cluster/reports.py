"""Cluster-wide metrics: what all processes have counted, as one text, and gauges of the fleet."""

import time
from collections.abc import Callable
from typing import get_args

from cluster.fleet import Fleet
from cluster.load import ExpertLoad
from cluster.messages import ActorState, Sample
from cluster.metrics import Metrics, cumulative, exposition, merge

# An ingress pushes its samples each second. One that has been silent for this long does not come back.
INGRESS_GONE_S = 600.0


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
