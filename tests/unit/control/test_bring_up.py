"""The first start: of all at once, or not at all."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.in_process import Actor, Spec, WorkingActor, ready
from cluster.control.actors import DeadActorError
from cluster.control.bring_up import MAX_DEATHS
from cluster.control.fleet import Fleet
from cluster.control.lives import join
from cluster.errors import ConfigError
from cluster.messages.actors import ReadyReport
from cluster.metrics import Metrics
from tests.unit.control.fake_actors import FakeActors, supervising, until


async def test_all_load_side_by_side_and_the_first_map_is_complete(actors: FakeActors) -> None:
    def make(spec: Spec) -> Actor:
        actor = WorkingActor(spec)
        actor.answers["load"] = lambda: asyncio.sleep(10, actor.ready)
        return actor

    actors.make = make
    actors.set(replicas=2)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready", within=15)
        state = supervisor.state()
        assert state.map_version == 1
        assert state.fronts == ("front-0", "front-1")
        assert [(a.id, a.group) for a in state.actors if a.kind == "expert"] == [
            *(("expert-g0-r0", 0), ("expert-g0-r1", 0)),
            *(("expert-g1-r0", 1), ("expert-g1-r1", 1)),
        ]
        assert state.progress.loaded == state.progress.total == 6 * 5
        assert not actors.ended
        started = [call[1] for name in state.fronts for call in actors[name].calls if call[0] == "start"]
        assert [len(expert_map.replicas) for expert_map in started] == [4, 4], "fronts begin with the whole map"
    assert sorted(actors.ended) == sorted(actors.created)


async def test_the_lane_local_needs_no_replica(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(lane="local", groups=4, fronts=1)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert [a.id for a in supervisor.state().actors] == ["front-0"]


REFUSED = ConfigError("kv_cache_gib=1e-05 holds nothing")


@pytest.mark.parametrize(
    ("settings", "answers", "message"),
    [
        ({"groups": 3}, {}, "groups=3 does not divide 8 experts: choose 1, 2, 4 or 8"),
        ({"max_model_len": 1000}, {}, "max_model_len=1000 is more than the model's context of 256 tokens"),
        ({}, {"start": REFUSED}, "kv_cache_gib=1e-05 holds"),
        ({}, {"load": asyncio.Event().wait}, "not ready after load_timeout_s=100: front-0, front-1, expert-g0-r0"),
    ],
    ids=["groups", "max_model_len", "what a front refuses", "load_timeout_s"],
)
async def test_bring_up_fails_with_the_reason_and_leaves_nothing(
    actors: FakeActors, settings: dict[str, Any], answers: dict[str, Any], message: str
) -> None:
    def make(spec: Spec) -> Actor:
        actor = WorkingActor(spec)
        actor.answers |= answers
        return actor

    actors.make = make
    actors.set(load_timeout_s=100.0, **settings)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "failed")
        assert message in (supervisor.state().error or "")
        assert all(a.state == "dead" for a in supervisor.state().actors)
        assert not actors.actors


async def test_who_dies_over_the_first_start_is_started_anew(actors: FakeActors) -> None:
    """A machine or a process may be lost at any time: that is no reason to end all others."""
    dying = ["front-0", "front-0.1", "expert-g1-r0"]

    def make(spec: Spec) -> Actor:
        actor = WorkingActor(spec)
        if spec.actor_id in dying:
            actor.answers["load"] = DeadActorError("lost")
        if spec.actor_id == "front-1":
            actor.answers["start"] = DeadActorError("lost")
        return actor

    actors.make = make
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert sorted(supervisor.state().fronts) == ["front-0.2", "front-1.1"]
        assert sorted(actors.ended) == sorted([*dying, "front-1"])


async def test_who_keeps_dying_over_the_first_start_ends_it(actors: FakeActors) -> None:
    def make(spec: Spec) -> Actor:
        actor = WorkingActor(spec)
        if spec.actor_id.startswith("front"):
            actor.answers["load"] = DeadActorError("lost")
        return actor

    actors.make = make
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "failed")
        assert len([name for name in actors.created if name.startswith("front-0")]) == 1 + MAX_DEATHS


async def test_a_front_is_told_of_the_caches_on_its_own_node_only(actors: FakeActors) -> None:
    actors.set(fronts=4, lane="local")
    fleet, told = Fleet(actors.blueprint, actors, Metrics()), dict[str, tuple[int, ...]]()
    fleet.set_wanted(fleet.wanted)

    def make(report: ReadyReport) -> Actor:
        def start(expert_map: object, legacy: object, others: tuple[int, ...]) -> ReadyReport:
            told[report.actor_id] = others
            return replace(report, kv_cache_bytes=7)

        return Actor(report.actor_id, start=start)

    for member, node in zip(fleet.members, ("a", "a", "a", "b"), strict=True):
        member.ready = replace(ready(member.spec.actor_id), node=node)
        member.handle = make(member.ready)
    fleet.members[2].handle = None  # it is dead
    for number in (0, 3, 1):
        await join(fleet, fleet.members[number])
    assert told == {"front-0": (0,), "front-1": (7,), "front-3": ()}
    assert [m.ready.kv_cache_bytes for m in fleet.members if m.ready] == [7, 7, 0, 7]
