"""The expert map: which group holds an expert of a layer, and which live replicas serve a group.

A new map is a new object with the next version; the supervisor publishes it, fronts route by it. It may change at
any time: load first, publish second, retire third.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from cluster.errors import ConfigError

# homes[layer][expert] = groups that hold the expert, the preferred one first.
LayerHomes = tuple[tuple[int, ...], ...]
Homes = tuple[LayerHomes, ...]


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
    _held: list[LayerHomes] = field(default_factory=list, init=False, compare=False, repr=False)

    def __reduce__(self) -> Any:
        return ExpertMap, (self.version, self.num_groups, self.homes, self.replicas)

    def replicas_of(self, group: int) -> tuple[ReplicaAddress, ...]:
        return tuple(r for r in self.replicas if r.group == group)

    def experts_of(self, group: int) -> tuple[tuple[int, ...], ...]:
        """Per layer, the experts that the group holds, ascending."""
        if not self._held:  # once for all groups and replicas
            layers = {id(layer): _by_group(layer, self.num_groups) for layer in self.homes}  # many may be the same
            held = [layers[id(layer)] for layer in self.homes]
            self._held.extend(tuple(layer[g] for layer in held) for g in range(self.num_groups))
        return self._held[group]

    def with_replicas(self, replicas: tuple[ReplicaAddress, ...]) -> "ExpertMap":
        return replace(self, version=self.version + 1, replicas=replicas)

    def with_homes(self, layer: int, homes: tuple[tuple[int, ...], ...]) -> "ExpertMap":
        """The next version, with other homes for the experts of one layer."""
        return replace(self, version=self.version + 1, homes=(*self.homes[:layer], homes, *self.homes[layer + 1 :]))

    def check_integrity(self, known: "ExpertMap | None" = None) -> None:
        """Raise AssertionError if an expert has no group, a group is unknown, or a replica is listed twice. Layers that
        are those of a `known` map are not looked at again.
        """
        checked = {id(layer) for layer in known.homes} if known and known.num_groups <= self.num_groups else set()
        for layer in {id(layer): layer for layer in self.homes if id(layer) not in checked}.values():
            for groups in layer:
                assert groups, "an expert has no group"
                assert len(set(groups)) == len(groups), "an expert is twice in a group"
                assert all(0 <= g < self.num_groups for g in groups), "an expert is in an unknown group"
        ids = {r.replica_id for r in self.replicas}
        assert len(ids) == len(self.replicas), "a replica is listed twice"
        assert all(0 <= r.group < self.num_groups for r in self.replicas), "a replica serves an unknown group"


@dataclass(frozen=True, slots=True)
class MapChange:
    """What makes version `base` of a map version `version`: a layer that has moved, or a replica more, is a thousandth
    of a large map. `joined` says where each replica stands in the new order.
    """

    base: int
    version: int
    homes: tuple[tuple[int, LayerHomes], ...] = ()
    left: tuple[str, ...] = ()
    joined: tuple[tuple[int, ReplicaAddress], ...] = ()

    def applied_to(self, old: ExpertMap) -> ExpertMap:
        """Raises ValueError if that is not the version that this changes."""
        if old.version != self.base:
            raise ValueError(f"this changes version {self.base} of the expert map, not {old.version}")
        homes, replicas = list(old.homes), [r for r in old.replicas if r.replica_id not in set(self.left)]
        for layer, new in self.homes:
            homes[layer] = new
        for place, replica in self.joined:
            replicas.insert(place, replica)
        return replace(old, version=self.version, homes=tuple(homes), replicas=tuple(replicas))


def change_between(old: ExpertMap, new: ExpertMap) -> MapChange | None:
    """None where only the whole map tells: replicas that stay have other places."""
    stay = set(old.replicas) & set(new.replicas)
    change = MapChange(
        old.version,
        new.version,
        tuple((n, layer) for n, layer in enumerate(new.homes) if n >= len(old.homes) or layer is not old.homes[n]),
        tuple(r.replica_id for r in old.replicas if r not in stay),
        tuple((n, replica) for n, replica in enumerate(new.replicas) if replica not in stay),
    )
    is_whole = len(old.homes) == len(new.homes) and old.num_groups == new.num_groups
    return change if is_whole and change.applied_to(old) == new else None


def newest(known: ExpertMap | None, news: ExpertMap | MapChange) -> ExpertMap:
    """What a front goes by that knows a map and is handed another, or a change: a supervisor that has a successor may
    still call. Raises ValueError if the change is not one of the map that it knows.
    """
    if isinstance(news, MapChange):
        if known is None:
            raise ValueError(f"this changes version {news.base} of the expert map, and none is known")
        return news.applied_to(known)
    return known if known and known.version > news.version else news


def _by_group(layer: LayerHomes, num_groups: int) -> list[tuple[int, ...]]:
    held: list[list[int]] = [[] for _ in range(num_groups)]
    for expert, groups in enumerate(layer):
        for group in groups:
            held[group].append(expert)
    return [tuple(experts) for experts in held]


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
