"""The replica's end of a lane over connections: a thread that receives dispatches and computes them itself.

Messages that wait together for the same layer are computed as one batch. What is no message of ours is dropped and
counted.
"""

import logging
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from actors.lanes import wire
from actors.lanes.links import HELLO
from cluster.leftovers import OwnedDirectory, sweep

logger = logging.getLogger(__name__)

STOP_CHECK_S = 0.2
DIRECTORY = "lane-"

# Answers for dispatches of one layer, in their order.
ComputeBatch = Callable[[list[wire.Dispatch]], list[bytes]]


@dataclass(frozen=True, slots=True)
class Waiting:
    dispatch: wire.Dispatch
    answer: Callable[[bytes], None]


class LaneServer(ABC):
    """Its sockets lie in a directory that only this user may enter."""

    kind: str

    def __init__(self, replica_id: str, compute: ComputeBatch, directory: str) -> None:
        self._num_dropped = 0
        self._replica_id = replica_id
        self._compute = compute
        sweep(DIRECTORY, directory)
        self._directory = OwnedDirectory(DIRECTORY, directory)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{self.kind}-lane", daemon=True)

    @abstractmethod
    def start(self) -> tuple[tuple[str, str], ...]:
        """Listen and serve; returns the endpoints for the expert map."""

    @abstractmethod
    def _drain(self) -> Iterable[Waiting]:
        """Dispatches that wait now, a turn for each front. Waits for the first, STOP_CHECK_S at most."""

    @abstractmethod
    def _close(self) -> None:
        """Give back the sockets; the thread has ended."""

    @property
    def num_dropped(self) -> int:
        """Messages that were none of ours."""
        return self._num_dropped

    def _wake(self) -> None:
        """The thread is to look whether it is to end."""
        return

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._serve(list(self._drain()))
            except Exception:
                logger.exception("%s: the lane goes on after an unexpected error", self._replica_id)

    def _parse(self, body: memoryview, answer: Callable[[bytes], None]) -> Waiting | None:
        if body == HELLO:
            answer(self._replica_id.encode())
            return None
        try:
            return Waiting(wire.unpack_dispatch(body), answer)
        except wire.WireError:
            self._drop()
            return None

    def _drop(self) -> None:
        self._num_dropped += 1

    def _serve(self, waiting: list[Waiting]) -> None:
        by_layer: dict[int, list[Waiting]] = defaultdict(list)
        for message in waiting:
            by_layer[message.dispatch.layer].append(message)
        for messages in by_layer.values():
            answers = self._compute([message.dispatch for message in messages])
            for message, answer in zip(messages, answers, strict=True):
                message.answer(answer)

    def stop(self) -> None:
        """End the thread, close the sockets, remove the directory."""
        self._stop.set()
        self._wake()
        self._thread.join(5)
        if not self._thread.is_alive():  # or it may still compute by what would be closed under it
            self._close()
        self._directory.remove()
