"""The supervisor while it runs: the dead and the silent, maps that are lost, scaling, what goes wrong beside it."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from cluster.control import bring_up, ray_actors
from cluster.control import fleet as fleet_module
from cluster.control.members import Member
from cluster.control.rebalancing import RebalanceError, _move_layer
from cluster.control.supervisor import Supervisor
from cluster.messages.actors import ActorReport, LoadProgress, ReadyReport, Wanted
from cluster.messages.state import RebalanceReport
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


async def test_who_asks_at_the_same_time_waits_for_the_same_reports(cluster: Cluster) -> None:
    """Pages and Prometheus ask as often as they like; who leaves takes nobody's answer along."""
    cluster.left(*FOUR)
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        front, asked, answering = cluster.actors["front-1"], list[str](), asyncio.Event()
        answer = front._answer

        async def answer_late(method: str, *given: Any) -> Any:
            asked.append(method)
            await answering.wait()
            return await answer(method, *given)

        front._answer = answer_late  # type: ignore[method-assign]
        asking = [asyncio.create_task(supervisor.experts()) for _ in range(9)]
        asking += [asyncio.create_task(supervisor.exposition("ingress", ())) for _ in range(9)]
        await until(lambda: bool(asked))
        await asyncio.sleep(0.05)
        assert asked == ["report"]
        asking[0].cancel()
        answering.set()
        await asyncio.wait(asking)
        assert all(task.result() for task in asking[1:])


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


def ready(name: str) -> ReadyReport:
    return ReadyReport(name, "n", 1, "", 5, 0.1)


async def test_who_dies_over_the_first_start_is_started_anew(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine or a process may be lost at any time: that is no reason to end all others."""
    dying = ["front-0", "front-0.1", "expert-g1-r0"]

    def create(member: Member, *_: Any) -> Actor:
        name = member.spec.actor_id
        cluster.created.append(name)
        died = RayActorError() if name in dying else ready(name)
        starts = RayActorError() if name == "front-1" else ready(name)
        report = ActorReport(name, 1, 0)
        return Actor(name, load=died, progress=LoadProgress(1, 2), start=starts, report=report)

    monkeypatch.setattr(ray_actors, "create", create)
    monkeypatch.setattr(bring_up, "PROGRESS_PERIOD_S", 0.01)
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert sorted(supervisor.state().fronts) == ["front-0.2", "front-1.1"]
        assert sorted(cluster.ended) == sorted([*dying, "front-1"])


async def test_who_keeps_dying_over_the_first_start_ends_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(member: Member, *_: Any) -> Actor:
        cluster.created.append(member.spec.actor_id)
        died = RayActorError() if member.kind == "front" else ready(member.spec.actor_id)
        return Actor(member.spec.actor_id, load=died, progress=LoadProgress(1, 2))

    monkeypatch.setattr(ray_actors, "create", create)
    monkeypatch.setattr(bring_up, "PROGRESS_PERIOD_S", 0.01)
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "failed")
        assert len([name for name in cluster.created if name.startswith("front-0")]) == 1 + bring_up.MAX_DEATHS


async def test_every_replica_that_leaves_waits_until_fronts_know(cluster: Cluster) -> None:
    """Also the second one, whose map the first has made."""
    leaving = ("expert-g0-r1", "expert-g0-r2")
    cluster.left(*FOUR, *leaving, wanted=Wanted(2, (3, 1)))
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready" and len(fleet_of(supervisor).expert_map.replicas) == 4)
        front = cluster.actors["front-0"]
        answers, has_map = front._answer, asyncio.Event()

        async def take_late(method: str, *given: Any) -> Any:
            if method == "set_expert_map":
                await has_map.wait()
            return await answers(method, *given)

        front._answer = take_late  # type: ignore[method-assign]
        await supervisor.scale(group=0, replicas=1)
        await until(lambda: len(fleet_of(supervisor).expert_map.replicas) == 2)
        await asyncio.sleep(0.1)
        assert cluster.ended == []
        has_map.set()
        await until(lambda: sorted(cluster.ended) == sorted(leaving))


async def test_a_front_that_has_just_died_keeps_nobody_from_the_map(cluster: Cluster) -> None:
    cluster.left(*FOUR)
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        fleet = fleet_of(supervisor)
        telling = asyncio.create_task(fleet.tell_fronts())
        await asyncio.sleep(0)
        fleet.bury(fleet.of_kind("front")[0], "lost")  # before what tells it has begun
        await telling


async def test_the_end_waits_for_fronts_that_leave_as_well(cluster: Cluster) -> None:
    cluster.left(*FOUR)
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        front = cluster.actors["front-1"]
        busy = replace(front.answers["report"], num_requests=3)
        front.answers["report"] = busy
        await supervisor.scale(fronts=1)
        finishing = asyncio.create_task(supervisor.finish())
        await asyncio.sleep(0.2)
        assert not finishing.done()
        front.answers["report"] = replace(busy, num_requests=0)
        await asyncio.wait_for(finishing, 5)


def told(front: Actor) -> Wanted | None:
    return next((call[2].wanted for call in reversed(front.calls) if call[0] == "set_expert_map"), None)
