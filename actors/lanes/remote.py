"""Dispatch to expert replicas over a lane, by the expert map.

Shapes: T tokens, D hidden, K top-k; P tokens of a part. A part is what one group gets of one layer's tokens.
"""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.lanes import wire
from actors.lanes.dispatcher import Dispatcher
from actors.lanes.lane import Lane, LaneError
from cluster.expert_map import ExpertMap, ReplicaAddress
from cluster.metrics import Metrics

# How long a front waits for a newer map after a replica refused, and how often it tries a dispatch in all.
MAP_WAIT_S = 5.0
MAX_ATTEMPTS = 4


class DispatchError(RuntimeError):
    """No replica computed a part; the step can't be finished."""


class NotHeldError(RuntimeError):
    """A replica does not hold an expert: the map that the dispatch was made by has moved on."""


@dataclass(slots=True)
class _Part:
    """`rows` are the part's tokens among the step's, None for all of them. ids is -1 where a choice is elsewhere."""

    layer: int
    group: int
    rows_P: Tensor | None
    x_PD: Tensor
    gates_PK: Tensor
    ids_PK: Tensor
    map_version: int
    replica: ReplicaAddress | None = None
    ticket: Any = None
    attempts: int = 0
    failed: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Pending:
    like_TD: Tensor
    parts: list[_Part]
    started: float


