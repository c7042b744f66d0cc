"""The lane within a host, the front's end: a stream socket per replica. The operating system tells of a replica's end
at once, and no thread but the two that compute takes part.
"""

import logging
import os
import select
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from actors.lanes.lane import Handed, LaneError
from actors.lanes.links import Link, LinkedLane, Ticket
from actors.lanes.stream import Stream, StreamError
from cluster.expert_map import ReplicaAddress

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class UnixLink(Link):
    socket: Stream

    @property
    def is_idle(self) -> bool:
        """Connected, and nothing is under way in either direction."""
        return self.is_connected and not (self.waiting or self.socket.unsent or self.socket.unread)

    @property
    def is_owing(self) -> bool:
        """The replica has not taken all yet that is sent to it."""
        return self.is_connected and bool(self.socket.unsent)

    def post(self, ticket: Ticket, body: bytes) -> None:
        self.waiting.add(ticket.number)
        try:
            self.socket.send(ticket.number, body)
        except StreamError as error:
            self.waiting.discard(ticket.number)
            self.is_connected = False
            raise LaneError(f"{self.endpoint}: disconnected ({error})") from None

    def take_in(self) -> None:
        """Sends on as well what could not be sent yet."""
        try:
            self.socket.flush()
            self.socket.read()
        except StreamError:
            self.is_connected = False
        self.take_frames()

    def take_frames(self) -> None:
        """Keep the answers among what has been read."""
        try:
            for number, body in self.socket.frames():
                self.keep(number, body)
        except StreamError:
            self.is_connected = False

    def close(self) -> None:
        self.is_connected = False
        self.socket.close()


class UnixLane(LinkedLane[UnixLink]):
    """Endpoint `unix`: the path of a socket, usable where it exists, that is, on the same host."""

    name = "unix"
    has_streams = True

    def has_endpoint(self, replica: ReplicaAddress) -> bool:
        return os.path.exists(dict(replica.endpoints).get(self.name, ""))

    def _open(self, replica: ReplicaAddress) -> UnixLink | None:
        if not self.has_endpoint(replica):
            return None
        path = replica.endpoint(self.name)
        try:
            return UnixLink(connected(path), path)
        except OSError as error:
            logger.error("no connection to replica %s at %s: %s", replica.replica_id, path, error)
            return None

    def __init__(self) -> None:
        super().__init__()
        self._lent: dict[str, UnixLink] = {}  # connections that are used without the lane

    def stream_to(self, replica: ReplicaAddress) -> int | None:
        link = self._links.get(replica.replica_id)
        if link is None or not link.is_idle:
            return None
        self._lent[replica.replica_id] = link
        return link.socket.fileno()

    def adopt(self, replica: ReplicaAddress, handed: Handed) -> Ticket:
        ticket, link = Ticket(replica.replica_id, handed.number), self._lent[replica.replica_id]
        link.waiting.add(handed.number)
        link.socket.unread += handed.received
        link.socket.unsent += handed.unsent
        link.take_frames()
        link.is_connected = link.is_connected and not handed.is_lost
        return ticket

    def _ready(self, links: Iterable[UnixLink], timeout_s: float) -> list[UnixLink]:
        return self._poll(links, (), timeout_s)

    def _poll(self, links: Iterable[UnixLink], others: Iterable[UnixLink], timeout_s: float) -> list[UnixLink]:
        """Also sends on to others what they have not taken yet."""
        asked = {link.socket.fileno(): link for link in links}
        owing = {link.socket.fileno(): link for link in others}
        poller = select.poll()
        for number in asked | owing:
            wanted = select.POLLIN if number in asked else 0
            poller.register(number, wanted | select.POLLOUT if number in owing else wanted)
        ready = [number for number, _ in poller.poll(1 + int(timeout_s * 1000) if timeout_s else 0)]
        for number in ready:
            if number not in asked:
                owing[number].take_in()
        return [asked[number] for number in ready if number in asked]

    def _read(self, links: list[UnixLink], timeout_s: float) -> None:
        # Only here, in the thread that exchanges: a stream is written by one thread, while others may shake hands.
        owing = [link for link in tuple(self._links.values()) if link.is_owing]
        for link in self._poll(links, owing, timeout_s):
            link.take_in()


def connected(path: str) -> Stream:
    """Raises OSError, also if somebody else listens there."""
    stream = Stream(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        stream.socket.connect(path)
        if stream.peer_uid() not in (0, os.geteuid()):
            raise PermissionError("the process that listens there belongs to another user")
    except OSError:
        stream.close()
        raise
    return stream
