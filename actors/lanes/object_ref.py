"""The lane over Ray actor calls and object refs: works wherever Ray works.

With RAY_max_direct_call_object_size raised to 4 MiB, messages stay inside the RPC and skip the object store.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from actors.lanes.lane import Lane, LaneError, LaneTimeout
from cluster.expert_map import ReplicaAddress


class ObjectRefLane(Lane):
    """Endpoints are names of actors in the application's namespace. Tickets are object refs."""

    name = "object_ref"

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._handles: dict[str, Any] = {}

    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        handles = {}
        for replica in replicas:
            handle = self._handles.get(replica.replica_id) or self._find(replica)
            if handle is not None:
                handles[replica.replica_id] = handle
        self._handles = handles

    def _find(self, replica: ReplicaAddress) -> Any:
        try:
            return ray.get_actor(replica.endpoint(self.name), self._namespace)
        except (ValueError, RayError):
            return None  # it has died since the map was made

    def _handle(self, replica: ReplicaAddress) -> Any:
        handle = self._handles.get(replica.replica_id)
        if handle is None:
            raise LaneError(f"replica {replica.replica_id} is not connected")
        return handle

    def send(self, replica: ReplicaAddress, message: bytes) -> Any:
        return self._handle(replica).run_experts.remote(message)

    def receive(self, tickets: Sequence[Any], timeout_s: float) -> tuple[Any, bytes]:
        ready, _ = ray.wait(list(tickets), num_returns=1, timeout=timeout_s)
        if not ready:
            raise LaneTimeout(f"no answer within {timeout_s:.3f} s")
        try:
            answer: bytes = ray.get(ready[0])
        except RayError as error:
            raise LaneError(f"{type(error).__name__}: {error}", ready[0]) from None
        return ready[0], answer

    def forget(self, ticket: Any) -> None:
        return None  # Ray drops the answer with the last reference to it

    def probe(self, replica: ReplicaAddress) -> Any:
        return self._handle(replica).progress.remote()

    def is_alive(self, ticket: Any) -> bool:
        ready, _ = ray.wait([ticket], timeout=0)
        try:
            return bool(ready) and ray.get(ready[0]) is not None
        except RayError:
            return False
