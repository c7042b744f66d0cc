"""More and fewer members: asked for, decided, and kept by a successor of the supervisor."""

import asyncio
from dataclasses import replace

from benchmarks.in_process import WorkingActor
from cluster.messages.actors import Wanted
from cluster.metrics import Metrics
from tests.unit.control.fake_actors import FakeActors, fleet_of, loading_for_ever, supervising, until


def ids(actors: FakeActors, kind: str) -> list[str]:
    return [name for name in actors.named() if name.startswith(kind)]


async def test_replicas_go_up_and_down(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(fronts=1)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert await supervisor.scale(replicas=3) == Wanted(1, (3, 3))
        await until(lambda: len(fleet_of(supervisor).expert_map.replicas) == 6)
        assert supervisor.state().state == "ready", "new members are no degradation"
        assert await supervisor.scale(group=1, replicas=1) == Wanted(1, (3, 1))
        await until(lambda: len(supervisor.state().actors) == 5)
        assert ids(actors, "expert") == ["expert-g0-r0", "expert-g0-r1", "expert-g0-r2", "expert-g1-r0"]
        await supervisor.scale(replicas=1)
        await until(lambda: len(supervisor.state().actors) == 3)
        assert {r.replica_id for r in fleet_of(supervisor).expert_map.replicas} == {"expert-g0-r0", "expert-g1-r0"}
        text = (await supervisor.exposition("in", ())).decode()
        assert 'outcrop_expert_replicas_wanted{group="0"} 1.0' in text


async def test_scaling_down_takes_a_member_that_is_still_starting(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(groups=1, fronts=1)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        actors.make = loading_for_ever
        await supervisor.scale(replicas=3)
        await until(lambda: len(ids(actors, "expert")) == 3)
        await supervisor.scale(replicas=1)
        await until(lambda: len(supervisor.state().actors) == 2)
        assert ids(actors, "expert") == ["expert-g0-r0"]
        await asyncio.sleep(10)
        assert supervisor.state().map_version == 1, "none of them ever joined"
        text = (await supervisor.exposition("in", ())).decode()
        assert 'outcrop_actor_restarts_total{kind="expert"} 0.0' in text, "and none of them is lost"


async def test_a_front_that_does_not_finish_is_ended_after_the_timeout(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(drain_timeout_s=45.0)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        leaving = actors["front-1"]
        leaving.answers["report"] = replace(await leaving.answer("report"), num_requests=1)
        await supervisor.scale(fronts=1)
        await asyncio.sleep(40)
        assert supervisor.state().draining == ("front-1",)
        assert next(a.detail for a in supervisor.state().actors if a.id == "front-1") == "1 requests left"
        assert leaving.was_asked("drain") == 1
        await until(lambda: actors.ended == ["front-1"], within=15)
        assert [a.id for a in supervisor.state().actors if a.kind == "front"] == ["front-0"]


async def test_a_successor_keeps_the_scaled_numbers(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(groups=1, fronts=1)
    async with supervising(actors) as first:
        await until(lambda: first.state().state == "ready")
        await first.scale(replicas=2)
        await until(lambda: len(fleet_of(first).expert_map.replicas) == 2)
        first._tasks.cancel_others()
        async with supervising(actors) as second:
            await until(lambda: second.state().state == "ready")
            assert second.state().wanted == Wanted(1, (2,))
            assert ids(actors, "expert") == ["expert-g0-r0", "expert-g0-r1"]
            assert not actors.ended


async def test_autoscaling_adds_fronts_while_requests_wait(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(groups=1, fronts=1, autoscale=True, max_fronts=2, max_num_seqs=1, max_replicas=1)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        await asyncio.sleep(60)
        assert supervisor.state().wanted == Wanted(1, (1,)), "nobody waits"
        metrics = Metrics()
        metrics.set("num_requests_waiting", 59)
        metrics.set("num_requests_running", 1)
        front = actors["front-0"]
        front.answers["report"] = replace(await front.answer("report"), samples=metrics.samples())
        await until(lambda: supervisor.state().fronts == ("front-0", "front-1"), within=60)
        assert supervisor.state().wanted == Wanted(2, (1,))
