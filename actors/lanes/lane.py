"""How dispatched bytes travel from a front to an expert replica and back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from cluster.expert_map import ReplicaAddress


class LaneError(RuntimeError):
    """A replica could not be reached or did not answer; another one may."""


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
    def receive(self, ticket: Any) -> bytes | memoryview:
        """Wait for the packed partial. Raises LaneError."""

    def close(self) -> None:
        """Give back sockets and handles; nothing may be sent afterwards."""
        return
