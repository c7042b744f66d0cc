"""The lane `auto`: zmq to every replica that shakes hands, object_ref to the others."""

from collections.abc import Iterable
from typing import Any

from actors.lanes.lane import Lane
from actors.lanes.object_ref import ObjectRefLane
from actors.lanes.zmq_client import ZmqLane
from cluster.expert_map import ReplicaAddress


class AutoLane(Lane):
    name = "auto"

    def __init__(self, fast: ZmqLane, fallback: ObjectRefLane) -> None:
        self.fast = fast
        self.fallback = fallback

    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        replicas = tuple(replicas)
        self.fast.connect(replicas)
        self.fallback.connect(replicas)

    def name_for(self, replica: ReplicaAddress) -> str:
        return self._lane(replica).name

    def _lane(self, replica: ReplicaAddress) -> Lane:
        return self.fast if self.fast.is_connected(replica.replica_id) else self.fallback

    def send(self, replica: ReplicaAddress, message: bytes) -> tuple[Lane, Any]:
        lane = self._lane(replica)
        return lane, lane.send(replica, message)

    def receive(self, ticket: tuple[Lane, Any]) -> bytes | memoryview:
        lane, inner = ticket
        return lane.receive(inner)

    def close(self) -> None:
        self.fast.close()
        self.fallback.close()
