"""The fast lane, the front's end: one socket per replica that stays open, raw frames, no Ray on the way.

A message is two frames: an 8-byte number that the answer repeats, and a packed dispatch (wire.py). An answer whose
number nobody waits for any more is dropped: a replica that was given up may wake and answer late.
"""

import contextlib
import itertools
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import zmq
from zmq.utils.monitor import recv_monitor_message

from actors.lanes.lane import Lane, LaneError
from cluster.expert_map import ReplicaAddress
from cluster.messages import LaneKeys

NUMBER = struct.Struct("<Q")
HELLO = b"hello"  # a body that asks the server for its name
HANDSHAKE_S = 2.0
LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED


@dataclass(frozen=True, slots=True)
class Ticket:
    replica_id: str
    number: int


@dataclass(slots=True)
class _Link:
    """`answers` holds answers that came while another was waited for."""

    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    endpoint: str
    waiting: set[int] = field(default_factory=set)
    answers: dict[int, memoryview] = field(default_factory=dict)
    is_lost: bool = False
    poller: zmq.Poller = field(default_factory=zmq.Poller)

    def __post_init__(self) -> None:
        self.poller.register(self.socket, zmq.POLLIN)
        self.poller.register(self.monitor, zmq.POLLIN)

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)


class ZmqLane(Lane):
    """Endpoints `ipc` (used where its socket file exists, that is, on the same host) and `tcp` (CURVE)."""

    name = "zmq"

    def __init__(self, keys: LaneKeys, timeout_s: float = 60.0) -> None:
        self._keys = keys
        self._timeout_s = timeout_s
        self._context = zmq.Context()
        self._links: dict[str, _Link] = {}
        self._retired: list[_Link] = []  # closed by the thread that uses the sockets
        self._numbers = itertools.count(1)

    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        """Replicas that don't shake hands are left out; send() to them raises LaneError."""
        links: dict[str, _Link] = {}
        for replica in replicas:
            known = self._links.get(replica.replica_id)
            if known and not known.is_lost:
                links[replica.replica_id] = known
            elif link := self._open(replica):
                links[replica.replica_id] = link
        self._retired += [link for link in self._links.values() if link not in links.values()]
        self._links = links

    def is_connected(self, replica_id: str) -> bool:
        link = self._links.get(replica_id)
        return link is not None and not link.is_lost

    def _open(self, replica: ReplicaAddress) -> _Link | None:
        endpoint = usable_endpoint(replica)
        if endpoint is None:
            return None
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        if endpoint.startswith("tcp:"):
            socket.curve_serverkey = self._keys.server_public
            socket.curve_publickey = self._keys.client_public
            socket.curve_secretkey = self._keys.client_secret
        link = _Link(socket, socket.get_monitor_socket(LOST), endpoint)
        socket.connect(endpoint)
        if self._shake_hands(link, replica.replica_id):
            return link
        link.close()
        return None

    def _shake_hands(self, link: _Link, replica_id: str) -> bool:
        number = next(self._numbers)
        link.waiting.add(number)
        link.socket.send_multipart([NUMBER.pack(number), HELLO])
        with contextlib.suppress(LaneError):
            return bytes(self._wait(link, number, HANDSHAKE_S)) == replica_id.encode()
        return False

    def send(self, replica: ReplicaAddress, message: bytes) -> Ticket:
        while self._retired:
            self._retired.pop().close()
        link = self._links.get(replica.replica_id)
        if link is None or link.is_lost:
            raise LaneError(f"replica {replica.replica_id} is not connected")
        number = next(self._numbers)
        link.waiting.add(number)
        try:
            link.socket.send_multipart([NUMBER.pack(number), message], zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            link.waiting.discard(number)
            raise LaneError(f"replica {replica.replica_id}: {error}") from None
        return Ticket(replica.replica_id, number)

    def receive(self, ticket: Ticket) -> memoryview:
        link = self._links.get(ticket.replica_id)
        if link is None:
            raise LaneError(f"replica {ticket.replica_id} has left the map")
        return self._wait(link, ticket.number, self._timeout_s)

    def _wait(self, link: _Link, number: int, timeout_s: float) -> memoryview:
        deadline = time.monotonic() + timeout_s
        try:
            while number not in link.answers:
                remaining = deadline - time.monotonic()
                if link.is_lost or remaining <= 0:
                    raise LaneError(f"{link.endpoint}: {'disconnected' if link.is_lost else 'no answer in time'}")
                self._read(link, remaining)
            return link.answers.pop(number)
        finally:
            link.waiting.discard(number)

    def _read(self, link: _Link, timeout_s: float) -> None:
        """Take in one answer, or the news that the connection is gone."""
        ready = dict(link.poller.poll(max(1, int(timeout_s * 1000))))
        if link.socket in ready:
            frames = link.socket.recv_multipart(copy=False)
            if len(frames) == 2 and len(frames[0]) == NUMBER.size:
                (number,) = NUMBER.unpack(frames[0].buffer)
                if number in link.waiting:
                    link.answers[number] = frames[1].buffer
        elif link.monitor in ready:
            recv_monitor_message(link.monitor)
            link.is_lost = True

    def close(self) -> None:
        for link in (*self._links.values(), *self._retired):
            link.close()
        self._links, self._retired = {}, []
        self._context.term()


def usable_endpoint(replica: ReplicaAddress) -> str | None:
    """The replica's ipc socket if it is on this host, else its tcp endpoint, else None."""
    endpoints = dict(replica.endpoints)
    ipc = endpoints.get("ipc")
    if ipc and os.path.exists(ipc.removeprefix("ipc://")):
        return ipc
    return endpoints.get("tcp")
