"""The supervisor over actors that only answer as told: what it keeps, ends, tells and goes on with. No Ray."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from cluster import fleet as fleet_module
from cluster import ray_actors, takeover
from cluster import supervisor as supervisor_module
from cluster.blueprint import Blueprint, draw_blueprint
from cluster.checkpoint import check_checkpoint
from cluster.config import ClusterConfig
from cluster.expert_map import ExpertMap, Identity
from cluster.fleet import Fleet
from cluster.members import Member
from cluster.messages import ActorReport, LaneKeys, Machine, ReadyReport, RebalanceReport, Wanted
from cluster.model_config import read_model_config
from cluster.rebalancing import RebalanceError, _move_layer
from cluster.supervisor import Supervisor
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
        model = read_model_config(self.model)
        return draw_blueprint(self.config, check_checkpoint(self.model, model), self.model, model, THEN, KEYS)

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
                identity = replace(identity, expert_map=expert_map, wanted=wanted or drawn.wanted, **changes)
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


async def test_what_lives_serves_on_while_the_checkpoint_cannot_be_read(cluster: Cluster) -> None:
    cluster.left(*FOUR)
    config = cluster.model / "config.json"
    config.rename(cluster.model / "away")
    try:
        async with taking_over(cluster) as supervisor:
            await until(lambda: "next attempt" in supervisor.state().phase)
            state = supervisor.state()
            assert (state.state, state.fronts) == ("recovering", ("front-0", "front-1"))
            assert "config.json is missing" in (state.error or "")
            assert not cluster.ended
            (cluster.model / "away").rename(config)
            await until(lambda: supervisor.state().state == "ready")
            assert (supervisor.state().error, cluster.ended, cluster.created) == (None, [], [])
    finally:
        if not config.exists():
            (cluster.model / "away").rename(config)


async def test_the_dead_are_replaced_once_the_blueprint_is_drawn(cluster: Cluster) -> None:
    cluster.left(*FOUR[:-1])
    async with taking_over(cluster) as supervisor:
        await until(lambda: cluster.created == ["expert-g1-r0.1"])
        assert supervisor.state().fronts == ("front-0", "front-1")
        assert not cluster.ended


async def test_any_slot_is_as_good(cluster: Cluster) -> None:
    cluster.left("front-0", "front-2", "expert-g0-r3.1", "expert-g1-r0")
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert supervisor.state().fronts == ("front-0", "front-2")
        assert (cluster.ended, cluster.created) == ([], [])


async def test_a_machine_that_has_changed_since_ends_nobody(cluster: Cluster) -> None:
    cluster.left(*FOUR)
    cluster.machine = Machine(2, 4, 2)  # other shares, other threads, GPUs
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert (cluster.ended, cluster.created) == ([], [])
        assert fleet_of(supervisor).blueprint.resources.machine == THEN


async def test_members_that_the_configuration_has_changed_for_are_replaced(cluster: Cluster) -> None:
    cluster.left(*FOUR)
    cluster.config = cluster.config.model_copy(update={"max_num_seqs": 3})
    async with taking_over(cluster) as supervisor:
        await until(lambda: sorted(cluster.created) == ["front-0.1", "front-1.1"])
        assert cluster.ended == ["front-0", "front-1"]
        assert {m.spec.engine.max_num_seqs for m in fleet_of(supervisor).of_kind("front")} == {3}  # type: ignore[union-attr]


async def test_one_too_many_is_drained(cluster: Cluster) -> None:
    cluster.left("front-1", "front-2", *FOUR[2:], wanted=Wanted(1, (1, 1)))
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().fronts == ("front-1",))
        await until(lambda: cluster.ended == ["front-2"])
        assert cluster.created == []


async def test_one_that_was_leaving_goes_on_leaving(cluster: Cluster) -> None:
    cluster.left("front-0", is_draining=True)
    cluster.left("front-1", "front-2", *FOUR[2:])
    drained = cluster.actors["front-0"]
    async with taking_over(cluster) as supervisor:
        await until(lambda: cluster.ended == ["front-0"])
        assert supervisor.state().fronts == ("front-1", "front-2")
        assert drained.was_asked("drain")


async def test_a_silent_actor_keeps_its_place_until_it_answers(cluster: Cluster) -> None:
    cluster.left(*FOUR)
    answers = {name: cluster.actors[name].answers.pop("identity") for name in ("front-1", "expert-g1-r0")}
    cluster.actors["front-0"].answers["identity"] = with_addresses(cluster)
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "degraded")
        state = supervisor.state()
        assert state.phase == "waiting for front-1, expert-g1-r0"
        assert (state.fronts, state.draining) == (("front-0",), ("front-1",)), "nothing new for it, until it answers"
        assert len(fleet_of(supervisor).expert_map.replicas) == 2, "fronts find out for themselves"
        for name, identity in answers.items():
            cluster.actors[name].answers["identity"] = identity
        await until(lambda: len(supervisor.state().fronts) == 2)
        await until(lambda: supervisor.state().state == "ready")
        assert (cluster.ended, cluster.created) == ([], [])


def with_addresses(cluster: Cluster) -> Identity:
    """The first front's identity, with all replicas in its map."""
    identity: Identity = cluster.actors["front-0"].answers["identity"]
    replicas = [Member(cluster.blueprint.replica(g, 0, cluster.blueprint.expert_map), "expert") for g in (0, 1)]
    for member in replicas:
        member.become_ready(ReadyReport(member.spec.actor_id, "n", 1, "", 5, 0.1))
    assert identity.expert_map
    addresses = tuple(m.address for m in replicas if m.address)
    return replace(identity, expert_map=replace(identity.expert_map, replicas=addresses))


