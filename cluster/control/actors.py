"""The seam between control and what runs its actors: Ray (cluster/control/ray_actors.py), or a test's own process."""

from typing import Any, Protocol

from cluster.messages.actors import FrontSpec, Machine, ReplicaSpec, ResourcePlan

# What create() and named() give and the others take. Only Actors look inside.
Handle = Any


class ActorError(Exception):
    """A call has failed, in the actor or on its way. That says nothing of whether the actor lives."""


class DeadActorError(ActorError):
    """There is nobody any more who could have answered."""


class UnreachableActorError(ActorError):
    """The actor can't be reached for the moment. It may live."""


class Actors(Protocol):
    """The actors of one application: they live in a namespace, and outlive whoever has started them."""

    @property
    def namespace(self) -> str: ...

    def machine(self) -> Machine:
        """What there is to share among actors."""

    def create(self, spec: FrontSpec | ReplicaSpec, resources: ResourcePlan) -> Handle:
        """Start an actor; returns at once."""

    async def call(self, handle: Handle, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Raises ConfigError or ModelError as the actor has, else an ActorError; TimeoutError without an answer."""

    def named(self) -> dict[str, Handle]:
        """Every live actor of the namespace, by name."""

    def end(self, handle: Handle) -> None:
        """End an actor at once, whatever it does. Safe for one that is dead."""


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
