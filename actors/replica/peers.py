"""The other replicas of a node, asked for their reports by one of them: the supervisor makes one call for all."""

import threading
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.messages.actors import ActorReport

# Who has not answered by then is asked by the supervisor itself, which decides what becomes of it.
PEER_TIMEOUT_S = 0.5


class Peers:
    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._handles: dict[str, Any] = {}
        self._asking = threading.Lock()

    def reports(self, names: tuple[str, ...]) -> tuple[ActorReport | None, ...]:
        """In the order of `names`; None for one that is dead, or has not answered in time. Waits: to find an actor by
        its name takes as long as Ray's control store is away. One thread waits for that, not all that there are.
        """
        if not self._asking.acquire(blocking=False):
            return (None,) * len(names)
        try:
            return self._ask(names)
        finally:
            self._asking.release()

    def _ask(self, names: tuple[str, ...]) -> tuple[ActorReport | None, ...]:
        self._handles = {name: handle for name in names if (handle := self._find(name))}
        asked = {name: handle.report.remote() for name, handle in self._handles.items()}
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=PEER_TIMEOUT_S)
        there = set(answered)
        return tuple(_read(asked[name]) if asked.get(name) in there else None for name in names)

    def _find(self, name: str) -> Any:
        try:
            return self._handles.get(name) or ray.get_actor(name, self._namespace)
        except (ValueError, RayError):
            return None


def _read(reference: Any) -> ActorReport | None:
    try:
        report: ActorReport = ray.get(reference)
    except RayError:
        return None
    return report
