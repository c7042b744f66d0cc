"""What comes of replicas that were given up: answers that come late after all, and probes that they answer."""

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from actors.dispatch.failover import Breaker, Latency
from actors.dispatch.parts import Sent
from actors.lanes.lane import Lane, LaneError, LaneTimeout
from cluster.expert_map import ReplicaAddress

logger = logging.getLogger(__name__)

# An answer that has not come by then is not expected any more.
LATE_S = 15.0


class LateAnswers:
    """Messages that another replica, or the front itself, has answered first."""

    def __init__(self, lane: Lane, latency: Latency) -> None:
        self._lane = lane
        self._latency = latency
        self._expected: dict[Any, tuple[Sent, int]] = {}  # by ticket: the message and its number of tokens
        self._looked_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._expected)

    @property
    def owing(self) -> set[str]:
        """Replicas that have not answered everything yet."""
        return {sent.replica.replica_id for sent, _ in self._expected.values()}

    def expect(self, sent: Sent, num_tokens: int) -> None:
        self._expected[sent.ticket] = sent, num_tokens

    def hear(self) -> None:
        """Learn from answers that have come how slow their replicas are. Does not wait."""
        last_looked, self._looked_at = self._looked_at, time.monotonic()
        for ticket, (sent, _) in tuple(self._expected.items()):
            if self._looked_at - sent.at > LATE_S:
                self._lane.forget(ticket)
                del self._expected[ticket]
        while self._expected:
            try:
                ticket, _ = self._lane.receive(list(self._expected), 0.0)
            except LaneTimeout:
                return
            except LaneError as error:
                del self._expected[error.ticket]
            else:
                sent, num_tokens = self._expected.pop(ticket)
                # When it came is not known, but that it had not when we last looked.
                self._latency.at_least(sent.replica.replica_id, num_tokens, last_looked - sent.at)


class Probes:
    """Greetings to replicas that were given up, and not answered yet."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._tickets: dict[str, Any] = {}

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._tickets

    def look(self, breaker: Breaker, owing: set[str], replicas: Mapping[str, ReplicaAddress]) -> None:
        """Take replicas back that have answered, and ask those again whose pause is over.

        A probe costs a replica nothing: one that still owes an answer to a message is not taken back for that.
        """
        for replica_id, ticket in tuple(self._tickets.items()):
            if replica_id not in owing and self._lane.is_alive(ticket):
                logger.info("replica %s answers again", replica_id)
                breaker.close(replica_id)
                del self._tickets[replica_id]
        for replica_id in breaker.take_due():
            self._forget(replica_id)
            if replica_id in replicas:
                with contextlib.suppress(LaneError):
                    self._tickets[replica_id] = self._lane.probe(replicas[replica_id])

    def keep_only(self, replica_ids: set[str]) -> None:
        for replica_id in self._tickets.keys() - replica_ids:
            self._forget(replica_id)

    def _forget(self, replica_id: str) -> None:
        if ticket := self._tickets.pop(replica_id, None):
            self._lane.forget(ticket)
