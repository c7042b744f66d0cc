"""What the autoscaler sees: how busy groups and fronts were since it last looked, from what members report."""

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.config import ClusterConfig
from cluster.control.fleet import Fleet
from cluster.control.members import Member
from cluster.messages.actors import Wanted
from cluster.metrics import PREFIX
from cluster.policy.autoscaling import (
    FrontSignals,
    GroupSignals,
    Limits,
    Policy,
    ScalingState,
    scale_fronts,
    scale_group,
)

POLICY = Policy()
PERIOD_S = 2.5


@dataclass(frozen=True, slots=True)
class _Totals:
    """Ever-growing sums at a moment."""

    at: float
    busy_seconds: dict[str, float]  # by replica
    queue_seconds: float
    queue_count: float


class Autoscaler:
    """Remembers the last totals and, for each group and for the fronts, the policy's state."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self._last: _Totals | None = None
        self._states: dict[int | None, ScalingState] = {}

    def decide(self, fleet: Fleet, now: float) -> Wanted:
        """The numbers that there should be. May be called at any time; it looks every PERIOD_S seconds."""
        last = self._last
        if last and now - last.at < PERIOD_S:
            return fleet.wanted
        totals = self._last = _totals(fleet, now)
        if last is None:
            return fleet.wanted
        fronts = self._decide_fronts(fleet, last, totals)
        there, groups = fleet.ready_by_group(), enumerate(fleet.wanted.replicas)
        replicas = (self._decide_group(group, wanted, there.get(group, []), last, totals) for group, wanted in groups)
        return Wanted(fronts, tuple(replicas))

    def _decide_group(self, group: int, wanted: int, members: list[Member], last: _Totals, totals: _Totals) -> int:
        if wanted == 0:  # the local lane has none
            return 0
        ready = [m.spec.actor_id for m in members]
        busy = sum(totals.busy_seconds.get(r, 0.0) - last.busy_seconds.get(r, 0.0) for r in ready)
        utilisation = min(1.0, max(0.0, busy / (totals.at - last.at) / max(1, len(ready))))
        limits = Limits(self.config.min_replicas, max(self.config.max_replicas, self.config.replicas))
        state = self._states.get(group, ScalingState())
        decision = scale_group(GroupSignals(utilisation, wanted, len(ready)), limits, state, totals.at, POLICY)
        self._states[group] = decision.state
        return decision.desired

    def _decide_fronts(self, fleet: Fleet, last: _Totals, totals: _Totals) -> int:
        ready = fleet.of_kind("front", "ready")
        waited, count = totals.queue_seconds - last.queue_seconds, totals.queue_count - last.queue_count
        signals = FrontSignals(
            queue_wait_s=max(0.0, waited / count) if count > 0 else 0.0,
            num_waiting=int(_sum(ready, "num_requests_waiting")),
            num_running=int(_sum(ready, "num_requests_running")),
            max_num_seqs=self.config.max_num_seqs,
            fronts=fleet.wanted.fronts,
            ready=len(ready),
        )
        limits = Limits(self.config.min_fronts, max(self.config.max_fronts, self.config.fronts))
        decision = scale_fronts(signals, limits, self._states.get(None, ScalingState()), totals.at, POLICY)
        self._states[None] = decision.state
        return decision.desired


def _totals(fleet: Fleet, now: float) -> _Totals:
    replicas, fronts = fleet.of_kind("expert", "ready"), fleet.of_kind("front", "ready")
    return _Totals(
        now,
        {m.spec.actor_id: _sum([m], "expert_compute_seconds_sum") for m in replicas},
        _sum(fronts, "request_queue_time_seconds_sum"),
        _sum(fronts, "request_queue_time_seconds_count"),
    )


def _sum(members: Iterable[Member], name: str) -> float:
    samples = (sample for member in members if member.report for sample in member.report.samples)
    return sum(value for sample_name, _, value in samples if sample_name == PREFIX + name)
