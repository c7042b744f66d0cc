"""The metrics of all processes as one text, for Prometheus."""

from collections import Counter
from collections.abc import Callable
from typing import get_args

from cluster.control.clock import now
from cluster.control.fleet import Fleet
from cluster.messages.actors import Sample
from cluster.messages.state import ActorState
from cluster.metrics import Metrics, cumulative, exposition, merge
from cluster.policy.expert_load import ExpertLoad

# An ingress pushes its samples each second. One that has been silent for this long does not come back.
INGRESS_GONE_S = 600.0


class Exposition:
    """Keeps the newest samples of each ingress; actors' samples come with their reports."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = now) -> None:
        self.metrics = metrics
        self.clock = clock
        self._ingress: dict[str, tuple[float, tuple[Sample, ...]]] = {}
        self._gone: tuple[Sample, ...] = ()  # what ingresses that are no more have counted

    def hear(self, ingress_id: str, samples: tuple[Sample, ...]) -> None:
        at = self.clock()
        self._ingress[ingress_id] = at, samples
        for other, (heard, last) in tuple(self._ingress.items()):
            if at - heard > INGRESS_GONE_S:
                self._gone = merge((self._gone, cumulative(last)))
                del self._ingress[other]

    def take_gone(self) -> tuple[Sample, ...]:
        """What ingresses that are no more have counted, for who keeps it in a place that outlives the supervisor."""
        gone, self._gone = self._gone, ()
        return gone

    def text(self, fleet: Fleet | None, expert_load: ExpertLoad | None) -> bytes:
        actors: list[tuple[Sample, ...]] = []
        if fleet:
            self._set_gauges(fleet)
            actors = [fleet.gone, *(m.report.samples for m in fleet.members if m.report)]
        if fleet and expert_load:
            self.metrics.set("expert_balancedness", expert_load.balancedness(fleet.expert_map))
        return exposition(
            merge([self.metrics.samples(), *actors, self._gone, *(samples for _, samples in self._ingress.values())])
        )

    def _set_gauges(self, fleet: Fleet) -> None:
        there = Counter((member.group, member.state) for member in fleet.members)
        self.metrics.set("expert_map_version", fleet.expert_map.version)
        for group, wanted in enumerate(fleet.wanted.replicas):
            self.metrics.set("expert_replicas_wanted", wanted, group=str(group))
            for state in get_args(ActorState):
                self.metrics.set("expert_replicas", there[group, state], group=str(group), state=state)
        for state in get_args(ActorState):
            self.metrics.set("fronts", there[None, state], state=state)
