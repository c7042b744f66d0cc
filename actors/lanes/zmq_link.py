"""The fast lane's connection to one replica: one socket.

A message is two frames: an 8-byte number that the answer repeats, and a packed dispatch (wire.py). An answer whose
number nobody waits for any more is dropped: a replica that was given up may wake and answer late.

zmq is told not to connect again by itself: its socket then has nowhere to send to as soon as a connection is lost,
which tells of the loss without a monitor (two more sockets per replica, and a queue of events that blocks all
connections once nobody has read it for some minutes), and nothing is sent to whoever takes over a replica's port.
"""

import struct
from dataclasses import dataclass, field

import zmq

from actors.lanes.lane import LaneError
from cluster.messages.actors import LaneKeys

NUMBER = struct.Struct("<Q")
HELLO = b"hello"  # a body that asks the server for its name
# A dispatch of 16k tokens of hidden size 4096 in float32 is 256 MiB; nothing larger is a message of ours.
MAX_MESSAGE = 512 * 2**20
# How long a single read of the socket waits. Only then is a loss looked for: it would cost each answer another call.
SLICE_MS = 10
# A host that has vanished sends no reset: bytes that it has not acknowledged for this long mean that it is lost.
VANISHED_MS = 10_000


@dataclass(frozen=True, slots=True)
class Ticket:
    replica_id: str
    number: int


@dataclass(slots=True, eq=False)
class Link:
    """Connected from the replica's answer to a greeting until the connection is lost. `answers` holds answers that
    came while another was waited for.
    """

    socket: zmq.Socket[bytes]
    endpoint: str
    waiting: set[int] = field(default_factory=set)
    answers: dict[int, memoryview] = field(default_factory=dict)
    is_connected: bool = False

    def post(self, ticket: Ticket, body: bytes) -> None:
        """Raises LaneError."""
        self.waiting.add(ticket.number)
        try:
            self.socket.send_multipart([NUMBER.pack(ticket.number), body], zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            self.waiting.discard(ticket.number)
            self.is_connected = False
            raise LaneError(f"{self.endpoint}: disconnected ({error})") from None

    def take_in(self, *, wait: bool = False) -> None:
        """Read an answer, or else see whether the connection is lost. If told to wait, for SLICE_MS at most."""
        try:
            frames = self.socket.recv_multipart(0 if wait else zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            if not isinstance(error, zmq.Again) or not self.socket.poll(0, zmq.POLLOUT):
                self.is_connected = False
            return
        if len(frames) == 2 and len(frames[0]) == NUMBER.size:
            (number,) = NUMBER.unpack(frames[0].buffer)
            if number in self.waiting:
                self.answers[number] = frames[1].buffer

    def hear_greeting(self, ticket: Ticket) -> bool:
        """Whether the greeting was answered, and by the replica itself: its port may have another owner by now."""
        self.take_in()
        answer = self.answers.pop(ticket.number, None)
        if answer is None:
            return False
        self.waiting.discard(ticket.number)
        self.is_connected = bytes(answer) == ticket.replica_id.encode()
        return self.is_connected

    def close(self) -> None:
        self.is_connected = False
        self.socket.close(linger=0)


def new_socket(context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, keys: LaneKeys) -> "zmq.Socket[bytes]":
    """Connected to the endpoint, as far as zmq tells. Raises ZMQError."""
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.rcvtimeo = SLICE_MS
    socket.reconnect_ivl = -1
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
    if endpoint.startswith("tcp:"):
        socket.setsockopt(zmq.TCP_MAXRT, VANISHED_MS)
        socket.curve_serverkey = keys.server_public
        socket.curve_publickey = keys.client_public
        socket.curve_secretkey = keys.client_secret
    socket.connect(endpoint)
    return socket
