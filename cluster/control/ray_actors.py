"""Actors on Ray. Nothing else in `cluster` knows Ray."""

import asyncio
import importlib
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from cluster.control.actors import ActorError, DeadActorError, Handle, UnreachableActorError
from cluster.errors import ConfigError, ModelError
from cluster.messages.actors import ActorKind, FrontSpec, Machine, ReplicaSpec, ResourcePlan

# Named, not imported: the supervisor must not load torch, and `cluster` does not depend on `actors`.
ENTRYPOINTS: dict[ActorKind, str] = {
    "front": "actors.front.actor:FrontActor",
    "expert": "actors.replica.actor:ExpertActor",
}
CONCURRENCY: dict[ActorKind, dict[str, Any]] = {
    # Each ingress keeps a poll open. Calls wait in vain where more come than that: the supervisor's would, too.
    "front": {"max_concurrency": 10_000},
    # One asks the others of its node, one loads experts, and one answers.
    "expert": {"concurrency_groups": {"control": 3}},
}


class RayActors:
    """Detached actors of a Ray namespace: a crash of the supervisor leaves them alive."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def machine(self) -> Machine:
        total = ray.cluster_resources()
        largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=1.0)
        return Machine(total.get("CPU", 1.0), total.get("GPU", 0.0), max(1.0, largest))

    def create(self, spec: FrontSpec | ReplicaSpec, resources: ResourcePlan) -> Handle:
        kind: ActorKind = "front" if isinstance(spec, FrontSpec) else "expert"
        module, _, name = ENTRYPOINTS[kind].partition(":")
        actor_class = ray.remote(**CONCURRENCY[kind])(getattr(importlib.import_module(module), name))
        options = actor_class.options(
            name=spec.actor_id,
            namespace=self.namespace,
            lifetime="detached",
            **_share(kind, resources),
            # Replicas of a group on different nodes: the loss of one node leaves the others.
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_task_retries=0,
        )
        return options.remote(spec, self.namespace)

    async def call(self, handle: Handle, method: str, *args: Any, timeout: float | None = None) -> Any:
        try:
            return await asyncio.wait_for(_result(getattr(handle, method).remote(*args)), timeout)
        except GetTimeoutError:
            raise TimeoutError from None
        except AttributeError as error:  # an actor of another build, which a supervisor has found
            raise ActorError(str(error)) from None
        except RayError as error:
            raise _in_our_terms(error) from None

    def named(self) -> dict[str, Handle]:
        listed = ray.util.list_named_actors(all_namespaces=True)
        found = {}
        for name in sorted(actor["name"] for actor in listed if actor["namespace"] == self.namespace):
            try:
                found[name] = ray.get_actor(name, self.namespace)
            except ValueError:
                continue  # it has ended meanwhile
        return found

    def end(self, handle: Handle) -> None:
        ray.kill(handle, no_restart=True)


def _share(kind: ActorKind, resources: ResourcePlan) -> dict[str, Any]:
    is_front = kind == "front"
    return {
        "num_cpus": resources.cpus_per_front if is_front else resources.cpus_per_replica,
        "num_gpus": resources.gpus_per_front if is_front else resources.gpus_per_replica,
        "resources": dict(resources.front_resources if is_front else resources.replica_resources),
    }


async def _result(reference: Any) -> Any:
    return await reference


def _in_our_terms(error: RayError) -> Exception:
    cause = getattr(error, "cause", None)
    if isinstance(cause, ConfigError | ModelError):  # written for people
        return cause
    if isinstance(error, ActorUnavailableError):
        return UnreachableActorError(str(error))
    return DeadActorError(str(error)) if isinstance(error, RayActorError) else ActorError(str(error))
