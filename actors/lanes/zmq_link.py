"""The zmq lane's connection to one replica: one socket.

A message is two frames: an 8-byte number that the answer repeats, and a packed dispatch (wire.py).

zmq is told not to connect again by itself: its socket then has nowhere to send to as soon as a connection is lost,
which tells of the loss without a monitor (two more sockets per replica, and a queue of events that blocks all
connections once nobody has read it for some minutes), and nothing is sent to whoever takes over a replica's port.
"""

import struct
from dataclasses import dataclass

import zmq

from actors.kernels.heads import MAX_MESSAGE
from actors.lanes.lane import LaneError
from actors.lanes.links import Link, Ticket
from cluster.messages.actors import LaneKeys

NUMBER = struct.Struct("<Q")
# How long a single read of the socket waits. Only then is a loss looked for: it would cost each answer another call.
SLICE_MS = 10
# A host that has vanished sends no reset: bytes that it has not acknowledged for this long mean that it is lost.
VANISHED_MS = 10_000


@dataclass(slots=True, eq=False)
class ZmqLink(Link):
    def post(self, ticket: Ticket, body: bytes) -> None:
        self.waiting.add(ticket.number)
        try:
            self.socket.send_multipart([NUMBER.pack(ticket.number), body], zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            self.waiting.discard(ticket.number)
            self.is_connected = False
            raise LaneError(f"{self.endpoint}: disconnected ({error})") from None

    def take_in(self, *, wait: bool = False) -> None:
        """If told to wait, for SLICE_MS at most."""
        try:
            frames = self.socket.recv_multipart(0 if wait else zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            if not isinstance(error, zmq.Again) or not self.socket.poll(0, zmq.POLLOUT):
                self.is_connected = False
            return
        if len(frames) == 2 and len(frames[0]) == NUMBER.size:
            (number,) = NUMBER.unpack(frames[0].buffer)
            self.keep(number, frames[1].buffer)

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
