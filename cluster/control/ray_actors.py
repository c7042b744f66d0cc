"""Ray calls of the supervisor: start an actor, wait for an answer, find and end actors."""

import asyncio
import importlib
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from cluster.control.members import Member
from cluster.errors import ConfigError, ModelError
from cluster.messages.actors import ActorKind, Machine, ResourcePlan

# Named, not imported: the supervisor must not load torch, and `cluster` does not depend on `actors`.
ENTRYPOINTS: dict[ActorKind, str] = {
    "front": "actors.front.actor:FrontActor",
    "expert": "actors.replica.actor:ExpertActor",
}
CONCURRENCY: dict[ActorKind, dict[str, Any]] = {
    # Each ingress keeps a poll open. Calls wait in vain where more come than that: the supervisor's would, too.
    "front": {"max_concurrency": 10_000},
    "expert": {"concurrency_groups": {"control": 2}},
}


def create(member: Member, resources: ResourcePlan, namespace: str) -> Any:
    """Start the member's actor; returns its handle. Detached: a crash of the supervisor leaves it alive."""
    module, _, name = ENTRYPOINTS[member.kind].partition(":")
    actor_class = ray.remote(**CONCURRENCY[member.kind])(getattr(importlib.import_module(module), name))
    is_front = member.kind == "front"
    options = actor_class.options(
        name=member.spec.actor_id,
        namespace=namespace,
        lifetime="detached",
        num_cpus=resources.cpus_per_front if is_front else resources.cpus_per_replica,
        num_gpus=resources.gpus_per_front if is_front else resources.gpus_per_replica,
        resources=dict(resources.front_resources if is_front else resources.replica_resources),
        # Replicas of a group on different nodes: the loss of one node leaves the others.
        scheduling_strategy="SPREAD",
        max_restarts=0,
        max_task_retries=0,
    )
    return options.remote(member.spec, namespace)


async def answer(ref: Any, timeout: float) -> Any:
    """Raises TimeoutError or a RayError."""
    return await asyncio.wait_for(_await(ref), timeout)


async def _await(ref: Any) -> Any:
    return await ref


def end(handle: Any) -> None:
    ray.kill(handle, no_restart=True)


def named_actors(namespace: str) -> dict[str, Any]:
    """Name -> handle of every live actor of a namespace."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    found = {}
    for name in sorted(actor["name"] for actor in listed if actor["namespace"] == namespace):
        try:
            found[name] = ray.get_actor(name, namespace)
        except ValueError:
            continue  # it has ended meanwhile
    return found


def machine() -> Machine:
    total = ray.cluster_resources()
    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=1.0)
    return Machine(total.get("CPU", 1.0), total.get("GPU", 0.0), max(1.0, largest))


def cause(error: RayError) -> Exception:
    """The actor's own exception, if it is one that we raise for people."""
    found = getattr(error, "cause", None)
    return found if isinstance(found, ConfigError | ModelError) else error


def is_death(error: object) -> bool:
    """Whether an actor's call failed because it is dead; one that can't be reached for the moment lives."""
    return isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