async def test_one_that_stays_silent_counts_as_hung(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.left(*FOUR)
    del cluster.actors["front-1"].answers["identity"]
    monkeypatch.setattr(takeover, "HUNG_S", 0.1)
    async with taking_over(cluster):
        await until(lambda: cluster.created == ["front-1.1"])
        assert cluster.ended == ["front-1"]


async def test_without_a_front_that_answers_silence_is_waited_for(cluster: Cluster) -> None:
    cluster.left(*FOUR, version=7)
    answers = {name: cluster.actors[name].answers.pop("identity") for name in ("front-0", "front-1")}
    async with taking_over(cluster) as supervisor:
        await until(lambda: "don't answer yet" in supervisor.state().phase)
        assert supervisor.state().state == "recovering"
        for name, identity in answers.items():
            cluster.actors[name].answers["identity"] = identity
        await until(lambda: supervisor.state().state == "ready")
        assert (supervisor.state().map_version >= 7, cluster.ended, cluster.created) == (True, [], [])


async def test_the_newest_map_counts_and_every_front_gets_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "MAP_TIMEOUT_S", 0.05)
    cluster.left("front-0", *FOUR[2:], version=5)
    cluster.left("front-1", version=6)  # the predecessor has died while it told them
    cluster.actors["front-1"].answers["identity"] = replace(
        cluster.actors["front-1"].answers["identity"], expert_map=replace(with_addresses(cluster).expert_map, version=6)
    )
    async with taking_over(cluster) as supervisor:
        await until(lambda: cluster.actors["front-0"].was_asked("set_expert_map") > 0)
        assert cluster.actors["front-0"].calls[-1][0] in ("set_expert_map", "report")
        assert supervisor.state().map_version == 6
        assert not cluster.actors["front-1"].was_asked("set_expert_map")


def test_a_front_with_another_map_of_the_same_version_gets_a_newer_one() -> None:
    ours = ExpertMap(6, 1, (((0,), (0,)),))
    assert takeover._newer(ours, replace(ours, homes=(((0,), (1,)),))) == replace(ours, version=7)
    assert takeover._newer(ours, replace(ours, version=5)) is ours
    assert takeover._newer(ours, ours) is ours


async def test_a_replica_loads_what_it_lacks_before_it_enters_the_map(cluster: Cluster) -> None:
    """Its predecessor, or its supervisor's, has died in mid-rebalance."""
    cluster.left(*FOUR)
    lacking, more = cluster.actors["expert-g0-r0"], cluster.actors["expert-g1-r0"]
    for actor, first in ((lacking, (0, 1, 2)), (more, tuple(range(8)))):
        identity = actor.answers["identity"]
        experts = (first, *identity.spec.experts[1:])
        actor.answers["identity"] = replace(identity, spec=replace(identity.spec, experts=experts))
    lacking.answers["set_experts"] = RuntimeError("the file can't be read")
    async with taking_over(cluster) as supervisor:
        await until(lambda: lacking.was_asked("set_experts") > 1)
        assert [r.replica_id for r in fleet_of(supervisor).expert_map.replicas] == ["expert-g1-r0"]
        lacking.answers["set_experts"] = 1
        await until(lambda: len(fleet_of(supervisor).expert_map.replicas) == 2)
        assert ("set_experts", 0, (0, 1, 2, 3)) in lacking.calls
        assert not more.was_asked("set_experts"), "what it has beside its group's experts does no harm"
        assert (cluster.ended, cluster.created) == ([], [])


