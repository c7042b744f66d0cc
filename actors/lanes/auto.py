"""The lane `auto`: zmq to every replica that shakes hands, object_ref to the others."""

import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

from actors.lanes.lane import Lane, LaneError, LaneTimeout
from actors.lanes.zmq_client import ZmqLane
from cluster.expert_map import ReplicaAddress

# A lane and its own ticket.
Ticket = tuple[Lane, Any]
TURN_S = 0.005


class AutoLane(Lane):
    name = "auto"

    def __init__(self, fast: ZmqLane, fallback: Lane) -> None:
        self.fast = fast
        self.fallback = fallback
        self._greetings: dict[str, Any] = {}  # to replicas that zmq does not reach; its tickets

    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        replicas = tuple(replicas)
        try:
            self.fast.connect(replicas)
        finally:  # what does not get through is sent over this one
            self.fallback.connect(replicas)

    def name_for(self, replica: ReplicaAddress) -> str:
        return self._lane(replica).name

    def _lane(self, replica: ReplicaAddress) -> Lane:
        return self.fast if self.fast.is_connected(replica.replica_id) else self.fallback

    def send(self, replica: ReplicaAddress, message: bytes) -> Ticket:
        greeting = self._greetings.get(replica.replica_id)
        if greeting and self.fast.is_alive(greeting):
            del self._greetings[replica.replica_id]
        self.fast.close_retired()
        lane = self._lane(replica)
        return lane, lane.send(replica, message)

    def receive(self, tickets: Sequence[Ticket], timeout_s: float) -> tuple[Ticket, bytes | memoryview]:
        by_lane: dict[Lane, list[Any]] = {}
        for lane, inner in tickets:
            by_lane.setdefault(lane, []).append(inner)
        if len(by_lane) == 1:
            return self._receive(*next(iter(by_lane.items())), timeout_s)
        deadline = time.monotonic() + timeout_s
        while True:  # rare: a message was sent again, and over the other lane
            for lane, inners in by_lane.items():
                with contextlib.suppress(LaneTimeout):
                    return self._receive(lane, inners, min(TURN_S, timeout_s))
            if time.monotonic() >= deadline:  # without time left, what has come already still counts
                raise LaneTimeout(f"no answer within {timeout_s:.3f} s")

    def _receive(self, lane: Lane, inners: list[Any], timeout_s: float) -> tuple[Ticket, bytes | memoryview]:
        try:
            inner, answer = lane.receive(inners, timeout_s)
        except LaneTimeout:
            raise
        except LaneError as error:
            raise LaneError(str(error), (lane, error.ticket)) from None
        return (lane, inner), answer

    def forget(self, ticket: Ticket) -> None:
        lane, inner = ticket
        lane.forget(inner)

    def probe(self, replica: ReplicaAddress) -> Ticket:
        """Over zmq if it is connected. Else over the other lane, as zmq may never get through; but it may come back:
        send() looks for that.
        """
        try:
            greeting = self.fast.probe(replica)
        except LaneError:
            return self.fallback, self.fallback.probe(replica)
        if self.fast.is_connected(replica.replica_id):
            return self.fast, greeting
        self._greetings[replica.replica_id] = greeting
        with contextlib.suppress(LaneError):
            return self.fallback, self.fallback.probe(replica)
        return self.fast, greeting

    def is_alive(self, ticket: Ticket) -> bool:
        lane, inner = ticket
        return lane.is_alive(inner)

    def close(self) -> None:
        self.fast.close()
        self.fallback.close()
