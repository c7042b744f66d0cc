"""Actors of a predecessor that don't say who they are: that says nothing of them until it lasts."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from cluster.control.actors import DeadActorError
from cluster.control.supervisor import Supervisor
from cluster.errors import NotRunning
from cluster.messages.actors import LaneKeys, Legacy, Wanted
from tests.unit.control.fake_actors import (
    FOUR,
    KEYS,
    FakeActors,
    fleet_of,
    supervising,
    until,
    with_addresses,
)


async def test_a_silent_actor_keeps_its_place_until_it_answers(actors: FakeActors) -> None:
    actors.left(*FOUR)
    answers = {name: actors[name].answers.pop("identity") for name in ("front-1", "expert-g1-r0")}
    actors["front-0"].answers["identity"] = with_addresses(actors)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "degraded")
        state = supervisor.state()
        assert state.phase == "waiting for front-1, expert-g1-r0"
        assert (state.fronts, state.draining) == (("front-0",), ("front-1",)), "nothing new for it, until it answers"
        assert len(fleet_of(supervisor).expert_map.replicas) == 2, "fronts find out for themselves"
        for name, identity in answers.items():
            actors[name].answers["identity"] = identity
        await until(lambda: len(supervisor.state().fronts) == 2)
        await until(lambda: supervisor.state().state == "ready")
        assert (actors.ended, actors.created) == ([], [])


async def test_one_that_stays_silent_counts_as_hung(actors: FakeActors) -> None:
    actors.left(*FOUR)
    del actors["front-1"].answers["identity"]
    async with supervising(actors):
        await until(lambda: actors.created == ["front-1.1"])
        assert actors.ended == ["front-1"]


async def test_without_a_front_that_answers_silence_is_waited_for(actors: FakeActors) -> None:
    actors.left(*FOUR, version=7)
    answers = {name: actors[name].answers.pop("identity") for name in ("front-0", "front-1")}
    async with supervising(actors) as supervisor:
        await until(lambda: "don't answer yet" in supervisor.state().phase)
        assert supervisor.state().state == "recovering"
        for name, identity in answers.items():
            actors[name].answers["identity"] = identity
        await until(lambda: supervisor.state().state == "ready")
        assert (supervisor.state().map_version >= 7, actors.ended, actors.created) == (True, [], [])


async def test_stop_ends_actors_that_were_not_taken_over(actors: FakeActors) -> None:
    actors.left(*FOUR)
    for actor in actors.actors.values():
        actor.answers.pop("identity")
    async with supervising(actors) as supervisor:
        await until(lambda: "don't answer yet" in supervisor.state().phase)
    assert sorted(actors.ended) == sorted(FOUR)


async def test_lanes_open_by_the_keys_of_those_that_live(actors: FakeActors) -> None:
    """Also when nobody has told them before the blueprint was drawn, with new ones."""
    actors.set(lane="zmq")
    actors.left(*FOUR)
    answers = {name: actor.answers.pop("identity") for name, actor in actors.actors.items()}
    odd = answers["front-1"]
    answers["front-1"] = replace(odd, spec=replace(odd.spec, lane_keys=LaneKeys(b"o", b"d", b"d", b"s")))
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor._watch is not None and fleet_of(supervisor).is_checked)
        for name in ("front-0", *FOUR[2:], "front-1"):
            actors[name].answers["identity"] = answers[name]
            await until(lambda name=name: name not in silent(supervisor))  # type: ignore[misc]
        assert actors.ended == ["front-1"], "its lane would open to nobody"
        await until(lambda: actors.created == ["front-1.1"])
        assert {m.spec.lane_keys for m in fleet_of(supervisor).members} == {KEYS}


def silent(supervisor: Supervisor) -> set[str]:
    return {m.spec.actor_id for m in fleet_of(supervisor).members if m.is_unknown}


async def test_nobody_who_serves_leaves_for_one_that_is_silent(actors: FakeActors) -> None:
    """front-0 was leaving when the supervisor died, and says so late."""
    actors.left("front-1", *FOUR[2:], wanted=Wanted(1, (1, 1)))
    actors.left("front-0", wanted=Wanted(1, (1, 1)), is_draining=True)
    leaving = actors["front-0"]
    identity = leaving.answers.pop("identity")
    async with supervising(actors) as supervisor:
        await until(lambda: leaving.was_asked("identity") > 5 and fleet_of(supervisor).is_checked)
        assert (supervisor.state().fronts, actors.ended) == (("front-1",), [])
        leaving.answers["identity"] = identity
        await until(lambda: actors.ended == ["front-0"])
        assert leaving.was_asked("drain")
        assert (supervisor.state().fronts, actors.created) == (("front-1",), [])


async def test_a_replica_that_hangs_while_it_loads_is_replaced_and_holds_up_nobody(actors: FakeActors) -> None:
    actors.left(*FOUR)
    lacking = actors["expert-g0-r0"]
    identity = lacking.answers["identity"]
    spec = replace(identity.spec, experts=((0,), *identity.spec.experts[1:]))
    lacking.answers["identity"] = replace(identity, spec=spec)
    del lacking.answers["set_experts"]
    async with supervising(actors) as supervisor:
        await until(lambda: lacking.was_asked("set_experts") == 1)
        await until(lambda: supervisor.state().state == "degraded")
        assert not actors.ended
        assert not fleet_of(supervisor).placing.locked(), "others may enter the map"
        await until(lambda: actors.created == ["expert-g0-r0.1"])
        assert actors.ended == ["expert-g0-r0"]


async def test_what_is_learnt_late_of_an_actor_says_nothing_of_its_successor(actors: FakeActors) -> None:
    """It was asked before the configuration was known, and has been replaced meanwhile."""
    actors.left(*FOUR)
    silent = actors["front-1"]
    del silent.answers["identity"]
    is_asked, dies = asyncio.Event(), asyncio.Event()

    async def die_late() -> Any:
        is_asked.set()
        await dies.wait()
        raise DeadActorError

    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().phase == "waiting for front-1")
        silent.answers["identity"] = die_late
        await is_asked.wait()
        fleet = fleet_of(supervisor)
        member = next(m for m in fleet.members if m.spec.actor_id == "front-1")
        fleet.replace(member, "it does not fit")
        await until(lambda: actors.created == ["front-1.1"])
        dies.set()
        await asyncio.sleep(1)
        assert (actors.created, actors.ended) == (["front-1.1"], ["front-1"])
        assert member.work is not None, "its successor is being started"


async def test_counters_do_not_fall_with_a_supervisor(actors: FakeActors) -> None:
    """Fronts know what actors that are gone have counted. Until all have told what they count, nothing is told."""
    actors.left(*FOUR)
    tokens = ("outcrop_generation_tokens_total", ())
    for name, count in (("front-0", 10.0), ("front-1", 20.0)):
        actor = actors[name]
        actor.answers["report"] = replace(actor.answers["report"], samples=((*tokens, count),))
        legacy = Legacy(actors.blueprint.wanted, ((*tokens, 1000.0),))
        actor.answers["identity"] = replace(actor.answers["identity"], legacy=legacy)
    identity = actors["front-1"].answers.pop("identity")
    supervisor = Supervisor(actors.config, actors)
    with pytest.raises(NotRunning):
        await supervisor.exposition("ingress", ())
    supervisor.start()
    await until(lambda: supervisor.state().state == "degraded")
    with pytest.raises(NotRunning, match="waiting for front-1"):
        await supervisor.exposition("ingress", ())
    actors["front-1"].answers["identity"] = identity
    await until(lambda: supervisor.state().state == "ready")
    assert "outcrop_generation_tokens_total 1030.0" in (await supervisor.exposition("ingress", ())).decode()
    assert fleet_of(supervisor).legacy.counted == ((*tokens, 1000.0),)
    await supervisor.stop()
