"""The fast lane, the front's end: a connection per replica that stays open, raw frames, no Ray on the way."""

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence

import zmq

from actors.lanes.lane import Lane, LaneError, LaneTimeout
from actors.lanes.zmq_link import HELLO, SLICE_MS, Link, Ticket, new_socket
from actors.process.limits import raise_file_limit
from cluster.expert_map import ReplicaAddress
from cluster.messages.actors import LaneKeys

logger = logging.getLogger(__name__)

HANDSHAKE_S = 2.0


class ZmqLane(Lane):
    """Endpoints `ipc` (used where its socket file exists, that is, on the same host) and `tcp` (CURVE)."""

    name = "zmq"

    def __init__(self, keys: LaneKeys) -> None:
        raise_file_limit()
        self._keys = keys
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))
        self._links: dict[str, Link] = {}
        self._exchanging = threading.Lock()  # connect() and probe() both put links in place
        # Links of replicas that have left: open until their last answer has come, closed by the thread that uses them.
        self._retired: list[tuple[str, Link]] = []
        self._numbers = itertools.count(1)

    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        """send() to a replica that does not shake hands raises LaneError until it answers a probe."""
        replicas, known = tuple(replicas), dict(self._links)
        new: dict[str, Link] = {}
        for replica in replicas:
            link = known.get(replica.replica_id)
            if not (link and link.is_connected) and (link := self._open(replica)):
                new[replica.replica_id] = link
        self._shake_hands(new)
        for name, link in new.items():
            if link.is_connected:
                self._put_in_place(name, known.get(name), link)
            else:  # nobody else has seen it
                link.close()
        for name in set(self._links) - {replica.replica_id for replica in replicas}:
            with self._exchanging:
                self._retired.append((name, self._links[name]))
                del self._links[name]

    def _put_in_place(self, name: str, known: Link | None, link: Link) -> Link | None:
        """The replica's link from now on: this one, unless another thread has put one in the place of the known one
        meanwhile. That one may be in use already; this one is known to nobody, and closed.
        """
        with self._exchanging:
            current = self._links.get(name)
            if current is not known:
                link.close()
                return current
            if known:
                self._retired.append((name, known))
            self._links[name] = link
            return link

    def is_connected(self, replica_id: str) -> bool:
        link = self._links.get(replica_id)
        return link is not None and link.is_connected

    def _open(self, replica: ReplicaAddress) -> Link | None:
        """None if the replica has no endpoint for this host, or this process no socket left."""
        endpoint = usable_endpoint(replica)
        if endpoint is None:
            return None
        try:
            return Link(new_socket(self._context, endpoint, self._keys), endpoint)
        except zmq.ZMQError as error:
            logger.error("no connection to replica %s at %s: %s", replica.replica_id, endpoint, error)
            return None

    def _shake_hands(self, links: dict[str, Link]) -> None:
        """Greet all side by side, and wait for all together: one deadline, however many don't answer."""
        poller = zmq.Poller()
        greeted: dict[zmq.Socket[bytes], tuple[Link, Ticket]] = {}
        for replica_id, link in links.items():
            with contextlib.suppress(LaneError):  # whoever hangs up at once is not connected; the others may be
                greeted[link.socket] = link, self._post(link, replica_id, HELLO)
                poller.register(link.socket, zmq.POLLIN)
        deadline = time.monotonic() + HANDSHAKE_S
        while greeted and (remaining := deadline - time.monotonic()) > 0:
            for socket, _ in poller.poll(1 + int(remaining * 1000)):
                link, ticket = greeted.pop(socket)
                link.hear_greeting(ticket)
                poller.unregister(socket)

    def send(self, replica: ReplicaAddress, message: bytes) -> Ticket:
        self.close_retired()
        link = self._links.get(replica.replica_id)
        if link is None or not link.is_connected:
            raise LaneError(f"replica {replica.replica_id} is not connected")
        return self._post(link, replica.replica_id, message)

    def _post(self, link: Link, replica_id: str, body: bytes) -> Ticket:
        ticket = Ticket(replica_id, next(self._numbers))
        link.post(ticket, body)
        return ticket

    def receive(self, tickets: Sequence[Ticket], timeout_s: float) -> tuple[Ticket, memoryview]:
        by_link: dict[Link, list[Ticket]] = {}
        for ticket in tickets:
            link = self._link_of(ticket)
            if link is None:
                raise LaneError(f"replica {ticket.replica_id} has left the map", ticket)
            by_link.setdefault(link, []).append(ticket)
        return self._wait(by_link, timeout_s)

    def _wait(self, by_link: dict[Link, list[Ticket]], timeout_s: float) -> tuple[Ticket, memoryview]:
        deadline = time.monotonic() + timeout_s
        has_looked = False
        while True:
            for link, tickets in by_link.items():
                for ticket in tickets:
                    if ticket.number in link.answers:
                        link.waiting.discard(ticket.number)
                        return ticket, link.answers.pop(ticket.number)
                if not link.is_connected:
                    raise LaneError(f"{link.endpoint}: disconnected", tickets[0])
            remaining = deadline - time.monotonic()
            if remaining <= 0 and has_looked:  # without time left, what has come already still counts
                raise LaneTimeout(f"no answer within {timeout_s:.3f} s")
            self._read(list(by_link), max(0.0, remaining))
            has_looked = True

    def _read(self, links: list[Link], timeout_s: float) -> None:
        """Take in what has come on the links; waits until something has, or a slice or the time is over."""
        if len(links) == 1 and 1000 * timeout_s >= SLICE_MS:
            links[0].take_in(wait=True)
            return
        poller = zmq.Poller()
        for link in links:
            poller.register(link.socket, zmq.POLLIN)
        poller.poll(min(SLICE_MS, 1 + int(timeout_s * 1000)) if timeout_s else 0)
        for link in links:
            link.take_in()

    def _link_of(self, ticket: Ticket) -> Link | None:
        current = self._links.get(ticket.replica_id)
        if current and ticket.number in current.waiting:
            return current
        # A name may have several: it left, came back over a new connection, and left again.
        retired = (link for name, link in self._retired if name == ticket.replica_id and ticket.number in link.waiting)
        return next(retired, None)

    def close_retired(self) -> None:
        """For the thread that sends: a socket belongs to it. Those that still owe an answer stay open."""
        for _ in range(len(self._retired)):
            name, link = self._retired.pop(0)
            link.take_in()
            if link.is_connected and link.waiting:
                self._retired.append((name, link))
            else:
                link.close()

    def forget(self, ticket: Ticket) -> None:
        if link := self._link_of(ticket):
            link.waiting.discard(ticket.number)
            link.answers.pop(ticket.number, None)

    def probe(self, replica: ReplicaAddress) -> Ticket:
        """Greets; over a new connection if there is none. is_alive() connects it."""
        self.close_retired()
        link = self._links.get(replica.replica_id)
        if link is None or not link.is_connected:
            link = self._reopen(replica, link)
        return self._post(link, replica.replica_id, HELLO)

    def _reopen(self, replica: ReplicaAddress, lost: Link | None) -> Link:
        opened = self._open(replica)
        link = opened and self._put_in_place(replica.replica_id, lost, opened)
        if link is None:
            raise LaneError(f"replica {replica.replica_id} is not connected")
        return link

    def is_alive(self, ticket: Ticket) -> bool:
        link = self._links.get(ticket.replica_id)
        return link is not None and link.hear_greeting(ticket)

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
