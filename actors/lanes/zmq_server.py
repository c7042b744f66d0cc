"""The fast lane, the replica's end: a thread that receives dispatches and computes them itself.

Fronts on this host come over ipc, in a directory only this user may enter; others over tcp with CURVE, where only the
application's client key is let in. Messages that wait together for the same layer are computed as one batch. What is
no message of ours is dropped and counted.
"""

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq
from zmq.auth.thread import ThreadAuthenticator

from actors.lanes import wire
from actors.lanes.zmq_link import HELLO, MAX_MESSAGE, NUMBER
from cluster.leftovers import OwnedDirectory, sweep
from cluster.messages.actors import LaneKeys

logger = logging.getLogger(__name__)

# Dispatches taken from the sockets before any is computed: fronts share a batch, and none waits for long.
MAX_DRAIN = 64
STOP_CHECK_MS = 200
DIRECTORY = "lane-"

# Answers for dispatches of one layer, in their order.
ComputeBatch = Callable[[list[wire.Dispatch]], list[bytes]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    socket: zmq.Socket[bytes]
    peer: bytes
    number: bytes
    dispatch: wire.Dispatch

    def answer(self, body: bytes) -> None:
        self.socket.send_multipart([self.peer, self.number, body], copy=False)


class ZmqServer:
    def __init__(self, replica_id: str, compute: ComputeBatch, keys: LaneKeys, host: str, directory: str) -> None:
        self.num_dropped = 0
        self._replica_id = replica_id
        self._compute = compute
        self._keys = keys
        self._host = host
        self._context = zmq.Context()
        sweep(DIRECTORY, directory)
        self._directory = OwnedDirectory(DIRECTORY, directory)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zmq-lane", daemon=True)

    def start(self) -> tuple[tuple[str, str], ...]:
        """Listen and serve; returns the endpoints for the expert map."""
        self._auth = ThreadAuthenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback("*", credentials_provider=_OnlyClient(self._keys.client_public))
        ipc, tcp = self._socket(), self._socket()
        tcp.curve_server = True
        tcp.curve_secretkey = self._keys.server_secret
        tcp.curve_publickey = self._keys.server_public
        path = os.path.join(self._directory.path, "lane")
        ipc.bind(f"ipc://{path}")
        port = tcp.bind_to_random_port(f"tcp://{self._host}")
        self._sockets = (ipc, tcp)
        self._thread.start()
        return (("ipc", f"ipc://{path}"), ("tcp", f"tcp://{self._host}:{port}"))

    def _socket(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        socket.setsockopt(zmq.IPV6, 1 if ":" in self._host else 0)
        return socket

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        while not self._stop.is_set():
            try:
                self._serve(list(self._drain(poller)))
            except Exception:
                logger.exception("%s: the lane goes on after an unexpected error", self._replica_id)

    def _drain(self, poller: zmq.Poller) -> Iterator[_Waiting]:
        """Dispatches that wait now, a turn for each socket; ROUTER sockets take turns between their peers."""
        ready = [socket for socket, _ in poller.poll(STOP_CHECK_MS)]
        for _ in range(MAX_DRAIN):
            if not ready:
                return
            for socket in tuple(ready):
                try:
                    frames = socket.recv_multipart(zmq.DONTWAIT, copy=False)
                except zmq.Again:
                    ready.remove(socket)
                else:
                    if message := self._parse(socket, frames):
                        yield message

    def _parse(self, socket: zmq.Socket[bytes], frames: list[zmq.Frame]) -> _Waiting | None:
        if len(frames) != 3 or len(frames[1]) != NUMBER.size:
            self.num_dropped += 1
            return None
        peer, number, body = frames[0].bytes, frames[1].bytes, frames[2].buffer
        if body == HELLO:
            socket.send_multipart([peer, number, self._replica_id.encode()])
            return None
        try:
            return _Waiting(socket, peer, number, wire.unpack_dispatch(body))
        except wire.WireError:
            self.num_dropped += 1
            return None

    def _serve(self, waiting: list[_Waiting]) -> None:
        by_layer: dict[int, list[_Waiting]] = defaultdict(list)
        for message in waiting:
            by_layer[message.dispatch.layer].append(message)
        for messages in by_layer.values():
            answers = self._compute([message.dispatch for message in messages])
            for message, answer in zip(messages, answers, strict=True):
                message.answer(answer)

    def stop(self) -> None:
        """End the thread, close the sockets, remove the directory."""
        self._stop.set()
        self._thread.join(5)
        for socket in self._sockets:
            socket.close()
        self._auth.stop()
        self._context.term()
        self._directory.remove()


class _OnlyClient:
    """ZAP credentials: the one client key of the application."""

    def __init__(self, client_public: bytes) -> None:
        self._client_public = client_public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._client_public
