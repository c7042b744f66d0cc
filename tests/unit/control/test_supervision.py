"""The supervisor while it runs: the dead and the silent, maps that are lost, scaling, what goes wrong beside it."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.in_process import Actor
from cluster.control.actors import ActorError, DeadActorError
from cluster.control.reports import STUCK_S
from cluster.control.tasks import Tasks
from cluster.messages.actors import Wanted
from cluster.messages.state import RebalanceReport
from tests.unit.control.fake_actors import FOUR, FakeActors, fleet_of, supervising, until, watch_of


async def test_a_map_that_was_lost_on_its_way_is_sent_again(actors: FakeActors) -> None:
    actors.left(*FOUR)
    front = actors["front-1"]
    del front.answers["set_expert_map"]
    async with supervising(actors) as supervisor:
        await until(lambda: front.was_asked("set_expert_map") == 1)
        asked = front.was_asked("report")
        await until(lambda: front.was_asked("report") > asked + 2)
        assert front.was_asked("set_expert_map") == 1, "one at a time"
        await until(lambda: front.was_asked("set_expert_map") == 2)
        front.answers["report"] = replace(front.answers["report"], map_version=supervisor.state().map_version)
        assert supervisor.state().state == "ready"


async def test_a_front_whose_engine_is_stuck_is_replaced(actors: FakeActors) -> None:
    actors.left(*FOUR)
    front = actors["front-1"]
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        front.answers["report"] = replace(front.answers["report"], stuck_seconds=STUCK_S + 1)
        await until(lambda: actors.created == ["front-1.1"])
        assert actors.ended == ["front-1"]


async def test_what_goes_wrong_beside_it_does_not_stop_healing(
    actors: FakeActors, monkeypatch: pytest.MonkeyPatch
) -> None:
    actors.set(autoscale=True)
    actors.left(*FOUR)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        wrong = RuntimeError("wrong")
        actors["expert-g0-r0"].answers["report"] = ActorError("that is all")
        monkeypatch.setattr(watch_of(supervisor).autoscaler, "decide", lambda *_: (_ for _ in ()).throw(wrong))
        monkeypatch.setattr(watch_of(supervisor).expert_load, "update", lambda *_: (_ for _ in ()).throw(wrong))
        actors["front-1"].answers["report"] = DeadActorError("lost")
        await until(lambda: actors.created == ["front-1.1"])
        assert not actors.ended, "one that can't report lives"
        assert {a.id: a.detail for a in supervisor.state().actors}["expert-g0-r0"] == "no report: that is all"


async def test_who_asks_at_the_same_time_waits_for_the_same_reports(actors: FakeActors) -> None:
    """Pages and Prometheus ask as often as they like; who leaves takes nobody's answer along."""
    actors.left(*FOUR)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        front, asked, answering = actors["front-1"], list[str](), asyncio.Event()
        report = front.answers["report"]

        async def report_late() -> Any:
            asked.append("report")
            await answering.wait()
            return report

        front.answers["report"] = report_late
        asking = [asyncio.create_task(supervisor.experts()) for _ in range(9)]
        asking += [asyncio.create_task(supervisor.exposition("ingress", ())) for _ in range(9)]
        await until(lambda: bool(asked))
        await asyncio.sleep(0.05)
        assert asked == ["report"]
        asking[0].cancel()
        answering.set()
        await asyncio.wait(asking)
        assert all(task.result() for task in asking[1:])


async def test_one_that_leaves_is_not_counted_on(actors: FakeActors) -> None:
    actors.left(*FOUR)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        await supervisor.scale(fronts=1)
        await supervisor.scale(fronts=2)
        assert supervisor.state().draining == ("front-1",)
        await until(lambda: actors.created == ["front-2"])


async def test_a_rebalance_outlives_who_asked_for_it(actors: FakeActors, monkeypatch: pytest.MonkeyPatch) -> None:
    actors.left(*FOUR)
    begun, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def rebalance(*_: Any) -> RebalanceReport:
        begun.set()
        await go_on.wait()
        done.set()
        return RebalanceReport(False)

    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        monkeypatch.setattr(watch_of(supervisor).rebalancer, "rebalance", rebalance)
        asking = asyncio.create_task(supervisor.rebalance())
        await begun.wait()
        asking.cancel()
        await asyncio.wait([asking])
        go_on.set()
        await asyncio.wait_for(done.wait(), 5)


async def test_an_error_in_the_background_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("cluster"), "propagate", True)

    async def fail() -> None:
        raise RuntimeError("unseen")

    await asyncio.wait([Tasks().spawn(fail())])
    await asyncio.sleep(0)
    assert "ended with an unexpected error" in caplog.text
    assert "unseen" in caplog.text


