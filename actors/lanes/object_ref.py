"""The lane over Ray actor calls and object refs: works wherever Ray works.

With RAY_max_direct_call_object_size raised to 4 MiB, messages stay inside the RPC and skip the object store.
"""

from collections.abc import Iterable
from typing import Any

import ray
from ray.exceptions import RayError

from actors.lanes.lane import Lane, LaneError
from cluster.expert_map import ReplicaAddress


class ObjectRefLane(Lane):
    """Endpoints are names of actors in the application's namespace."""

    name = "object_ref"

    def __init__(self, namespace: str, timeout_s: float = 60.0) -> None:
        self._namespace = namespace
        self._timeout_s = timeout_s
        self._handles: dict[str, Any] = {}

    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        handles = {}
        for replica in replicas:
            known = self._handles.get(replica.replica_id)
            handles[replica.replica_id] = known or ray.get_actor(replica.endpoint(self.name), self._namespace)
        self._handles = handles

    def send(self, replica: ReplicaAddress, message: bytes) -> Any:
        handle = self._handles.get(replica.replica_id)
        if handle is None:
            raise LaneError(f"replica {replica.replica_id} is not connected")
        return handle.run_experts.remote(message)

    def receive(self, ticket: Any) -> bytes:
        try:
            answer: bytes = ray.get(ticket, timeout=self._timeout_s)
        except RayError as error:
            raise LaneError(f"{type(error).__name__}: {error}") from error
        return answer
