"""The supervisor while it runs: the dead and the silent, maps that are lost, scaling, what goes wrong beside it."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from cluster import fleet as fleet_module
from cluster.messages import RebalanceReport, Wanted
from cluster.rebalancing import RebalanceError, _move_layer
from cluster.supervisor import Supervisor
from tests.unit.fake_actors import FOUR, Actor, Cluster, fleet_of, taking_over, until


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


async def test_a_dead_one_may_be_one_too_many(cluster: Cluster) -> None:
    """It waits for its restart: there is nobody to drain, and nothing to ask."""
    cluster.left(*FOUR, "expert-g0-r1", wanted=Wanted(2, (2, 1)))
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        fleet = fleet_of(supervisor)
        dead = next(m for m in fleet.members if m.spec.actor_id == "expert-g0-r1")
        dead._pause = 60.0  # as after some crashes
        cluster.actors["expert-g0-r1"].answers["report"] = RayActorError()
        await until(lambda: dead.state == "dead")
        await supervisor.scale(group=0, replicas=1)
        assert dead not in fleet.members
        await supervisor.experts()
        await until(lambda: supervisor.state().state == "ready")
        assert not cluster.created


async def test_one_that_dies_while_it_leaves_is_not_counted_on(cluster: Cluster) -> None:
    cluster.left(*FOUR, "expert-g0-r1", wanted=Wanted(2, (2, 1)))
    settles = [cluster.actors[name].answers.pop("settle") for name in FOUR[:2]]  # the steps take long
    assert settles == [None, None]
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        fleet = fleet_of(supervisor)
        await supervisor.scale(group=0, replicas=1)
        leaving = next(m for m in fleet.members if m.state == "draining")
        cluster.actors[leaving.spec.actor_id].answers["report"] = RayActorError()
        await until(lambda: leaving.state == "dead")
        await supervisor.scale(group=0, replicas=2)
        await until(lambda: cluster.created == ["expert-g0-r2"])


async def test_who_is_missing_is_started(cluster: Cluster) -> None:
    """However it came to that: nobody has to ask for it."""
    cluster.left(*FOUR)
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        fleet = fleet_of(supervisor)
        fleet.members.remove(next(m for m in fleet.members if m.spec.actor_id == "front-1"))
        await until(lambda: cluster.created == ["front-1"])


async def test_what_there_should_be_is_told_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A successor of the supervisor learns it from fronts alone."""
    monkeypatch.setattr(fleet_module, "MAP_TIMEOUT_S", 0.2)
    cluster.left(*FOUR)
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready" and len(fleet_of(supervisor).expert_map.replicas) == 2)
        version = fleet_of(supervisor).expert_map.version
        fronts = [cluster.actors[name] for name in FOUR[:2]]
        for front in fronts:  # each has the newest map
            front.answers["report"] = replace(front.answers["report"], map_version=version)
            front.answers["set_expert_map"] = RayError("lost")
            front.calls.clear()
        await supervisor.scale(fronts=3)
        await until(lambda: all(told(front) == Wanted(3, (1, 1)) for front in fronts))
        for front in fronts:
            front.calls.clear()
            front.answers["set_expert_map"] = None
        await until(lambda: all(told(front) == Wanted(3, (1, 1)) for front in fronts))
        for front in fronts:
            front.calls.clear()
        await asyncio.sleep(0.5)
        assert not any(told(front) for front in fronts), "once they know, they are left alone"


def told(front: Actor) -> Wanted | None:
    return next((call[2] for call in reversed(front.calls) if call[0] == "set_expert_map"), None)
