"""A lane over connections that stay open: one to each replica, greeted before it is used, opened anew by a probe.

What the lanes over sockets have in common; how bytes travel is the business of their links.
"""

import contextlib
import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from actors.lanes.lane import Lane, LaneError, LaneTimeout
from actors.process.limits import file_limit, lacking_files, raise_file_limit
from cluster.expert_map import ReplicaAddress

logger = logging.getLogger(__name__)

HELLO = b"hello"  # a body that asks the server for its name
HANDSHAKE_S = 2.0


@dataclass(frozen=True, slots=True)
class Ticket:
    replica_id: str
    number: int


@dataclass(slots=True, eq=False)
class Link(ABC):
    """A connection to one replica. Connected from the replica's answer to a greeting until the connection is lost.

    A message is a number, which the answer repeats, and a body: a packed dispatch (wire.py). An answer whose number
    nobody waits for any more is dropped: a replica that was given up may wake and answer late. `answers` holds answers
    that came while another was waited for.
    """

    socket: Any
    endpoint: str
    waiting: set[int] = field(default_factory=set)
    answers: dict[int, memoryview] = field(default_factory=dict)
    is_connected: bool = False

    @abstractmethod
    def post(self, ticket: Ticket, body: bytes) -> None:
        """Send, and wait for an answer from now on. Raises LaneError."""

    @abstractmethod
    def take_in(self) -> None:
        """Read what has come, or else see whether the connection is lost. Does not wait."""

    def keep(self, number: int, answer: memoryview) -> None:
        """An answer has come."""
        if number in self.waiting:
            self.answers[number] = answer

    def hear_greeting(self, ticket: Ticket) -> bool:
        """Whether the greeting was answered, and by the replica itself: its address may have another owner by now."""
        self.take_in()
        answer = self.answers.pop(ticket.number, None)
        if answer is None:
            return False
        self.waiting.discard(ticket.number)
        self.is_connected = bytes(answer) == ticket.replica_id.encode()
        return self.is_connected

    @abstractmethod
    def close(self) -> None: ...


AnyLink = TypeVar("AnyLink", bound=Link)


class LinkedLane(Lane, Generic[AnyLink]):
    has_streams = False

    def __init__(self) -> None:
        raise_file_limit()
        self._links: dict[str, AnyLink] = {}
        self._exchanging = threading.Lock()  # connect() and probe() both put links in place
        # Links of replicas that have left: open until their last answer has come, closed by the thread that uses them.
        self._retired: list[tuple[str, AnyLink]] = []
        self._numbers = itertools.count(1)

    @abstractmethod
    def has_endpoint(self, replica: ReplicaAddress) -> bool:
        """Whether the replica listens somewhere that this host may reach."""

    @abstractmethod
    def _open(self, replica: ReplicaAddress) -> AnyLink | None:
        """None if the replica has no endpoint for this host, or this process no socket left."""

    @abstractmethod
    def _ready(self, links: Iterable[AnyLink], timeout_s: float) -> list[AnyLink]:
        """Those of the links on which something has come; waits until there is one, or the time is over."""

    @abstractmethod
    def _read(self, links: list[AnyLink], timeout_s: float) -> None:
        """Take in what has come on the links. May end early, but not before something has come or some time is over."""

    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        """send() to a replica that does not shake hands raises LaneError until it answers a probe."""
        replicas, known = tuple(replicas), dict(self._links)
        if lacking := lacking_files(len(replicas), file_limit()):
            logger.error("some replicas will be reached by object_ref only: %s", lacking)
        new: dict[str, AnyLink] = {}
        for replica in replicas:
            link = known.get(replica.replica_id)
            # A name may come back, for a process that listens elsewhere.
            is_there = link is not None and link.is_connected and link.endpoint in dict(replica.endpoints).values()
            if not is_there and (link := self._open(replica)):
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

    def _put_in_place(self, name: str, known: AnyLink | None, link: AnyLink) -> AnyLink | None:
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

    def _shake_hands(self, links: dict[str, AnyLink]) -> None:
        """Greet all side by side, and wait for all together: one deadline, however many don't answer."""
        greeted: dict[AnyLink, Ticket] = {}
        for replica_id, link in links.items():
            with contextlib.suppress(LaneError):  # whoever hangs up at once is not connected; the others may be
                greeted[link] = self._post(link, replica_id, HELLO)
        deadline = time.monotonic() + HANDSHAKE_S
        while greeted and (remaining := deadline - time.monotonic()) > 0:
            for link in self._ready(greeted, remaining):
                link.hear_greeting(greeted.pop(link))

    def send(self, replica: ReplicaAddress, message: bytes) -> Ticket:
        self.close_retired()
        link = self._links.get(replica.replica_id)
        if link is None or not link.is_connected:
            raise LaneError(f"replica {replica.replica_id} is not connected")
        return self._post(link, replica.replica_id, message)

    def _post(self, link: AnyLink, replica_id: str, body: bytes) -> Ticket:
        ticket = Ticket(replica_id, next(self._numbers))
        link.post(ticket, body)
        return ticket

    def receive(self, tickets: Sequence[Ticket], timeout_s: float) -> tuple[Ticket, memoryview]:
        by_link: dict[AnyLink, list[Ticket]] = {}
        for ticket in tickets:
            link = self._link_of(ticket)
            if link is None:
                raise LaneError(f"replica {ticket.replica_id} has left the map", ticket)
            by_link.setdefault(link, []).append(ticket)
        return self._wait(by_link, timeout_s)

    def _wait(self, by_link: dict[AnyLink, list[Ticket]], timeout_s: float) -> tuple[Ticket, memoryview]:
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

    def _link_of(self, ticket: Ticket) -> AnyLink | None:
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

    def _reopen(self, replica: ReplicaAddress, lost: AnyLink | None) -> AnyLink:
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
