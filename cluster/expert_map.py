"""The expert map: which group holds an expert of a layer, and which live replicas serve a group.

A new map is a new object with the next version; the supervisor publishes it, fronts route by it. It may change at
any time: load first, publish second, retire third.
"""

from dataclasses import dataclass, replace

from cluster.errors import ConfigError

# homes[layer][expert] = groups that hold the expert, the preferred one first.
Homes = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    """A live expert replica. `endpoints` maps a lane's name to where that lane reaches the replica."""

    replica_id: str
    group: int
    endpoints: tuple[tuple[str, str], ...]

    def endpoint(self, lane: str) -> str:
        return dict(self.endpoints)[lane]


@dataclass(frozen=True, slots=True)
class ExpertMap:
    version: int
    num_groups: int
    homes: Homes
    replicas: tuple[ReplicaAddress, ...] = ()

    def replicas_of(self, group: int) -> tuple[ReplicaAddress, ...]:
        return tuple(r for r in self.replicas if r.group == group)

    def experts_of(self, group: int) -> tuple[tuple[int, ...], ...]:
        """Per layer, the experts that the group holds, ascending."""
        return tuple(tuple(e for e, groups in enumerate(layer) if group in groups) for layer in self.homes)

    def with_replicas(self, replicas: tuple[ReplicaAddress, ...]) -> "ExpertMap":
        return replace(self, version=self.version + 1, replicas=replicas)

    def with_homes(self, layer: int, homes: tuple[tuple[int, ...], ...]) -> "ExpertMap":
        """The next version, with other homes for the experts of one layer."""
        return replace(self, version=self.version + 1, homes=(*self.homes[:layer], homes, *self.homes[layer + 1 :]))

    def check_integrity(self) -> None:
        """Raise AssertionError if an expert has no group, a group is unknown, or a replica is listed twice."""
        for layer in self.homes:
            for groups in layer:
                assert groups, "an expert has no group"
                assert len(set(groups)) == len(groups), "an expert is twice in a group"
                assert all(0 <= g < self.num_groups for g in groups), "an expert is in an unknown group"
        ids = [r.replica_id for r in self.replicas]
        assert len(set(ids)) == len(ids), "a replica is listed twice"
        assert all(0 <= r.group < self.num_groups for r in self.replicas), "a replica serves an unknown group"


def contiguous_homes(num_layers: int, num_experts: int, num_groups: int) -> Homes:
    """The placement before any load is known: equal runs of neighbouring experts, the same in every layer.

    Raises ConfigError when the groups don't divide the experts.
    """
    if num_groups > num_experts or num_experts % num_groups:
        divisors = [str(d) for d in range(1, num_experts + 1) if num_experts % d == 0]
        choice = divisors[0] if len(divisors) == 1 else ", ".join(divisors[:-1]) + " or " + divisors[-1]
        raise ConfigError(f"groups={num_groups} does not divide {num_experts} experts: choose {choice}")
    size = num_experts // num_groups
    layer = tuple((expert // size,) for expert in range(num_experts))
    return (layer,) * num_layers
