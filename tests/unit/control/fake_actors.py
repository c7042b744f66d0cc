"""Actors in the test's own process: they answer as told, of a checkpoint that is real."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.in_process import Actor, ActorsHere, Spec, ready
from cluster.actor_id import ActorId
from cluster.config import ClusterConfig
from cluster.control.fleet import Fleet
from cluster.control.members import Member
from cluster.control.supervisor import Supervisor
from cluster.control.watch import Watch
from cluster.messages.actors import (
    ActorReport,
    Identity,
    LaneKeys,
    Legacy,
    Machine,
    ReadyReport,
    Wanted,
)
from cluster.models.checkpoint import Checkpoint
from cluster.policy.blueprint import Blueprint, draw_blueprint
from tests.checkpoints import MODELS, write_checkpoint

KEYS = LaneKeys(b"a", b"b", b"c", b"d")
THEN = Machine(8, 0, 8)


def loading_for_ever(spec: Spec) -> Actor:
    return Actor(spec.actor_id)


class FakeActors(ActorsHere):
    """With a configuration, and the blueprint that a predecessor has drawn by it."""

    def __init__(self, model: Path) -> None:
        super().__init__(THEN)
        self.config = ClusterConfig(model=str(model), device="cpu", groups=2, fronts=2)
        self.model = model
        self.make: Callable[[Spec], Actor] = loading_for_ever  # type: ignore[method-assign]

    @property
    def blueprint(self) -> Blueprint:
        return draw_blueprint(self.config, Checkpoint.open(self.model), str(self.model), THEN, KEYS)

    def set(self, **settings: Any) -> None:
        self.config = self.config.model_copy(update=settings)

    def left(self, *names: str, version: int = 1, wanted: Wanted | None = None, **changes: Any) -> None:
        """By a supervisor that has died."""
        drawn = self.blueprint
        expert_map = replace(drawn.expert_map, version=version)
        for text in names:
            group = ActorId.parse(text).group
            spec = drawn.front(0) if group is None else drawn.replica(group, 0, expert_map)
            identity = Identity(replace(spec, actor_id=text), ready(text))
            if group is None:
                identity = replace(identity, expert_map=expert_map, legacy=Legacy(wanted or drawn.wanted), **changes)
            report = ActorReport(text, version, 0)
            self.actors[text] = Actor(text, identity=identity, report=report, drain=None)


def with_addresses(actors: FakeActors) -> Identity:
    """The first front's identity, with all replicas in its map."""
    identity: Identity = actors["front-0"].answers["identity"]
    replicas = [Member(actors.blueprint.replica(g, 0, actors.blueprint.expert_map), "expert") for g in (0, 1)]
    for member in replicas:
        member.become_ready(ReadyReport(member.spec.actor_id, "n", 1, "", 5, 0.1))
    assert identity.expert_map
    addresses = tuple(m.address for m in replicas if m.address)
    return replace(identity, expert_map=replace(identity.expert_map, replicas=addresses))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("granite"))


@pytest.fixture
def actors(checkpoint: Path) -> FakeActors:
    return FakeActors(checkpoint)


@asynccontextmanager
async def supervising(actors: FakeActors) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(actors.config, actors)
    supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()


async def until(condition: Callable[[], bool], within: float = 600.0) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.05)


def watch_of(supervisor: Supervisor) -> Watch:
    assert supervisor._watch
    return supervisor._watch


def fleet_of(supervisor: Supervisor) -> Fleet:
    return watch_of(supervisor).fleet


FOUR = ("front-0", "front-1", "expert-g0-r0", "expert-g1-r0")
