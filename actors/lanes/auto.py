"""The lane `auto`: unix to replicas on this host, zmq to others that shake hands, object_ref to the rest."""

import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

from actors.lanes.lane import Handed, Lane, LaneError, LaneTimeout
from actors.lanes.links import LinkedLane
from cluster.expert_map import ReplicaAddress

# A lane and its own ticket.
Ticket = tuple[Lane, Any]
TURN_S = 0.005
# A replica whose fast lane does not reach it is greeted there so often, while it is served over the other one.
GREET_AGAIN_S = 5.0


class AutoLane(Lane):
    name = "auto"

    def __init__(self, fast: Sequence[LinkedLane[Any]], fallback: Lane) -> None:
        """`fast`: a replica is reached by the first of these lanes that has an endpoint of it for this host."""
        self.fast = tuple(fast)
        self.fallback = fallback
        # To replicas that their fast lane does not reach: the last greeting, and when.
        self._greetings: dict[str, tuple[LinkedLane[Any], Any]] = {}
        self._greeted_at: dict[str, float] = {}
        self._known: frozenset[str] = frozenset()  # replicas of the newest map; the others leave

    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        replicas = tuple(replicas)
        self._known = frozenset(replica.replica_id for replica in replicas)
        fast_of = {replica.replica_id: lane for replica in replicas if (lane := self._choose(replica))}
        try:
            for lane in self.fast:
                lane.connect(replica for replica in replicas if fast_of.get(replica.replica_id) is lane)
        finally:  # what does not get through is sent over this one
            self.fallback.connect(replicas)

    def _choose(self, replica: ReplicaAddress) -> LinkedLane[Any] | None:
        return next((lane for lane in self.fast if lane.has_endpoint(replica)), None)

    def name_for(self, replica: ReplicaAddress) -> str:
        return self._lane(replica).name

    def _lane(self, replica: ReplicaAddress) -> Lane:
        return next((lane for lane in self.fast if lane.is_connected(replica.replica_id)), self.fallback)

    def send(self, replica: ReplicaAddress, message: bytes) -> Ticket:
        self.close_retired()
        lane = self._lane(replica)
        if lane is self.fallback and replica.replica_id in self._known and (fast := self._choose(replica)):
            self._greet(fast, replica)
            lane = self._lane(replica)
        return lane, lane.send(replica, message)

    def _greet(self, fast: LinkedLane[Any], replica: ReplicaAddress) -> None:
        """See whether the last greeting was answered, which connects the lane; now and then, greet anew."""
        name, now = replica.replica_id, time.monotonic()
        greeted = self._greetings.pop(name, None)
        if greeted and greeted[0].is_alive(greeted[1]):
            return
        if greeted and now - self._greeted_at[name] < GREET_AGAIN_S:
            self._greetings[name] = greeted
        elif now - self._greeted_at.get(name, 0.0) >= GREET_AGAIN_S:
            with contextlib.suppress(LaneError):
                self._keep_greeting(fast, replica, now)

    def _keep_greeting(self, fast: LinkedLane[Any], replica: ReplicaAddress, now: float) -> Any:
        self._greeted_at[replica.replica_id] = now
        greeting = fast.probe(replica)
        self._greetings[replica.replica_id] = fast, greeting
        return greeting

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

    def stream_to(self, replica: ReplicaAddress) -> int | None:
        return self._lane(replica).stream_to(replica)

    def adopt(self, replica: ReplicaAddress, handed: Handed) -> Ticket:
        lane = next(lane for lane in self.fast if lane.has_streams)
        return lane, lane.adopt(replica, handed)

    def close_retired(self) -> None:
        for lane in self.fast:
            lane.close_retired()

    def forget(self, ticket: Ticket) -> None:
        lane, inner = ticket
        lane.forget(inner)

    def probe(self, replica: ReplicaAddress) -> Ticket:
        """Over its fast lane if that is connected. Else over the other one, as the fast one may never get through; but
        it may come back: send() looks for that.
        """
        fast = self._choose(replica)
        if fast is None:
            return self.fallback, self.fallback.probe(replica)
        try:
            if fast.is_connected(replica.replica_id):
                return fast, fast.probe(replica)
            greeting = self._keep_greeting(fast, replica, time.monotonic())
        except LaneError:
            return self.fallback, self.fallback.probe(replica)
        with contextlib.suppress(LaneError):
            return self.fallback, self.fallback.probe(replica)
        return fast, greeting

    def is_alive(self, ticket: Ticket) -> bool:
        lane, inner = ticket
        return lane.is_alive(inner)

    def close(self) -> None:
        for lane in self.fast:
            lane.close()
        self.fallback.close()
