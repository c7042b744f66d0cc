"""Fronts that are connected to a replica's stream socket, and what they send."""

import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from actors.kernels import abi
from actors.kernels.serving import NativeServing
from actors.lanes.stream import Stream, StreamError

logger = logging.getLogger(__name__)

# While no file is left, whoever knocks goes on knocking.
REFUSED_S = 0.05
BACKLOG = 4096  # a front that is not let in at once stays with a slower lane


@dataclass(frozen=True, slots=True)
class Message:
    """`peer` is the number of the front's connection."""

    peer: int
    number: int
    body: memoryview


class Peers:
    """Reads a frame of each front at a time, and none of a front that has not taken its last answer: so no more is kept
    for a front that does not read than that answer.
    """

    def __init__(self, listener: socket.socket, drop: Callable[[], None]) -> None:
        """`drop` counts what is no message of ours."""
        listener.setblocking(False)
        self._drop = drop
        self._listener = listener
        self._streams: dict[int, Stream] = {}

    def wait(self, timeout_s: float) -> Iterator[Message]:
        """Messages that have come, one of a front at most. Waits for the first, but not longer."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        for number, stream in self._streams.items():
            poller.register(number, select.POLLOUT if stream.unsent else select.POLLIN)
        has_more = any(stream.has_frame for stream in self._streams.values() if not stream.unsent)
        ready = {number for number, _ in poller.poll(0 if has_more else 1000 * timeout_s)}
        if self._listener.fileno() in ready:
            self._accept()
        for number, stream in tuple(self._streams.items()):
            if number in ready or (stream.has_frame and not stream.unsent):
                yield from self._hear(number, stream)

    def _accept(self) -> None:
        if stream := accepted(self._listener):
            self._streams[stream.fileno()] = stream

    def _hear(self, number: int, stream: Stream) -> Iterator[Message]:
        try:
            stream.flush()
            if not stream.has_frame:
                stream.read()
            if not stream.unsent:
                yield from (Message(number, *frame) for frame in stream.frames(1))
        except StreamError as error:
            self._lose(number, error)

    def answer(self, message: Message, body: bytes) -> None:
        """A front that has gone does not get it."""
        if stream := self._streams.get(message.peer):
            try:
                stream.send(message.number, body)
            except StreamError as error:
                self._lose(message.peer, error)

    def _lose(self, number: int, error: StreamError) -> None:
        if error.is_garbage:
            self._drop()
        if stream := self._streams.pop(number, None):
            stream.close()

    @property
    def num_connected(self) -> int:
        return len(self._streams)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._listener.close()


class NativePeers:
    """The same, but that dispatches are answered on the way: only what is out of the ordinary becomes a message."""

    def __init__(self, listener: socket.socket, serving: NativeServing) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._serving = serving
        serving.listen(listener.fileno())

    def wait(self, timeout_s: float) -> Iterator[Message]:
        event, came = self._serving.run(timeout_s)
        if event == abi.KNOCKED and (stream := accepted(self._listener)):
            self._serving.add(stream.socket.detach())
        if came:
            peer, number, body = came
            yield Message(peer, number, memoryview(body))

    def answer(self, message: Message, body: bytes) -> None:
        self._serving.answer(message.peer, message.number, body)

    @property
    def num_connected(self) -> int:
        return self._serving.num_peers

    def close(self) -> None:
        self._serving.close_peers()
        self._listener.close()


def accepted(listener: socket.socket) -> Stream | None:
    """A front that knocks, unless it is somebody else."""
    try:
        stream = Stream(listener.accept()[0])
    except OSError as error:  # it has gone again, or no file is left
        logger.warning("a front was not let in: %s", error)
        time.sleep(REFUSED_S)
        return None
    if (user := stream.peer_uid()) in (0, os.geteuid()):
        return stream
    logger.warning("a process of user %d was not let in", user)
    stream.close()
    return None
