"""How dispatched bytes travel from a front to an expert replica and back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.expert_map import ReplicaAddress


class LaneError(RuntimeError):
    """A replica could not be reached, or is gone; another one may answer. `ticket` is the message that was lost."""

    def __init__(self, message: str, ticket: Any = None) -> None:
        super().__init__(message)
        self.ticket = ticket


class LaneTimeout(LaneError):  # noqa: N818 - an answer may still come
    """No answer within the given time."""


@dataclass(frozen=True, slots=True)
class Handed:
    """A message that was sent on a stream without its lane: its number, the bytes that have come back since, and those
    of its own that have not been taken yet.
    """

    number: int
    received: bytes
    unsent: bytes
    is_lost: bool


class Lane(ABC):
    """send() returns at once, receive() waits. Belongs to the dispatcher's thread, but for connect()."""

    name: str

    @abstractmethod
    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        """Be ready to send to exactly these replicas. May be called from any thread, while others send."""

    def name_for(self, replica: ReplicaAddress) -> str:
        """The lane that a message to this replica takes."""
        return self.name

    @abstractmethod
    def send(self, replica: ReplicaAddress, message: bytes) -> Any:
        """Start to deliver a packed dispatch; returns a ticket. Raises LaneError."""

    @abstractmethod
    def receive(self, tickets: Sequence[Any], timeout_s: float) -> tuple[Any, bytes | memoryview]:
        """Wait for the first answer to any of the tickets: (ticket, packed partial).

        Raises LaneTimeout if none comes in time, LaneError with the ticket of a replica that is gone. Tickets that
        are not answered stay valid; forget() those that are not wanted any more.
        """

    @abstractmethod
    def forget(self, ticket: Any) -> None:
        """Drop a late answer when it comes."""

    @abstractmethod
    def probe(self, replica: ReplicaAddress) -> Any:
        """Ask a replica that was given up for a sign of life; returns a ticket for is_alive(). Raises LaneError."""

    @abstractmethod
    def is_alive(self, ticket: Any) -> bool:
        """Whether a probe has been answered. Does not wait."""

    def stream_to(self, replica: ReplicaAddress) -> int | None:
        """The stream socket that a message to this replica takes, if nothing is under way on it and it may be used
        without the lane (wire.h has its frames). Until the lane is used again.
        """
        return None

    def adopt(self, replica: ReplicaAddress, handed: "Handed") -> Any:
        """Go on with what was done on a stream without the lane; returns the message's ticket."""
        raise NotImplementedError(f"the lane {self.name} has no streams")

    def close_retired(self) -> None:
        """Give back connections to replicas that have left, as far as nothing is expected of them."""
        return

    def close(self) -> None:
        """Give back sockets and handles; nothing may be sent afterwards."""
        return
