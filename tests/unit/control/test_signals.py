"""What the autoscaler makes of reports: busy seconds become utilisation, waits become queue wait."""

from typing import Any

from cluster.config import ClusterConfig
from cluster.control.autoscaler import PERIOD_S, Autoscaler
from cluster.control.members import Member
from cluster.messages.actors import ActorReport, ReplicaSpec, Wanted

SPEC = ReplicaSpec("expert-g0-r0", 0, "/m", "cpu", "float32", ((0,),), 1)


class OneGroup:
    """A fleet of one replica and no front."""

    def __init__(self) -> None:
        self.member = Member(SPEC, "expert", lambda: 0.0, state="ready")
        self.wanted = Wanted(1, (1,))

    def of_kind(self, kind: str, state: str | None = None) -> list[Member]:
        return [self.member] if kind == "expert" else []

    def ready_by_group(self) -> dict[int, list[Member]]:
        return {0: [self.member]}

    def has_computed(self, seconds: float) -> None:
        sample = ("outcrop_expert_compute_seconds_sum", (("group", "0"),), seconds)
        self.member.report = ActorReport(SPEC.actor_id, 0, 0, (sample,))


def drive(share: float, seconds: float, settings: dict[str, Any] | None = None) -> Wanted:
    """What is wanted at the end of a time in which the replica computes a share of it."""
    fleet = OneGroup()
    autoscaler = Autoscaler(ClusterConfig(model="m", groups=1, autoscale=True, **(settings or {})))
    now = 0.0
    while now <= seconds:
        fleet.has_computed(share * now)
        fleet.wanted = autoscaler.decide(fleet, now)  # type: ignore[arg-type]
        if fleet.wanted.replicas != (1,):
            break
        now += 0.5
    return fleet.wanted


def test_a_busy_group_gets_another_replica_after_some_seconds() -> None:
    assert drive(0.95, seconds=2 * PERIOD_S) == Wanted(1, (1,)), "one look is no trend"
    assert drive(0.95, seconds=20) == Wanted(1, (2,))


def test_a_group_at_its_limit_or_at_ease_stays() -> None:
    assert drive(0.95, seconds=60, settings={"max_replicas": 1}) == Wanted(1, (1,))
    assert drive(0.5, seconds=60) == Wanted(1, (1,))
