"""Actors on a real Ray, in the terms of the seam. That real fronts and replicas are started: test_supervisor.py."""

import asyncio
import os
import uuid
from typing import Any

import pytest
import ray

from actors.replica.peers import Peers
from cluster.config import ClusterConfig
from cluster.control.actors import ActorError, DeadActorError
from cluster.control.ray_actors import RayActors, _share
from cluster.errors import ConfigError
from cluster.messages.actors import ActorKind, ActorReport
from cluster.policy.resources import plan_resources


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
class Small:
    async def add(self, a: int, b: int) -> int:
        return a + b

    async def fail(self, told: bool) -> None:
        raise ConfigError("groups=3: choose 2") if told else TimeoutError("its own")

    async def hang(self) -> None:
        await asyncio.Event().wait()

    async def die(self) -> None:
        os._exit(1)


@pytest.fixture
def actors(ray_session: None) -> RayActors:
    return RayActors(f"test-{uuid.uuid4().hex[:8]}")


def start(actors: RayActors, name: str) -> Any:
    return Small.options(name=name, namespace=actors.namespace, lifetime="detached").remote()  # type: ignore[attr-defined]


async def test_a_call_answers_or_says_in_our_terms_why_not(actors: RayActors) -> None:
    small = start(actors, "small")
    assert await actors.call(small, "add", 1, 2) == 3
    with pytest.raises(ConfigError, match=r"^groups=3: choose 2$"):
        await actors.call(small, "fail", True)
    with pytest.raises(ActorError, match="its own") as failed:
        await actors.call(small, "fail", False)
    assert not isinstance(failed.value, DeadActorError | TimeoutError), "it has answered"
    with pytest.raises(TimeoutError):
        await actors.call(small, "hang", timeout=0.2)
    with pytest.raises(DeadActorError):
        await actors.call(small, "die")
    with pytest.raises(DeadActorError):
        await actors.call(small, "add", 1, 2)


async def test_those_of_the_namespace_that_live_are_found_and_ended(actors: RayActors) -> None:
    small = start(actors, "small")
    start(RayActors(f"{actors.namespace}-other"), "other")
    assert await actors.call(actors.named()["small"], "add", 1, 2) == 3
    assert list(actors.named()) == ["small"]
    assert actors.machine().cluster_cpus == actors.machine().largest_node_cpus == 8
    calling = asyncio.create_task(actors.call(small, "hang"))
    await asyncio.sleep(0.1)
    actors.end(small)
    with pytest.raises(DeadActorError):
        await calling
    actors.end(small)
    async with asyncio.timeout(10):
        while actors.named():
            await asyncio.sleep(0.1)


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
class Reporting:
    def __init__(self, name: str) -> None:
        self.name = name

    async def report(self) -> ActorReport:
        if self.name == "hung":
            await asyncio.Event().wait()
        return ActorReport(self.name, 0, 7)


async def test_a_replica_asks_the_others_of_its_node_and_waits_for_none_that_is_silent_or_dead(
    actors: RayActors,
) -> None:
    handles = {
        name: Reporting.options(name=name, namespace=actors.namespace, lifetime="detached").remote(name)  # type: ignore[attr-defined]
        for name in ("one", "hung", "two", "dead")
    }
    for name in ("one", "two", "dead"):
        assert (await actors.call(handles[name], "report", timeout=60)).actor_id == name
    peers = Peers(actors.namespace)
    everyone = ("one", "hung", "two", "dead", "nobody")
    found = await asyncio.to_thread(peers.reports, everyone)
    assert [report and report.actor_id for report in found] == ["one", None, "two", "dead", None]
    actors.end(handles["dead"])
    async with asyncio.timeout(10):
        while (await asyncio.to_thread(peers.reports, ("one", "dead")))[1] is not None:
            await asyncio.sleep(0.1)
    for handle in handles.values():
        actors.end(handle)


@ray.remote(max_restarts=0, max_task_retries=0)
class Looking:
    async def around(self) -> tuple[list[Any], str | None]:
        return ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES")


async def test_fronts_on_gpus_with_experts_on_cpus(actors: RayActors) -> None:
    """An actor that has reserved no GPU may see all of them, as Ray leaves it: that it computes on the CPU is in its
    spec.
    """
    config = ClusterConfig(model="m", replica_device="cpu", cpus_per_front=0, cpus_per_replica=0)
    plan = plan_resources(config, actors.machine())
    assert (plan.front_device, plan.replica_device) == ("auto", "cpu")
    kinds: tuple[ActorKind, ActorKind] = ("front", "expert")
    asked = [Looking.options(**_share(kind, plan)).remote() for kind in kinds]  # type: ignore[attr-defined]
    front, expert = [await actors.call(handle, "around", timeout=60) for handle in asked]
    print(f"CUDA_VISIBLE_DEVICES: {front[1]!r} of a front with a GPU, {expert[1]!r} of a replica without")
    assert len(front[0]) == 1
    assert front[1] == str(front[0][0]), "its own GPU, and no other"
    assert expert[0] == []
    for handle in asked:
        actors.end(handle)
