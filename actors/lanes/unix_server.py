"""The unix lane, the replica's end: fronts on this host connect to a stream socket."""

import os
import socket
from collections.abc import Iterator
from functools import partial

from actors.kernels.serving import NativeServing
from actors.lanes.server import STOP_CHECK_S, ComputeBatch, LaneServer, Waiting
from actors.lanes.unix_peers import BACKLOG, NativePeers, Peers
from actors.process.limits import raise_file_limit


class UnixServer(LaneServer):
    kind = "unix"

    def __init__(
        self, replica_id: str, compute: ComputeBatch, directory: str, serving: NativeServing | None = None
    ) -> None:
        """`serving` computes what it can; the rest goes to `compute`, as all does without it."""
        super().__init__(replica_id, compute, directory)
        self._serving = serving
        raise_file_limit()

    def start(self) -> tuple[tuple[str, str], ...]:
        path = os.path.join(self._directory.path, "unix")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen(BACKLOG)
        self._peers = NativePeers(listener, self._serving) if self._serving else Peers(listener, self._drop)
        self._thread.start()
        return (("unix", path),)

    def _drain(self) -> Iterator[Waiting]:
        for message in self._peers.wait(STOP_CHECK_S):
            if waiting := self._parse(message.body, partial(self._peers.answer, message)):
                yield waiting

    @property
    def num_dropped(self) -> int:
        return super().num_dropped + (self._serving.computed().dropped if self._serving else 0)

    def _wake(self) -> None:
        if self._serving:
            self._serving.stop()

    def _close(self) -> None:
        self._peers.close()
