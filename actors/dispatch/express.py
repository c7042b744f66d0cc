"""RemoteDispatcher with a native way for dispatches on which nothing is out of the ordinary: over stream sockets of
this host, a layer or a whole step in one call.

That way decides nothing. Which replicas may be used and how long they are waited for is asked of RemoteDispatcher;
what does not go as it should is handed to it as far as it has come: messages that are on their way, bytes that have
been read.

Shapes: T tokens, D hidden, K top-k, G groups, L layers; B bits of a number of tokens.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actors.dispatch.dispatcher import FrontLayers
from actors.dispatch.parts import HomeTable, Part, Sent, split
from actors.dispatch.remote import Pending, RemoteDispatcher
from actors.dispatch.step import Step
from actors.kernels import abi
from actors.kernels.exchange import (
    CODES,
    COLUMN,
    DONE,
    FIRST_NUMBER,
    NOT_BEGUN,
    NativeExchange,
    Records,
    Table,
    received_of,
)
from actors.kernels.heads import FRAME
from actors.lanes import wire
from actors.lanes.lane import Handed
from actors.staging import DIRECT
from cluster.expert_map import ReplicaAddress

# Places in a record of a part.
STATE, REPLICA, TOKENS, NUMBER, SENT_AT, ANSWERED_AT, COMPUTE_NS, SENT, LENGTH, RECEIVED, ANSWER = (
    COLUMN[name]
    for name in (
        "state", "replica", "tokens", "number", "sent_at", "answered_at", "compute_ns", "sent", "length", "received",
        "answer",
    )
)  # fmt: skip
# How long deadlines hold that were derived from answer times.
PATIENCE_KNOWN_S = 0.1


class ExpressDispatcher(RemoteDispatcher):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._native: NativeExchange | None = None
        self._has_changed = True  # who may be used, or their sockets
        self._usable: list[ReplicaAddress] = []  # as the native exchange counts them
        # What it was made of: the map's version and homes, however the map has changed since.
        self._map: tuple[int, list[HomeTable]] = 0, []
        self._table: Table | None = None
        self._next_number = FIRST_NUMBER
        self._begun: Step | None = None
        self._patience_GB, self._known_until = np.empty((0, 0)), 0.0

    def exchange(self, layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        started = time.monotonic()
        if (native := self._ready(x_TD)) is None:
            return super().exchange(layer, x_TD, ids_TK, gates_TK)
        outcome, sum_TD, records_GX = native.run(layer, x_TD, ids_TK, gates_TK)
        if outcome == NOT_BEGUN:
            return super().exchange(layer, x_TD, ids_TK, gates_TK)
        seconds = time.monotonic() - started
        self.step.wait_seconds += seconds
        if outcome != DONE:
            return self._take_over(layer, (x_TD, ids_TK, gates_TK), records_GX, started)
        self._account(records_GX, [seconds])
        return sum_TD

    def go_through(self, layers: FrontLayers, number: int, combined_TD: Tensor | None) -> tuple[Tensor, int]:
        steps, native = layers.native_steps(), self._ready(layers.x_TD)
        if steps is None or native is None:
            return super().go_through(layers, number, combined_TD)
        if combined_TD is not None:
            steps.combined_TD.copy_(combined_TD)
        reached, outcome, records_LGX, nanoseconds_L = native.walk(steps, number)
        seconds = (nanoseconds_L[number : reached + 1] / 1e9).tolist()
        self.step.wait_seconds += sum(seconds)
        if reached > number:
            self._account(records_LGX[number:reached].reshape(-1, len(COLUMN)), seconds[: reached - number])
        if reached == layers.num_layers:
            return steps.combined_TD, reached
        routed = steps.h_TD, layers.chosen(reached), steps.gates_TK
        if outcome == NOT_BEGUN:
            return super().exchange(reached, *routed), reached + 1
        started = time.monotonic() - seconds[-1]
        return self._take_over(reached, routed, records_LGX[reached], started), reached + 1

    def _send(self, part: Part) -> bool:
        self._has_changed = True
        return super()._send(part)

    def _ready(self, x_TD: Tensor) -> NativeExchange | None:
        """For this step, if it may go the native way."""
        if self._routes.now()[0] != self._map[0]:
            self._follow_map()
            self._has_changed = True
        self._look_after_the_lost()
        if self._late or self._breaker or self._has_changed:
            self._native = self._made()
            self._has_changed = bool(self._late or self._breaker)
        if self._native is None or x_TD.dtype not in CODES or x_TD.device.type != "cpu":
            return None
        if self._begun is not self.step:
            self._native.begin(*self.step.id, x_TD.dtype, self._deadlines(len(x_TD)))
            self._begun = self.step
        return self._native

    def _made(self) -> NativeExchange | None:
        """By what may be used now; None unless all of it is reached by streams on which nothing is under way."""
        if self._native:
            self._next_number = self._native.next_number
        self._begun, self._known_until = None, 0.0
        self.lane.close_retired()
        version, homes, by_group = self._routes.now()
        if version != self._map[0]:
            self._map, self._table = (version, homes), Table.of([layer.arrays for layer in homes])
        usable: list[list[tuple[ReplicaAddress, int]]] = []
        for group in range(self._num_groups):
            usable.append([])
            for replica in by_group.get(group, []):
                if self._breaker.is_open(replica.replica_id):
                    continue
                if (stream := self.lane.stream_to(replica)) is None:
                    return None
                usable[-1].append((replica, stream))
            if not usable[-1]:
                return None
        self._usable = [replica for members in usable for replica, _ in members]
        counted = [[(stream, self._num_sent[replica.replica_id]) for replica, stream in members] for members in usable]
        assert self._table is not None
        return NativeExchange(counted, self._table, self._next_number)

    @property
    def _num_groups(self) -> int:
        return max(layer.num_groups for layer in self._map[1])

    def _deadlines(self, num_tokens: int) -> NDArray[np.float64]:
        """[G, B] seconds after which a message to a group counts as late, as RemoteDispatcher sees it. Found anew now
        and then: with hundreds of replicas, it takes milliseconds.
        """
        bits, now = num_tokens.bit_length() + 1, time.monotonic()
        if now >= self._known_until or bits > self._patience_GB.shape[1]:
            patience = []
            for group in range(self._num_groups):
                may_hedge = bool(self._hedges) and len(tuple(islice(self._live(group), 2))) == 2
                patience.append([self._deadline(group, 1 << bit >> 1, may_hedge) for bit in range(bits)])
            self._patience_GB, self._known_until = np.array(patience), now + PATIENCE_KNOWN_S
        return self._patience_GB

    def _account(self, records_NX: Records, seconds: Sequence[float]) -> None:
        """For exchanges that are done. Few numbers: plain Python is faster than arrays."""
        received = compute_ns = 0
        ages: dict[tuple[int, int], list[int]] = defaultdict(list)
        sent = [record for record in records_NX.tolist() if record[STATE] != abi.NO_TOKENS]
        for record in sent:
            received += record[RECEIVED] - FRAME.layout.size
            compute_ns += record[COMPUTE_NS]
            ages[record[REPLICA], record[TOKENS].bit_length()].append(record[ANSWERED_AT] - record[SENT_AT])
        lane = self._account_sent(sent)
        self._num_bytes[lane, "received"] += received
        self.step.compute_seconds += compute_ns / 1e9
        for each in seconds:
            self.metrics.observe("dispatch_seconds", each, lane=lane)
        for (replica, bits), taken in ages.items():
            mean = sum(taken) / len(taken) / 1e9
            self._latency.observe(self._usable[replica].replica_id, 1 << bits >> 1, mean, len(taken))

    def _account_sent(self, sent: list[list[int]]) -> str:
        """Returns the lane's name."""
        lane = self.lane.name_for(self._usable[sent[0][REPLICA]])
        self._hedges.earn(len(sent))
        for record in sent:
            self._num_sent[self._usable[record[REPLICA]].replica_id] += 1
            self._num_bytes[lane, "sent"] += record[LENGTH] - FRAME.layout.size
        return lane

    def _take_over(
        self, layer: int, routed: tuple[Tensor, Tensor, Tensor], records_GX: Records, started: float
    ) -> Tensor:
        """Go on with an exchange that is not done, as if its messages had been sent from here."""
        x_TD, ids_TK, gates_TK = routed
        version, homes = self._map
        parts = split(layer, x_TD, ids_TK, gates_TK, homes[layer], version)
        sent = [record for record in records_GX.tolist() if record[STATE] != abi.NO_TOKENS]
        lane = self._account_sent(sent)
        for part, record in zip(parts, sent, strict=True):
            self._adopt(part, record)
        self._has_changed = True
        return self.combine(Pending(x_TD, parts, started, lane, DIRECT))

    def _adopt(self, part: Part, record: list[int]) -> None:
        replica, number = self._usable[record[REPLICA]], record[NUMBER]
        unsent = b""
        if record[SENT] < record[LENGTH]:
            message = wire.pack_dispatch(part.layer, part.x_PD, part.gates_PK, part.ids_PK, self.step.id)
            unsent = (FRAME.layout.pack(number, len(message)) + message)[record[SENT] :]
        received = received_of(record[ANSWER], record[RECEIVED])
        handed = Handed(number, received, unsent, is_lost=record[STATE] == abi.LOST)
        part.sent.append(Sent(replica, self.lane.adopt(replica, handed), record[SENT_AT] / 1e9))
        part.tried.add(replica.replica_id)
        self._outstanding[replica.replica_id] += 1
