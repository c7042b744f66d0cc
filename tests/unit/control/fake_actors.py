"""Actors in the test's own process: they answer as told, of a checkpoint that is real."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.actor_id import ActorId
from cluster.config import ClusterConfig
from cluster.control.actors import DeadActorError
from cluster.control.fleet import Fleet
from cluster.control.members import Member
from cluster.control.supervisor import Supervisor
from cluster.control.watch import Watch
from cluster.expert_map import ExpertMap
from cluster.messages.actors import (
    ActorReport,
    FrontSpec,
    Identity,
    LaneKeys,
    Legacy,
    LoadProgress,
    Machine,
    ReadyReport,
    ReplicaSpec,
    ResourcePlan,
    Wanted,
)
from cluster.models.checkpoint import Checkpoint
from cluster.policy.blueprint import Blueprint, draw_blueprint
from tests.checkpoints import MODELS, write_checkpoint

Spec = FrontSpec | ReplicaSpec
KEYS = LaneKeys(b"a", b"b", b"c", b"d")
THEN = Machine(8, 0, 8)


def ready(name: str) -> ReadyReport:
    return ReadyReport(name, "n", 1, "", 5, 0.1)


class Actor:
    """Answers a call with what it was given for it, or with what that returns; is silent where it was given nothing."""

    def __init__(self, name: str, **answers: Any) -> None:
        self.name = name
        self.answers = {"set_expert_map": None, "stop": None, "settle": None, "set_experts": 0} | answers
        self.calls: list[tuple[Any, ...]] = []
        self._death = asyncio.Event()

    async def answer(self, method: str, *given: Any) -> Any:
        self.calls.append((method, *given))
        if method not in self.answers:
            await self._death.wait()
            raise DeadActorError("killed")
        answer = self.answers[method]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = answer(*given)
        return await answer if inspect.isawaitable(answer) else answer

    def was_asked(self, method: str) -> int:
        return sum(call[0] == method for call in self.calls)

    def die(self) -> None:
        self._death.set()
        methods = (
            "load",
            "progress",
            "start",
            "set_experts",
            "set_expert_map",
            "settle",
            "report",
            "identity",
            "drain",
        )
        self.answers = dict.fromkeys((*methods, "stop"), DeadActorError("killed"))


class WorkingActor(Actor):
    """As far as a supervisor sees it, a front or a replica that does what it is told."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec.actor_id)
        self.spec = spec
        self.ready = ready(spec.actor_id)
        self.expert_map: ExpertMap | None = None
        self.legacy: Legacy | None = None
        self.is_draining = False
        self.expert_counts: tuple[tuple[int, ...], ...] = ()
        self.answers |= {
            "load": self.ready,
            "progress": LoadProgress(5, 5),
            "start": lambda expert_map, legacy, _: self._take(expert_map, legacy),
            "set_expert_map": self._take,
            "set_experts": self._hold,
            "drain": self._drain,
            "report": self._report,
            "identity": lambda: Identity(self.spec, self.ready, self.expert_map, self.legacy, self.is_draining),
        }

    def _take(self, expert_map: ExpertMap, legacy: Legacy) -> ReadyReport:
        self.expert_map, self.legacy = expert_map, legacy
        return self.ready

    def _hold(self, layer: int, experts: tuple[int, ...]) -> int:
        assert isinstance(self.spec, ReplicaSpec)
        held = self.spec.experts
        self.spec = replace(self.spec, experts=(*held[:layer], experts, *held[layer + 1 :]))
        return len(experts)

    def _report(self) -> ActorReport:
        version = self.expert_map.version if self.expert_map else 0
        return ActorReport(self.name, version, 0, expert_counts=self.expert_counts)

    def _drain(self) -> None:
        self.is_draining = True


def loading_for_ever(spec: Spec) -> Actor:
    return Actor(spec.actor_id)


class FakeActors:
    """Actors as a supervisor sees them; with a configuration, and the blueprint that a predecessor has drawn by it."""

    namespace = "test"

    def __init__(self, model: Path) -> None:
        self.config = ClusterConfig(model=str(model), device="cpu", groups=2, fronts=2)
        self.model = model
        self.there = THEN
        self.actors: dict[str, Actor] = {}
        self.make: Callable[[Spec], Actor] = loading_for_ever
        self.ended: list[str] = []
        self.created: list[str] = []

    def __getitem__(self, name: str) -> Actor:
        return self.actors[name]

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

    def machine(self) -> Machine:
        return self.there

    def create(self, spec: Spec, resources: ResourcePlan) -> Actor:
        self.created.append(spec.actor_id)
        actor = self.actors[spec.actor_id] = self.make(spec)
        return actor

    async def call(self, handle: Actor, method: str, *args: Any, timeout: float | None = None) -> Any:
        return await asyncio.wait_for(handle.answer(method, *args), timeout)

    def named(self) -> dict[str, Actor]:
        return dict(sorted(self.actors.items()))

    def end(self, handle: Actor) -> None:
        if self.actors.pop(handle.name, None):
            self.ended.append(handle.name)
        handle.die()


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
