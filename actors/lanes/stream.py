"""Frames over a stream socket: a head with number and length, then a body. Both ends of the unix lane send and read by
this; the native exchange does the same (stream.h).

Nothing here waits. What the other end does not take at once stays in `unsent`; what has come of a frame that is not
whole yet stays in `unread`.
"""

import socket
import struct
from collections.abc import Callable, Iterator

from actors.kernels.heads import FRAME, MAX_MESSAGE

# As much as one read takes: about what a stream socket holds.
CHUNK = 1 << 18
# A path of a socket has at most so many bytes.
MAX_PATH = 107
# (pid, uid, gid) of the process at the other end.
_CREDENTIALS = struct.Struct("3i")


class StreamError(ConnectionError):
    """The connection is lost, or what has come can't be told apart into frames (`is_garbage`)."""

    def __init__(self, message: str, *, is_garbage: bool = False) -> None:
        super().__init__(message)
        self.is_garbage = is_garbage


class Stream:
    """Owns the socket."""

    def __init__(self, owned: socket.socket) -> None:
        owned.setblocking(False)
        self.socket = owned
        self.unsent = bytearray()
        self.unread = bytearray()

    def fileno(self) -> int:
        return self.socket.fileno()

    def peer_uid(self) -> int:
        """The user of the process at the other end."""
        packed = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(packed)[1])

    def send(self, number: int, body: bytes) -> None:
        """Raises StreamError."""
        head = FRAME.layout.pack(number, len(body))
        if len(self.unsent) > MAX_MESSAGE:
            raise StreamError(f"the other end has left {len(self.unsent)} bytes unread")
        sent = 0 if self.unsent else _now(lambda: self.socket.sendmsg((head, body)))
        self.unsent += head[sent:]
        self.unsent += memoryview(body)[max(0, sent - len(head)) :]

    def flush(self) -> None:
        """Send on what was left. Raises StreamError."""
        if self.unsent:
            del self.unsent[: _now(lambda: self.socket.send(self.unsent))]

    def read(self) -> None:
        """Take in what has come. Raises StreamError, also at the end of the stream."""
        _now(lambda: self._take(self.socket.recv(CHUNK)))

    def _take(self, chunk: bytes) -> int:
        if not chunk:
            raise StreamError("closed by the other end")
        self.unread += chunk
        return len(chunk)

    @property
    def has_frame(self) -> bool:
        """Whether frames() has something to say: a frame that is whole, or one that can't be."""
        if len(self.unread) < FRAME.layout.size:
            return False
        length: int = FRAME.layout.unpack_from(self.unread)[1]
        return length > MAX_MESSAGE or len(self.unread) >= FRAME.layout.size + length

    def frames(self, most: int | None = None) -> Iterator[tuple[int, memoryview]]:
        """Number and body of each frame that is whole. Raises StreamError at one that is too long to be ours."""
        size = FRAME.layout.size
        while self.has_frame and most != 0:
            number, length = FRAME.layout.unpack_from(self.unread)
            if length > MAX_MESSAGE:
                raise StreamError(f"a frame of {length} bytes", is_garbage=True)
            body = bytes(memoryview(self.unread)[size : size + length])
            del self.unread[: size + length]
            yield number, memoryview(body)
            most = most and most - 1

    def close(self) -> None:
        self.socket.close()


def _now(transfer: Callable[[], int]) -> int:
    """Bytes that were moved, 0 if that would have to wait. Raises StreamError."""
    try:
        return transfer()
    except (BlockingIOError, InterruptedError):
        return 0
    except StreamError:
        raise
    except OSError as error:
        raise StreamError(str(error)) from None