# -- the watch -------------------------------------------------------------------------------------------------------


async def test_a_map_that_was_lost_on_its_way_is_sent_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "MAP_TIMEOUT_S", 0.2)
    cluster.left(*FOUR)
    front = cluster.actors["front-1"]
    del front.answers["set_expert_map"]
    async with taking_over(cluster) as supervisor:
        await until(lambda: front.was_asked("set_expert_map") == 1)
        asked = front.was_asked("report")
        await until(lambda: front.was_asked("report") > asked + 2)
        assert front.was_asked("set_expert_map") == 1, "one at a time"
        await until(lambda: front.was_asked("set_expert_map") == 2)
        front.answers["report"] = replace(front.answers["report"], map_version=supervisor.state().map_version)
        assert supervisor.state().state == "ready"


async def test_a_front_whose_engine_is_stuck_is_replaced(cluster: Cluster) -> None:
    cluster.left(*FOUR)
    front = cluster.actors["front-1"]
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        front.answers["report"] = replace(front.answers["report"], stuck_seconds=fleet_module.STUCK_S + 1)
        await until(lambda: cluster.created == ["front-1.1"])
        assert cluster.ended == ["front-1"]


async def test_what_goes_wrong_beside_it_does_not_stop_healing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.config = cluster.config.model_copy(update={"autoscale": True})
    cluster.left(*FOUR)
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        wrong = RuntimeError("wrong")
        cluster.actors["expert-g0-r0"].answers["report"] = RayError("that is all")
        monkeypatch.setattr(supervisor._autoscaler, "decide", lambda *_: (_ for _ in ()).throw(wrong))
        monkeypatch.setattr(supervisor._load, "update", lambda *_: (_ for _ in ()).throw(wrong))
        cluster.actors["front-1"].answers["report"] = RayActorError()
        await until(lambda: cluster.created == ["front-1.1"])
        assert not cluster.ended, "one that can't report lives"
        assert {a.id: a.detail for a in supervisor.state().actors}["expert-g0-r0"] == "no report: that is all"


async def test_one_that_leaves_is_not_counted_on(cluster: Cluster) -> None:
    cluster.left(*FOUR)
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        await supervisor.scale(fronts=1)
        await supervisor.scale(fronts=2)
        assert supervisor.state().draining == ("front-1",)
        await until(lambda: cluster.created == ["front-2"])


async def test_a_rebalance_outlives_who_asked_for_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.left(*FOUR)
    begun, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def rebalance(*_: Any) -> RebalanceReport:
        begun.set()
        await go_on.wait()
        done.set()
        return RebalanceReport(False)

    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        monkeypatch.setattr(supervisor._rebalancer, "rebalance", rebalance)
        asking = asyncio.create_task(supervisor.rebalance())
        await begun.wait()
        asking.cancel()
        await asyncio.wait([asking])
        go_on.set()
        await asyncio.wait_for(done.wait(), 5)


async def test_a_replica_that_cannot_be_reached_has_not_loaded_experts(cluster: Cluster) -> None:
    cluster.left(*FOUR)
    cluster.actors["expert-g0-r0"].answers["set_experts"] = ActorUnavailableError("away", None)
    cluster.actors["expert-g1-r0"].answers["set_experts"] = RayActorError()
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        fleet = fleet_of(supervisor)
        moved = (*[(1,)] * 4, *[(0,)] * 4)
        with pytest.raises(RebalanceError, match="expert-g0-r0 could not load experts of layer 0"):
            await _move_layer(fleet, 0, moved)
        assert fleet.expert_map.homes == cluster.blueprint.expert_map.homes


async def test_an_error_in_the_background_is_logged(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("cluster"), "propagate", True)

    async def fail() -> None:
        raise RuntimeError("unseen")

    supervisor = Supervisor(cluster.config, "test")
    await asyncio.wait([supervisor._spawn(fail())])
    await asyncio.sleep(0)
    assert "unseen" in caplog.text


async def test_stop_ends_actors_that_were_not_taken_over(cluster: Cluster) -> None:
    cluster.left(*FOUR)
    for actor in cluster.actors.values():
        actor.answers.pop("identity")
    async with taking_over(cluster) as supervisor:
        await until(lambda: "don't answer yet" in supervisor.state().phase)
    assert sorted(cluster.ended) == sorted(FOUR)


async def test_a_first_start_that_fails_has_failed(cluster: Cluster) -> None:
    cluster.config = cluster.config.model_copy(update={"groups": 3})
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "failed")
        assert "groups=3 does not divide 8 experts" in (supervisor.state().error or "")
