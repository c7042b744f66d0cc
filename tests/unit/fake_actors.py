"""Ray as a supervisor sees it: actors that only answer as told, of a checkpoint that is real. No Ray."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.control import fleet as fleet_module
from cluster.control import ray_actors, takeover
from cluster.control import supervisor as supervisor_module
from cluster.control.fleet import Fleet
from cluster.control.members import Member
from cluster.control.supervisor import Supervisor
from cluster.messages.actors import ActorReport, Identity, LaneKeys, Legacy, Machine, ReadyReport, Wanted
from cluster.models.checkpoint import Checkpoint
from cluster.policy.blueprint import Blueprint, draw_blueprint
from tests.checkpoints import MODELS, write_checkpoint

KEYS = LaneKeys(b"a", b"b", b"c", b"d")
THEN = Machine(8, 0, 8)


class Actor:
    """Answers a call with what it was given for it; is silent where it was given nothing."""

    def __init__(self, name: str, **answers: Any) -> None:
        self.name = name
        self.answers = {"set_expert_map": None, "stop": None, "settle": None, "set_experts": 0} | answers
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *given: self._answer(method, *given))

    async def _answer(self, method: str, *given: Any) -> Any:
        self.calls.append((method, *given))
        if method not in self.answers:
            await asyncio.Event().wait()
        if isinstance(self.answers[method], Exception):
            raise self.answers[method]
        return self.answers[method]

    def was_asked(self, method: str) -> int:
        return sum(call[0] == method for call in self.calls)


class Cluster:
    """Ray, as the supervisor sees it, and a checkpoint."""

    def __init__(self, model: Path) -> None:
        self.config = ClusterConfig(model=str(model), device="cpu", groups=2, fronts=2)
        self.model = model
        self.machine = THEN
        self.actors: dict[str, Actor] = {}
        self.ended: list[str] = []
        self.created: list[str] = []

    @property
    def blueprint(self) -> Blueprint:
        return draw_blueprint(self.config, Checkpoint.open(self.model), str(self.model), THEN, KEYS)

    def left(self, *names: str, version: int = 1, wanted: Wanted | None = None, **changes: Any) -> None:
        """By a supervisor that has died."""
        drawn = self.blueprint
        expert_map = replace(drawn.expert_map, version=version)
        for text in names:
            name = takeover.Name.parse(text)
            assert name
            is_front = name.group < 0
            spec = drawn.front(0) if is_front else drawn.replica(name.group, 0, expert_map)
            identity = Identity(replace(spec, actor_id=text), ReadyReport(text, "n", 1, "", 5, 0.1))  # type: ignore[arg-type]
            if is_front:
                identity = replace(identity, expert_map=expert_map, legacy=Legacy(wanted or drawn.wanted), **changes)
            report = ActorReport(text, version, 0)
            self.actors[text] = Actor(text, identity=identity, report=report, drain=None)

    def create(self, member: Member, resources: Any, namespace: str) -> Actor:
        self.created.append(member.spec.actor_id)
        return Actor(member.spec.actor_id)  # it loads for ever

    def end(self, actor: Actor) -> None:
        self.ended.append(actor.name)
        self.actors.pop(actor.name, None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("granite"))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Cluster:
    cluster = Cluster(checkpoint)
    monkeypatch.setattr(ray_actors, "named_actors", lambda namespace: dict(cluster.actors))
    monkeypatch.setattr(ray_actors, "machine", lambda: cluster.machine)
    monkeypatch.setattr(ray_actors, "end", cluster.end)
    monkeypatch.setattr(ray_actors, "create", cluster.create)
    for module, name in [(takeover, "REPORT_TIMEOUT_S"), (fleet_module, "DRAIN_GRACE_S"), (takeover, "ASK_PAUSE_S")]:
        monkeypatch.setattr(module, name, 0.02)
    for name in ("WATCH_PERIOD_S", "FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(supervisor_module, name, 0.02)
    return cluster


@asynccontextmanager
async def taking_over(cluster: Cluster) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(cluster.config, "test")
    supervisor.start()
    yield supervisor
    await supervisor.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def fleet_of(supervisor: Supervisor) -> Fleet:
    assert supervisor._fleet
    return supervisor._fleet


FOUR = ("front-0", "front-1", "expert-g0-r0", "expert-g1-r0")
