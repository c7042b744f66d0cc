"""The zmq lane, the replica's end.

Fronts on this host may come over ipc, others come over tcp with CURVE, where only the application's client key is let
in.
"""

import os
from collections.abc import Iterator
from functools import partial

import zmq
from zmq.auth.thread import ThreadAuthenticator

from actors.kernels.heads import MAX_MESSAGE
from actors.lanes.server import STOP_CHECK_S, ComputeBatch, LaneServer, Waiting
from actors.lanes.zmq_link import NUMBER
from cluster.messages.actors import LaneKeys

# Dispatches taken from the sockets before any is computed: fronts share a batch, and none waits for long.
MAX_DRAIN = 64


class ZmqServer(LaneServer):
    kind = "zmq"

    def __init__(self, replica_id: str, compute: ComputeBatch, keys: LaneKeys, host: str, directory: str) -> None:
        super().__init__(replica_id, compute, directory)
        self._keys = keys
        self._host = host
        self._context = zmq.Context()
        self._poller = zmq.Poller()

    def start(self) -> tuple[tuple[str, str], ...]:
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
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._thread.start()
        return (("ipc", f"ipc://{path}"), ("tcp", f"tcp://{self._host}:{port}"))

    def _socket(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        socket.setsockopt(zmq.IPV6, 1 if ":" in self._host else 0)
        return socket

    def _drain(self) -> Iterator[Waiting]:
        """ROUTER sockets take turns between their peers."""
        ready = [socket for socket, _ in self._poller.poll(int(1000 * STOP_CHECK_S))]
        for _ in range(MAX_DRAIN):
            if not ready:
                return
            for socket in tuple(ready):
                try:
                    frames = socket.recv_multipart(zmq.DONTWAIT, copy=False)
                except zmq.Again:
                    ready.remove(socket)
                else:
                    if message := self._take(socket, frames):
                        yield message

    def _take(self, socket: zmq.Socket[bytes], frames: list[zmq.Frame]) -> Waiting | None:
        if len(frames) != 3 or len(frames[1]) != NUMBER.size:
            self._drop()
            return None
        peer, number = frames[0].bytes, frames[1].bytes
        return self._parse(frames[2].buffer, partial(_answer, socket, (peer, number)))

    def _close(self) -> None:
        for socket in self._sockets:
            socket.close()
        self._auth.stop()
        self._context.term()


def _answer(socket: zmq.Socket[bytes], to: tuple[bytes, bytes], body: bytes) -> None:
    socket.send_multipart([*to, body], copy=False)


class _OnlyClient:
    """ZAP credentials: the one client key of the application."""

    def __init__(self, client_public: bytes) -> None:
        self._client_public = client_public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._client_public
