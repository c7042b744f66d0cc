"""Dispatch to expert replicas over a lane, by the expert map; a replica that fails costs its part, not the step.

Shapes: T tokens, D hidden, K top-k; P tokens of a part. A part is what one group gets of one layer's tokens. The file
is long because how a part is sent, waited for, given up and sent anew is one story.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from actors.dispatch.dispatcher import Dispatcher, DispatchError
from actors.dispatch.failover import Breaker, HedgeBudget, Latency
from actors.dispatch.parts import CorruptAnswerError, NotHeldError, Part, Sent, checked, split
from actors.dispatch.recovery import LateAnswers, Probes
from actors.dispatch.routes import Routes
from actors.lanes import wire
from actors.lanes.lane import Lane, LaneError, LaneTimeout
from actors.staging import DIRECT, Staging
from cluster.expert_map import ExpertMap, ReplicaAddress
from cluster.metrics import Metrics

logger = logging.getLogger(__name__)

# So many replicas of a group tell how long an answer takes the fastest.
MOST_COMPARED = 16
# An answer that is read faster had come before it was waited for.
AT_ONCE_S = 0.0002

# (layer, x, ids, gates) -> partial sums, without any replica
Fallback = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Pending:
    like_TD: Tensor
    parts: list[Part]
    started: float
    lane: str
    staging: Staging  # between where like_TD is and the host


class RemoteDispatcher(Dispatcher):
    """Sends each group its tokens, sums partial results in float32 in the order of groups."""

    def __init__(
        self, lane: Lane, metrics: Metrics, fallback: Fallback | None = None, staging: Staging | None = None
    ) -> None:
        super().__init__()
        self._staging = staging or DIRECT
        self.lane = lane
        self.metrics = metrics
        self._fallback = fallback
        self._latency = Latency()
        self._hedges = HedgeBudget()
        self._breaker = Breaker()
        self._late = LateAnswers(lane, self._latency)
        self._probes = Probes(lane)
        self._outstanding: Counter[str] = Counter()
        self._num_sent: Counter[str] = Counter()
        self._turns: Counter[int] = Counter()  # of groups: messages sent
        self._routes = Routes(lane)
        self._by_id: dict[str, ReplicaAddress] = {}
        self._followed = 0  # the map's version that this thread has seen
        self._num_bytes: Counter[tuple[str, str]] = Counter()  # (lane, direction)
        self._told: tuple[str, ...] = ()  # requests of which the log says that their experts are computed here

    @property
    def map_version(self) -> int:
        return self._routes.version

    def set_map(self, expert_map: ExpertMap) -> None:
        """See Routes.set_map."""
        self._routes.set_map(expert_map)

    def lane_names(self) -> str:
        """The lanes in use, such as "zmq" or, if some replicas could not be reached by it, "object_ref+zmq"."""
        return "+".join(sorted({self.lane.name_for(replica) for replica in self._routes.everyone()}))

    def publish_counters(self) -> None:
        """Bring counters that are kept here up to date; called when metrics are read."""
        for (lane, direction), total in tuple(self._num_bytes.items()):
            self.metrics.raise_to("lane_bytes_total", total, lane=lane, direction=direction)

    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Pending:
        return self._dispatch(layer, x_TD, ids_TK, gates_TK, self._staging)

    def _dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, staging: Staging) -> Pending:
        started = time.monotonic()
        version, homes = self._routes.of_layer(layer)
        if version != self._followed:
            self._follow_map()
        self._look_after_the_lost()
        x_here_TD, gates_here_TK, ids_here_TK = staging.download(x_TD, gates_TK, ids_TK.to(torch.int16))
        parts = split(layer, x_here_TD, ids_here_TK, gates_here_TK, homes, version)
        for part in parts:
            self._send(part)
            self._hedges.earn()
        lanes = [self.lane.name_for(part.sent[0].replica) for part in parts if part.sent]
        self.step.wait_seconds += time.monotonic() - started
        return Pending(x_TD, parts, started, lanes[0] if lanes else "local", staging)

    def _look_after_the_lost(self) -> None:
        """Learn from answers that come late, and take replicas back that answer a probe."""
        if self._late:
            self._late.hear()
        if self._breaker:
            self._probes.look(self._breaker, self._late.owing, self._by_id)

    def combine(self, pending: Pending) -> Tensor:
        started = time.monotonic()
        try:
            return self._combine(pending)
        finally:
            for part in pending.parts:
                for sent in tuple(part.sent):
                    self._drop(part, sent)
                    self._late.expect(sent, part.num_tokens)
            self.step.wait_seconds += time.monotonic() - started

    def _combine(self, pending: Pending) -> Tensor:
        sum_TD: Tensor | None = None
        for part in pending.parts:
            partial_PD = self._receive(part)
            if part.rows_P is None:
                (partial_PD,) = pending.staging.upload(partial_PD)
                sum_TD = partial_PD.to(torch.float32, copy=True) if sum_TD is None else sum_TD.add_(partial_PD)
                continue
            if sum_TD is None:
                sum_TD = torch.zeros_like(pending.like_TD, dtype=torch.float32)
            partial_PD, rows_P = pending.staging.upload(partial_PD, part.rows_P)
            sum_TD[rows_P] += partial_PD
        assert sum_TD is not None, "every token has an expert in some group"
        self.metrics.observe("dispatch_seconds", time.monotonic() - pending.started, lane=pending.lane)
        return sum_TD.to(pending.like_TD.dtype)

    def _send(self, part: Part) -> bool:
        """Send the part to a replica that it was not sent to yet. False if there is none left."""
        message = None
        while replica := self._choose(part):
            part.tried.add(replica.replica_id)
            message = message or wire.pack_dispatch(part.layer, part.x_PD, part.gates_PK, part.ids_PK, self.step.id)
            try:
                ticket = self.lane.send(replica, message)
            except LaneError:
                self._give_up(replica, "unreachable")
                continue
            part.sent.append(Sent(replica, ticket, time.monotonic()))
            self._turns[part.group] += 1
            self._outstanding[replica.replica_id] += 1
            self._num_sent[replica.replica_id] += 1
            self._num_bytes[self.lane.name_for(replica), "sent"] += len(message)
            return True
        return False

    def _choose(self, part: Part) -> ReplicaAddress | None:
        """The live replica of the part's group with the least outstanding messages, then the least used one.

        Those that are free take turns, so that not all are looked at, however many there are.
        """
        busy = []
        for replica in self._live(part.group):
            if replica.replica_id in part.tried:
                continue
            if not self._outstanding[replica.replica_id]:
                return replica
            busy.append(replica)
        return min(busy, key=lambda r: (self._outstanding[r.replica_id], self._num_sent[r.replica_id]), default=None)

    def _live(self, group: int) -> Iterator[ReplicaAddress]:
        """Replicas of a group that are not given up; the one whose turn it is comes first."""
        replicas, turn = self._routes.of_group(group), self._turns[group]
        for place in range(len(replicas)):
            replica = replicas[(turn + place) % len(replicas)]
            if not self._breaker.is_open(replica.replica_id):
                yield replica

    def _receive(self, part: Part) -> Tensor:
        """The part's partial sums, on the host, from whichever replica answers well, or else computed here."""
        while part.sent or self._send(part):
            may_hedge = bool(self._hedges) and self._choose(part) is not None
            try:
                partial_PD = self._hear(part, self._patience(part, may_hedge))
            except LaneTimeout:
                self._give_up_late(part)
                if not self._send(part):
                    break
                if may_hedge:
                    self._hedges.spend()
            except NotHeldError:
                return self._reroute(part)
            else:
                if partial_PD is not None:
                    return partial_PD
        return self._compute_here(part)

    def _patience(self, part: Part, may_hedge: bool) -> float:
        """Seconds to wait for the newest message; longer if it is not to be sent to another replica."""
        return max(0.0, part.sent[-1].at + self._deadline(part.group, part.num_tokens, may_hedge) - time.monotonic())

    def _deadline(self, group: int, num_tokens: int, may_hedge: bool) -> float:
        """Seconds after which a message counts as late."""
        live = [replica.replica_id for replica in islice(self._live(group), MOST_COMPARED)]
        known = live or [r.replica_id for r in self._routes.of_group(group)]
        return self._latency.patience(known, num_tokens, may_hedge)

    def _give_up_late(self, part: Part) -> None:
        """All replicas that the part was sent to: what is known is that they take at least as long as this."""
        for sent in part.sent:
            self._latency.at_least(sent.replica.replica_id, part.num_tokens, time.monotonic() - sent.at)
            self._give_up(sent.replica, "timeout")

    def _hear(self, part: Part, timeout_s: float) -> Tensor | None:
        """The first answer; None if it can't be used, or a replica is lost. Raises LaneTimeout or NotHeldError."""
        asked = time.monotonic()
        try:
            ticket, frame = self.lane.receive([sent.ticket for sent in part.sent], timeout_s)
        except LaneTimeout:
            raise
        except LaneError as error:
            sent = next(s for s in part.sent if s.ticket == error.ticket)
            self._drop(part, sent)
            self._give_up(sent.replica, "disconnected")
            return None
        sent = next(s for s in part.sent if s.ticket == ticket)
        self._drop(part, sent)
        self._num_bytes[self.lane.name_for(sent.replica), "received"] += len(frame)
        try:
            partial_PD, seconds = checked(frame, part)
        except CorruptAnswerError as error:
            logger.warning("replica %s: %s", sent.replica.replica_id, error, extra=self.step.extra)
            self._give_up(sent.replica, "corrupt")
            return None
        age, waited = time.monotonic() - sent.at, time.monotonic() - asked
        # One that lay there may have waited for this front to read other answers, or to compute something.
        least = age if waited > AT_ONCE_S else seconds
        self._latency.between(sent.replica.replica_id, part.num_tokens, least, age)
        self._breaker.close(sent.replica.replica_id)
        self.step.compute_seconds += seconds
        return partial_PD

    def _drop(self, part: Part, sent: Sent) -> None:
        part.sent.remove(sent)
        self._outstanding[sent.replica.replica_id] -= 1

    def _give_up(self, replica: ReplicaAddress, reason: str) -> None:
        """Send nothing more to a replica until it answers a probe."""
        if self._breaker.open(replica.replica_id):
            what = f"replica {replica.replica_id} of group {replica.group} is given up: {reason}"
            self._failover(logging.WARNING, what, reason)

    def _failover(self, level: int, what: str, reason: str) -> None:
        logger.log(level, what, extra=self.step.extra)
        self.metrics.inc("failovers_total", reason=reason)
        self.step.num_failovers += 1

    def _follow_map(self) -> None:
        """Forget what was known of replicas that have left; begin anew to share out messages among those that stay."""
        self._followed = self._routes.version
        self._by_id = {replica.replica_id: replica for replica in self._routes.everyone()}
        here = set(self._by_id)
        self._breaker.keep_only(here)
        self._latency.keep_only(here)
        self._num_sent.clear()
        self._outstanding = +self._outstanding
        self._probes.keep_only(here)

    def _compute_here(self, part: Part) -> Tensor:
        """No replica of the group answers: slow, but right."""
        if self._fallback is None:
            raise DispatchError(f"no replica of expert group {part.group} answers")
        if not set(self.step.request_ids) <= set(self._told):  # a line per request, not one per step and layer
            self._told = self.step.request_ids
            logger.warning("experts of group %d are computed here", part.group, extra=self.step.extra)
        self.metrics.inc("local_fallback_tokens_total", part.num_tokens)
        self.step.num_local_tokens += part.num_tokens
        try:
            return self._fallback(part.layer, part.x_PD, part.ids_PK.long(), part.gates_PK)
        except Exception as error:  # such as a file that can't be read
            raise DispatchError(f"no replica of expert group {part.group} answers, and here: {error}") from error

    def _reroute(self, part: Part) -> Tensor:
        """The experts have moved: wait for the map that says where to, and dispatch the part by it."""
        if not self._routes.wait_for_newer(part.map_version):
            return self._compute_here(part)
        self._failover(logging.INFO, f"sent anew by map {self.map_version}: experts of layer {part.layer}", "not_held")
        spent = self.step.wait_seconds
        sum_PD = self.combine(self._dispatch(part.layer, part.x_PD, part.ids_PK, part.gates_PK, DIRECT))
        self.step.wait_seconds = spent  # the combine() that this is a part of counts it
        return sum_PD
