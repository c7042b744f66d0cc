"""How a model is laid out: fronts, groups and replicas, on which kinds of node, over which lane."""

from dataclasses import dataclass, replace
from typing import Literal

from cluster.planning.hardware import HardwareProfile, MeasuredLane

PlannedLane = Literal["unix", "zmq", "object_ref", "local"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Each actor has a device of its own, unless `is_shared`: then all are on one machine without GPUs and share its
    cores. On the lane `local` each front has all experts, and there are no replicas.
    """

    fronts: int
    groups: int
    replicas: int
    lane: PlannedLane
    front_node: HardwareProfile
    replica_node: HardwareProfile
    is_shared: bool = False

    @property
    def is_local(self) -> bool:
        return self.lane == "local"

    @property
    def num_replicas(self) -> int:
        return 0 if self.is_local else self.groups * self.replicas

    @property
    def num_actors(self) -> int:
        return self.fronts + self.num_replicas

    @property
    def num_devices(self) -> dict[str, int]:
        """By the name of the profile."""
        if self.is_shared:
            return {self.front_node.name: 1}
        found = {self.front_node.name: self.fronts}
        if self.num_replicas:
            found[self.replica_node.name] = found.get(self.replica_node.name, 0) + self.num_replicas
        return found

    @property
    def num_nodes(self) -> int:
        """As few as hold the devices."""
        kinds = {node.name: node for node in (self.front_node, self.replica_node)}
        return sum(-(-count // kinds[name].devices) for name, count in self.num_devices.items())

    @property
    def cost_per_hour(self) -> float | None:
        """Of all devices; None if a profile has no price."""
        kinds = {node.name: node.cost_per_hour for node in (self.front_node, self.replica_node)}
        prices = [(count, kinds[name]) for name, count in self.num_devices.items()]
        return None if any(each is None for _, each in prices) else sum(n * (each or 0) for n, each in prices)

    def without(self, fronts: int = 0, replicas: int = 0) -> "Layout | None":
        """What is left when so many fronts, and so many replicas of one group, are lost; a group that has lost one
        holds up all others, so all are counted as if they had. None if nobody is left to compute something.
        """
        if self.fronts <= fronts or (self.num_replicas and self.replicas <= replicas):
            return None
        kept = self.replicas if self.is_local else self.replicas - replicas
        return replace(self, fronts=self.fronts - fronts, replicas=kept)

    def after_actors(self, lost: int = 1) -> "tuple[Layout | None, ...]":
        """What may be left when any so many actors are lost: that many fronts, or that many replicas of a group."""
        kinds = (self.without(fronts=lost), self.without(replicas=lost))
        return kinds[: 1 if self.is_local else 2]

    def after_node(self) -> "tuple[Layout | None, ...]":
        """What may be left when any one node is lost. Actors of a kind are spread: the next one is on the next node."""
        if self.num_nodes == 1:
            return (None,)
        is_mixed = self.is_local or self.front_node.name == self.replica_node.name
        front_nodes = self.num_nodes if is_mixed else -(-self.fronts // self.front_node.devices)
        replica_nodes = self.num_nodes if is_mixed else -(-self.num_replicas // self.replica_node.devices)
        fronts = -(-self.fronts // front_nodes)
        replicas = -(-self.replicas // replica_nodes) if self.num_replicas else 0
        if is_mixed and self.front_node.devices > 1:
            return (self.without(fronts, replicas),)
        return (self.without(fronts=fronts), self.without(replicas=replicas))[: 1 if self.is_local else 2]


def lane_between(front: HardwareProfile, replica: HardwareProfile, num_devices: int) -> MeasuredLane:
    """What `auto` comes to: unix where all devices are in one node, else zmq."""
    is_one_node = front.name == replica.name and num_devices <= front.devices
    return "unix" if is_one_node and "unix" in front.lanes else "zmq"