async def test_a_dead_one_may_be_one_too_many(actors: FakeActors) -> None:
    """It waits for its restart: there is nobody to drain, and nothing to ask."""
    actors.left(*FOUR, "expert-g0-r1", wanted=Wanted(2, (2, 1)))
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        fleet = fleet_of(supervisor)
        dead = next(m for m in fleet.members if m.spec.actor_id == "expert-g0-r1")
        dead._pause = 60.0  # as after some crashes
        actors["expert-g0-r1"].answers["report"] = DeadActorError("lost")
        await until(lambda: dead.state == "dead")
        await supervisor.scale(group=0, replicas=1)
        assert dead not in fleet.members
        await supervisor.experts()
        await until(lambda: supervisor.state().state == "ready")
        assert not actors.created


async def test_one_that_dies_while_it_leaves_is_not_counted_on(actors: FakeActors) -> None:
    actors.left(*FOUR, "expert-g0-r1", wanted=Wanted(2, (2, 1)))
    settles = [actors[name].answers.pop("settle") for name in FOUR[:2]]  # the steps take long
    assert settles == [None, None]
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        fleet = fleet_of(supervisor)
        await supervisor.scale(group=0, replicas=1)
        leaving = next(m for m in fleet.members if m.state == "draining")
        actors[leaving.spec.actor_id].answers["report"] = DeadActorError("lost")
        await until(lambda: leaving.state == "dead")
        await supervisor.scale(group=0, replicas=2)
        await until(lambda: actors.created == ["expert-g0-r2"])


async def test_who_is_missing_is_started(actors: FakeActors) -> None:
    """However it came to that: nobody has to ask for it."""
    actors.left(*FOUR)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        fleet = fleet_of(supervisor)
        fleet.members.remove(next(m for m in fleet.members if m.spec.actor_id == "front-1"))
        await until(lambda: actors.created == ["front-1"])


async def test_what_there_should_be_is_told_again(actors: FakeActors) -> None:
    """A successor of the supervisor learns it from fronts alone."""
    actors.left(*FOUR)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready" and len(fleet_of(supervisor).expert_map.replicas) == 2)
        version = fleet_of(supervisor).expert_map.version
        fronts = [actors[name] for name in FOUR[:2]]
        for front in fronts:  # each has the newest map
            front.answers["report"] = replace(front.answers["report"], map_version=version)
            front.answers["set_expert_map"] = ActorError("lost")
            front.calls.clear()
        await supervisor.scale(fronts=3)
        await until(lambda: all(told(front) == Wanted(3, (1, 1)) for front in fronts))
        for front in fronts:
            front.calls.clear()
            front.answers["set_expert_map"] = None
        await until(lambda: all(told(front) == Wanted(3, (1, 1)) for front in fronts))
        for front in fronts:
            front.calls.clear()
        await asyncio.sleep(20)
        assert not any(told(front) for front in fronts), "once they know, they are left alone"


async def test_every_replica_that_leaves_waits_until_fronts_know(actors: FakeActors) -> None:
    """Also the second one, whose map the first has made."""
    leaving = ("expert-g0-r1", "expert-g0-r2")
    actors.left(*FOUR, *leaving, wanted=Wanted(2, (3, 1)))
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready" and len(fleet_of(supervisor).expert_map.replicas) == 4)
        has_map = asyncio.Event()
        actors["front-0"].answers["set_expert_map"] = lambda *_: has_map.wait()
        await supervisor.scale(group=0, replicas=1)
        await until(lambda: len(fleet_of(supervisor).expert_map.replicas) == 2)
        await asyncio.sleep(3)
        assert actors.ended == []
        has_map.set()
        await until(lambda: sorted(actors.ended) == sorted(leaving))


async def test_a_front_that_has_just_died_keeps_nobody_from_the_map(actors: FakeActors) -> None:
    actors.left(*FOUR)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        fleet = fleet_of(supervisor)
        telling = asyncio.create_task(fleet.tell_fronts())
        await asyncio.sleep(0)
        fleet.bury(fleet.of_kind("front")[0], "lost")  # before what tells it has begun
        await telling


async def test_the_end_waits_for_fronts_that_leave_as_well(actors: FakeActors) -> None:
    actors.left(*FOUR)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        front = actors["front-1"]
        busy = replace(front.answers["report"], num_requests=3)
        front.answers["report"] = busy
        await supervisor.scale(fronts=1)
        finishing = asyncio.create_task(supervisor.finish())
        await asyncio.sleep(10)
        assert not finishing.done()
        front.answers["report"] = replace(busy, num_requests=0)
        await asyncio.wait_for(finishing, 1)


def told(front: Actor) -> Wanted | None:
    return next((call[2].wanted for call in reversed(front.calls) if call[0] == "set_expert_map"), None)