class RemoteDispatcher(Dispatcher):
    """Sends each group its tokens, sums partial results in float32 in the order of groups."""

    def __init__(self, lane: Lane, metrics: Metrics) -> None:
        self.lane = lane
        self.metrics = metrics
        self._outstanding: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        self._map_changed = threading.Condition()
        self._map: ExpertMap | None = None
        self._home_LE = np.empty((0, 0), np.int16)
        self._num_bytes: Counter[tuple[str, str]] = Counter()  # (lane, direction)

    @property
    def map_version(self) -> int:
        return self._map.version if self._map else 0

    def set_map(self, expert_map: ExpertMap) -> None:
        """Route by this map from the next dispatch on. May be called from any thread; older maps are ignored."""
        expert_map.check_integrity()
        with self._map_changed:
            if expert_map.version <= self.map_version:
                return
            self.lane.connect(expert_map.replicas)
            self._home_LE = np.array([[groups[0] for groups in layer] for layer in expert_map.homes], np.int16)
            self._map = expert_map
            self._map_changed.notify_all()

    def lane_names(self) -> str:
        """The lanes in use, such as "zmq" or, if some replicas could not be reached by it, "object_ref+zmq"."""
        return "+".join(sorted({self.lane.name_for(r) for r in self._map.replicas})) if self._map else ""

    def publish_counters(self) -> None:
        """Bring counters that are kept here up to date; called when metrics are read."""
        for (lane, direction), total in tuple(self._num_bytes.items()):
            self.metrics.raise_to("lane_bytes_total", total, lane=lane, direction=direction)

    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> _Pending:
        started = time.monotonic()
        parts = self._split(layer, x_TD, ids_TK, gates_TK)
        for part in parts:
            self._send(part)
        return _Pending(x_TD, parts, started)

    def combine(self, pending: _Pending) -> Tensor:
        device = pending.like_TD.device
        sum_TD: Tensor | None = None
        for part in pending.parts:
            partial_PD = self._receive(part).to(device)
            if sum_TD is None and part.rows_P is None:
                sum_TD = partial_PD.to(torch.float32, copy=True)
                continue
            if sum_TD is None:
                sum_TD = torch.zeros_like(pending.like_TD, dtype=torch.float32)
            if part.rows_P is None:
                sum_TD += partial_PD
            else:
                sum_TD[part.rows_P.to(device)] += partial_PD
        assert sum_TD is not None, "every token has an expert in some group"
        replica = pending.parts[0].replica
        assert replica is not None
        lane = self.lane.name_for(replica)
        self.metrics.observe("dispatch_seconds", time.monotonic() - pending.started, lane=lane)
        return sum_TD.to(pending.like_TD.dtype)

    def _split(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> list[_Part]:
        """One part for each group that got a token, in the order of groups."""
        with self._map_changed:
            if self._map is None:
                raise DispatchError("no expert map has been published yet")
            version, num_groups, home_LE = self._map.version, self._map.num_groups, self._home_LE
        x_TD, gates_TK = x_TD.cpu(), gates_TK.cpu()
        # numpy: on arrays this small a torch call costs several times as much.
        ids = ids_TK.cpu().numpy().astype(np.int16)
        home_TK = np.where(ids < 0, -1, home_LE[layer][ids])
        parts = []
        for group in range(num_groups):
            here_TK = home_TK == group
            here_T = here_TK.any(axis=1)
            num_here = np.count_nonzero(here_T)
            if num_here == 0:
                continue
            here_ids = torch.from_numpy(np.where(here_TK, ids, np.int16(-1)))
            if num_here == len(here_T):
                parts.append(_Part(layer, group, None, x_TD, gates_TK, here_ids, version))
            else:
                rows = torch.from_numpy(here_T.nonzero()[0])
                parts.append(_Part(layer, group, rows, x_TD[rows], gates_TK[rows], here_ids[rows], version))
        return parts

    def _send(self, part: _Part) -> None:
        message = wire.pack_dispatch(part.layer, part.x_PD, part.gates_PK, part.ids_PK)
        while True:
            part.attempts += 1
            part.replica = self._choose(part)
            try:
                part.ticket = self.lane.send(part.replica, message)
            except LaneError:
                part.failed.add(part.replica.replica_id)
                continue
            self._outstanding[part.replica.replica_id] += 1
            self._sent[part.replica.replica_id] += 1
            self._num_bytes[self.lane.name_for(part.replica), "sent"] += len(message)
            return

    def _choose(self, part: _Part) -> ReplicaAddress:
        """The live replica of the part's group with the least outstanding messages, then the least used one."""
        assert self._map is not None
        replicas = [r for r in self._map.replicas_of(part.group) if r.replica_id not in part.failed]
        if not replicas or part.attempts > MAX_ATTEMPTS:
            raise DispatchError(f"no replica of expert group {part.group} answers")
        return min(replicas, key=lambda r: (self._outstanding[r.replica_id], self._sent[r.replica_id]))

    def _receive(self, part: _Part) -> Tensor:
        while True:
            assert part.replica is not None
            try:
                return self._partial(part)
            except NotHeldError:
                return self._reroute(part)
            except (LaneError, wire.WireError) as error:
                reason = type(error).__name__
                part.failed.add(part.replica.replica_id)
            self.metrics.inc("failovers_total", reason=reason)
            self._send(part)

    def _partial(self, part: _Part) -> Tensor:
        """Wait for the part's answer and check it."""
        assert part.replica is not None
        try:
            frame = self.lane.receive(part.ticket)
        finally:
            self._outstanding[part.replica.replica_id] -= 1
        self._num_bytes[self.lane.name_for(part.replica), "received"] += len(frame)
        answer = wire.unpack_partial(frame)
        if answer.status == wire.NOT_HELD:
            raise NotHeldError(answer.text)
        if answer.partial_TD is None:
            raise LaneError(answer.text)
        if answer.partial_TD.shape != part.x_PD.shape or answer.partial_TD.dtype != part.x_PD.dtype:
            raise wire.WireError(f"partial of shape {tuple(answer.partial_TD.shape)} {answer.partial_TD.dtype}")
        return answer.partial_TD

    def _reroute(self, part: _Part) -> Tensor:
        """The experts have moved: wait for the map that says where to, and dispatch the part by it."""
        with self._map_changed:
            if not self._map_changed.wait_for(lambda: self.map_version > part.map_version, timeout=MAP_WAIT_S):
                raise DispatchError(f"group {part.group} lacks an expert that map version {part.map_version} gives it")
        self.metrics.inc("failovers_total", reason="not_held")
        return self.combine(self.dispatch(part.layer, part.x_PD, part.ids_PK, part.gates_PK))
