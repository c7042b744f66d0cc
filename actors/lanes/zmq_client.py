"""The fast lane, the front's end: one socket per replica that stays open, raw frames, no Ray on the way.

A message is two frames: an 8-byte number that the answer repeats, and a packed dispatch (wire.py). An answer whose
number nobody waits for any more is dropped: a replica that was given up may wake and answer late.
"""

import contextlib
import itertools
import os
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import zmq
from zmq.utils.monitor import recv_monitor_message

from actors.lanes.lane import Lane, LaneError, LaneTimeout
from cluster.expert_map import ReplicaAddress
from cluster.messages import LaneKeys

NUMBER = struct.Struct("<Q")
HELLO = b"hello"  # a body that asks the server for its name
HANDSHAKE_S = 2.0
LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
# How long a single read of the socket waits. Only then is the monitor asked: it would cost each answer another poll.
SLICE_MS = 10


@dataclass(frozen=True, slots=True)
class Ticket:
    replica_id: str
    number: int


@dataclass(slots=True, eq=False)
class _Link:
    """`answers` holds answers that came while another was waited for."""

    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    endpoint: str
    waiting: set[int] = field(default_factory=set)
    answers: dict[int, memoryview] = field(default_factory=dict)
    is_lost: bool = False

    def take_in(self, *, wait: bool = False) -> None:
        """Read an answer, or else the news that the connection is gone. If told to wait, for SLICE_MS at most."""
        try:
            frames = self.socket.recv_multipart(0 if wait else zmq.DONTWAIT, copy=False)
        except zmq.Again:
            if self.monitor.poll(0):
                recv_monitor_message(self.monitor)
                self.is_lost = True
            return
        if len(frames) == 2 and len(frames[0]) == NUMBER.size:
            (number,) = NUMBER.unpack(frames[0].buffer)
            if number in self.waiting:
                self.answers[number] = frames[1].buffer

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)


class ZmqLane(Lane):
    """Endpoints `ipc` (used where its socket file exists, that is, on the same host) and `tcp` (CURVE)."""

    name = "zmq"

    def __init__(self, keys: LaneKeys) -> None:
        self._keys = keys
        self._context = zmq.Context()
        self._links: dict[str, _Link] = {}
        # Links of replicas that have left: open until their last answer has come, closed by the thread that uses them.
        self._retired: list[tuple[str, _Link]] = []
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
        self._retired.extend((name, link) for name, link in self._links.items() if link is not links.get(name))
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
        socket.rcvtimeo = SLICE_MS
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
        ticket = self._post(link, replica_id, HELLO)
        with contextlib.suppress(LaneError):
            return bytes(self._wait({link: [ticket]}, HANDSHAKE_S)[1]) == replica_id.encode()
        return False

    def send(self, replica: ReplicaAddress, message: bytes) -> Ticket:
        if self._retired:
            self._close_retired()
        link = self._links.get(replica.replica_id)
        if link is None or link.is_lost:
            raise LaneError(f"replica {replica.replica_id} is not connected")
        return self._post(link, replica.replica_id, message)

    def _post(self, link: _Link, replica_id: str, body: bytes) -> Ticket:
        number = next(self._numbers)
        link.waiting.add(number)
        try:
            link.socket.send_multipart([NUMBER.pack(number), body], zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            link.waiting.discard(number)
            raise LaneError(f"replica {replica_id}: {error}") from None
        return Ticket(replica_id, number)

    def receive(self, tickets: Sequence[Ticket], timeout_s: float) -> tuple[Ticket, memoryview]:
        by_link: dict[_Link, list[Ticket]] = {}
        for ticket in tickets:
            link = self._link_of(ticket)
            if link is None:
                raise LaneError(f"replica {ticket.replica_id} has left the map", ticket)
            by_link.setdefault(link, []).append(ticket)
        return self._wait(by_link, timeout_s)

    def _wait(self, by_link: dict[_Link, list[Ticket]], timeout_s: float) -> tuple[Ticket, memoryview]:
        deadline = time.monotonic() + timeout_s
        has_looked = False
        while True:
            for link, tickets in by_link.items():
                for ticket in tickets:
                    if ticket.number in link.answers:
                        link.waiting.discard(ticket.number)
                        return ticket, link.answers.pop(ticket.number)
                if link.is_lost:
                    raise LaneError(f"{link.endpoint}: disconnected", tickets[0])
            remaining = deadline - time.monotonic()
            if remaining <= 0 and has_looked:  # without time left, what has come already still counts
                raise LaneTimeout(f"no answer within {timeout_s:.3f} s")
            self._read(list(by_link), max(0.0, remaining))
            has_looked = True

    def _read(self, links: list[_Link], timeout_s: float) -> None:
        """Take in what has come on the links; waits until something has, or a slice or the time is over."""
        if len(links) == 1 and 1000 * timeout_s >= SLICE_MS:
            links[0].take_in(wait=True)
            return
        poller = zmq.Poller()
        for link in links:
            poller.register(link.socket, zmq.POLLIN)
            poller.register(link.monitor, zmq.POLLIN)
        ready = dict(poller.poll(max(1, int(timeout_s * 1000)) if timeout_s else 0))
        for link in links:
            if link.socket in ready or link.monitor in ready:
                link.take_in()

    def _link_of(self, ticket: Ticket) -> _Link | None:
        current = self._links.get(ticket.replica_id)
        if current and ticket.number in current.waiting:
            return current
        # A name may have several: it left, came back over a new connection, and left again.
        retired = (link for name, link in self._retired if name == ticket.replica_id and ticket.number in link.waiting)
        return next(retired, current)

    def _close_retired(self) -> None:
        for entry in tuple(self._retired):
            _, link = entry
            if link.is_lost or not link.waiting:
                self._retired.remove(entry)
                link.close()

    def forget(self, ticket: Ticket) -> None:
        if link := self._link_of(ticket):
            link.waiting.discard(ticket.number)
            link.answers.pop(ticket.number, None)

    def probe(self, replica: ReplicaAddress) -> Ticket:
        """A connection that comes back is opened by zmq itself; the greeting waits for it."""
        link = self._links.get(replica.replica_id)
        if link is None:
            raise LaneError(f"replica {replica.replica_id} is not connected")
        return self._post(link, replica.replica_id, HELLO)

    def is_alive(self, ticket: Ticket) -> bool:
        link = self._links.get(ticket.replica_id)
        if link is None:
            return False
        self._read([link], 0)
        if link.answers.pop(ticket.number, None) is None:
            return False
        link.waiting.discard(ticket.number)
        link.is_lost = False
        return True

    def close(self) -> None:
        for link in (*self._links.values(), *(link for _, link in self._retired)):
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
