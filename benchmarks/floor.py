"""The floor of the lanes over sockets: bare sockets that exchange as many bytes, without wire format or checks. zmq's
DEALER and ROUTER for zmq, stream sockets for unix.

What a lane takes beyond this floor is ours; what the floor takes is the machine's and zmq's.
"""

import multiprocessing
import os
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import zmq

from cluster.messages.actors import LaneKeys


class Bare(ABC):
    """Looks like a dispatcher to the benchmark: `dispatch` sends the same bytes to all, `combine` waits for all."""

    _sockets: Sequence[Any]
    body = b""

    @abstractmethod
    def dispatch(self, *_: Any) -> None: ...

    @abstractmethod
    def combine(self, _: None) -> None: ...

    def exchange(self, *_: Any) -> None:
        self.dispatch()
        self.combine(None)

    def close(self) -> None:
        for each in self._sockets:
            each.close()


class BareSockets(Bare):
    def __init__(self, endpoints: list[str], keys: LaneKeys | None) -> None:
        self._context = zmq.Context()
        self._sockets = [self._connect(endpoint, keys) for endpoint in endpoints]

    def _connect(self, endpoint: str, keys: LaneKeys | None) -> zmq.Socket[bytes]:
        dealer = self._context.socket(zmq.DEALER)
        dealer.linger = 0
        if keys:
            dealer.curve_serverkey = keys.server_public
            dealer.curve_publickey, dealer.curve_secretkey = keys.client_public, keys.client_secret
        dealer.connect(endpoint)
        return dealer

    def dispatch(self, *_: Any) -> None:
        for each in self._sockets:
            each.send_multipart((b"12345678", self.body), copy=False)

    def combine(self, _: None) -> None:
        for each in self._sockets:
            each.recv_multipart(copy=False)

    def close(self) -> None:
        super().close()
        self._context.term()


class BareStreams(Bare):
    """The same over stream sockets. As many bytes come back: each peer has been told how many."""

    def __init__(self, paths: list[str]) -> None:
        self._sockets = [socket.socket(socket.AF_UNIX) for _ in paths]
        for each, path in zip(self._sockets, paths, strict=True):
            each.connect(path)

    def dispatch(self, *_: Any) -> None:
        for each in self._sockets:
            each.sendmsg((len(self.body).to_bytes(8, "little"), self.body))

    def combine(self, _: None) -> None:
        for each in self._sockets:
            read_exactly(each, len(self.body))


def read_exactly(stream: socket.socket, length: int) -> bytearray:
    """Empty at the end of the stream."""
    data, at = bytearray(length), 0
    while at < length:
        some = stream.recv_into(memoryview(data)[at:])
        if not some:
            return bytearray()
        at += some
    return data


@contextmanager
def bare_streams(num_peers: int) -> Iterator[BareStreams]:
    """Peers in processes of their own that send back what they get."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        ready = spawn.SimpleQueue()
        paths = [os.path.join(directory, str(n)) for n in range(num_peers)]
        peers = [spawn.Process(target=_echo_stream, args=(path, ready), daemon=True) for path in paths]
        for peer in peers:
            peer.start()
        streams = BareStreams([ready.get() for _ in peers])
        try:
            yield streams
        finally:
            streams.close()
            for peer in peers:
                peer.terminate()
                peer.join()


def _echo_stream(path: str, ready: Any) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    ready.put(path)
    stream, _ = listener.accept()
    while head := read_exactly(stream, 8):
        stream.sendall(read_exactly(stream, int.from_bytes(head, "little")))


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
    router = zmq.Context().socket(zmq.ROUTER)
    if keys:
        router.curve_server = True
        router.curve_secretkey = keys.server_secret
        endpoints.put(f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}")
    else:
        router.bind(ipc)
        endpoints.put(ipc)
    while True:
        router.send_multipart(router.recv_multipart(copy=False), copy=False)
