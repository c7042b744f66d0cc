"""The floor of the zmq lane: bare DEALER and ROUTER sockets that exchange as many bytes, without wire format or checks.

What a lane takes beyond this floor is ours; what the floor takes is the machine's and zmq's.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from cluster.messages.actors import LaneKeys


class BareSockets:
    """Looks like a dispatcher to the benchmark: `dispatch` sends the same bytes to all, `combine` waits for all."""

    def __init__(self, endpoints: list[str], keys: LaneKeys | None) -> None:
        self._context = zmq.Context()
        self._sockets = [self._connect(endpoint, keys) for endpoint in endpoints]
        self.body = b""

    def _connect(self, endpoint: str, keys: LaneKeys | None) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        if keys:
            socket.curve_serverkey = keys.server_public
            socket.curve_publickey, socket.curve_secretkey = keys.client_public, keys.client_secret
        socket.connect(endpoint)
        return socket

    def dispatch(self, *_: Any) -> None:
        for socket in self._sockets:
            socket.send_multipart((b"12345678", self.body), copy=False)

    def combine(self, _: None) -> None:
        for socket in self._sockets:
            socket.recv_multipart(copy=False)

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()
        self._context.term()


@contextmanager
def bare_sockets(num_peers: int, keys: LaneKeys | None) -> Iterator[BareSockets]:
    """Peers in processes of their own that send back what they get: over ipc, or, with keys, over tcp with CURVE."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        endpoints = spawn.SimpleQueue()
        binds = [f"ipc://{os.path.join(directory, str(n))}" for n in range(num_peers)]
        peers = [spawn.Process(target=_echo, args=(bind, keys, endpoints), daemon=True) for bind in binds]
        for peer in peers:
            peer.start()
        sockets = BareSockets([endpoints.get() for _ in peers], keys)
        try:
            yield sockets
        finally:
            sockets.close()
            for peer in peers:
                peer.terminate()
                peer.join()


def _echo(ipc: str, keys: LaneKeys | None, endpoints: Any) -> None:
    socket = zmq.Context().socket(zmq.ROUTER)
    if keys:
        socket.curve_server = True
        socket.curve_secretkey = keys.server_secret
        endpoints.put(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
    else:
        socket.bind(ipc)
        endpoints.put(ipc)
    while True:
        socket.send_multipart(socket.recv_multipart(copy=False), copy=False)
