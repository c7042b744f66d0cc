"""What a supervisor keeps, ends and goes on with of the actors that one before it has left."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster.control import fleet as fleet_module
from cluster.control import supervisor as supervisor_module
from cluster.control import takeover
from cluster.control.members import Member
from cluster.control.supervisor import Supervisor
from cluster.errors import NotRunning
from cluster.expert_map import ExpertMap
from cluster.messages.actors import Identity, LaneKeys, Legacy, Machine, ReadyReport, Wanted
from cluster.models import hub
from tests.unit.fake_actors import FOUR, KEYS, THEN, Cluster, fleet_of, taking_over, until


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


async def test_lanes_open_by_the_keys_of_those_that_live(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nobody has told them before the blueprint was drawn, with new ones."""
    cluster.config = cluster.config.model_copy(update={"lane": "zmq"})
    cluster.left(*FOUR)
    monkeypatch.setattr(supervisor_module, "HUNG_S", 0.1)
    answers = {name: actor.answers.pop("identity") for name, actor in cluster.actors.items()}
    odd = answers["front-1"]
    answers["front-1"] = replace(odd, spec=replace(odd.spec, lane_keys=LaneKeys(b"o", b"d", b"d", b"s")))
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor._fleet is not None and supervisor._fleet.is_checked)
        for name in ("front-0", *FOUR[2:], "front-1"):
            cluster.actors[name].answers["identity"] = answers[name]
            await until(lambda name=name: name not in silent(supervisor))  # type: ignore[misc]
        assert cluster.ended == ["front-1"], "its lane would open to nobody"
        await until(lambda: cluster.created == ["front-1.1"])
        assert {m.spec.lane_keys for m in fleet_of(supervisor).members} == {KEYS}


def silent(supervisor: Supervisor) -> set[str]:
    return {m.spec.actor_id for m in fleet_of(supervisor).members if m.is_unknown}


async def test_nobody_who_serves_leaves_for_one_that_is_silent(cluster: Cluster) -> None:
    """front-0 was leaving when the supervisor died, and says so late."""
    cluster.left("front-1", *FOUR[2:], wanted=Wanted(1, (1, 1)))
    cluster.left("front-0", wanted=Wanted(1, (1, 1)), is_draining=True)
    leaving = cluster.actors["front-0"]
    identity = leaving.answers.pop("identity")
    async with taking_over(cluster) as supervisor:
        await until(lambda: leaving.was_asked("identity") > 5 and fleet_of(supervisor).is_checked)
        assert (supervisor.state().fronts, cluster.ended) == (("front-1",), [])
        leaving.answers["identity"] = identity
        await until(lambda: cluster.ended == ["front-0"])
        assert leaving.was_asked("drain")
        assert (supervisor.state().fronts, cluster.created) == (("front-1",), [])


async def test_a_replica_that_hangs_while_it_loads_is_replaced_and_holds_up_nobody(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "LOAD_LAYER_S", 0.5)
    cluster.left(*FOUR)
    lacking = cluster.actors["expert-g0-r0"]
    identity = lacking.answers["identity"]
    spec = replace(identity.spec, experts=((0,), *identity.spec.experts[1:]))
    lacking.answers["identity"] = replace(identity, spec=spec)
    del lacking.answers["set_experts"]
    async with taking_over(cluster) as supervisor:
        await until(lambda: lacking.was_asked("set_experts") == 1)
        await until(lambda: supervisor.state().state == "degraded")
        assert not cluster.ended
        assert not fleet_of(supervisor).placing.locked(), "others may enter the map"
        await until(lambda: cluster.created == ["expert-g0-r0.1"])
        assert cluster.ended == ["expert-g0-r0"]


async def test_what_is_learnt_late_of_an_actor_says_nothing_of_its_successor(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked before the configuration was known, and has been replaced meanwhile."""
    cluster.left(*FOUR)
    silent = cluster.actors["front-1"]
    del silent.answers["identity"]
    is_asked, dies = asyncio.Event(), asyncio.Event()

    async def die_late(method: str, *_: Any) -> Any:
        assert method == "identity"
        is_asked.set()
        await dies.wait()
        raise RayActorError

    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().phase == "waiting for front-1")
        monkeypatch.setattr(takeover, "REPORT_TIMEOUT_S", 20)
        silent._answer = die_late  # type: ignore[method-assign]
        await is_asked.wait()
        fleet = fleet_of(supervisor)
        member = next(m for m in fleet.members if m.spec.actor_id == "front-1")
        fleet.replace(member, "it does not fit")
        await until(lambda: cluster.created == ["front-1.1"])
        dies.set()
        await asyncio.sleep(0.2)
        assert (cluster.created, cluster.ended) == (["front-1.1"], ["front-1"])
        assert member.work is not None, "its successor is being started"


async def test_counters_do_not_fall_with_a_supervisor(cluster: Cluster) -> None:
    """Fronts know what actors that are gone have counted. Until all have told what they count, nothing is told."""
    cluster.left(*FOUR)
    tokens = ("outcrop_generation_tokens_total", ())
    for name, count in (("front-0", 10.0), ("front-1", 20.0)):
        actor = cluster.actors[name]
        actor.answers["report"] = replace(actor.answers["report"], samples=((*tokens, count),))
        legacy = Legacy(cluster.blueprint.wanted, ((*tokens, 1000.0),))
        actor.answers["identity"] = replace(actor.answers["identity"], legacy=legacy)
    identity = cluster.actors["front-1"].answers.pop("identity")
    supervisor = Supervisor(cluster.config, "test")
    with pytest.raises(NotRunning):
        await supervisor.exposition("ingress", ())
    supervisor.start()
    await until(lambda: supervisor.state().state == "degraded")
    with pytest.raises(NotRunning, match="waiting for front-1"):
        await supervisor.exposition("ingress", ())
    cluster.actors["front-1"].answers["identity"] = identity
    await until(lambda: supervisor.state().state == "ready")
    assert "outcrop_generation_tokens_total 1030.0" in (await supervisor.exposition("ingress", ())).decode()
    assert fleet_of(supervisor).legacy.counted == ((*tokens, 1000.0),)
    await supervisor.stop()


async def test_a_newer_commit_on_the_hub_ends_nobody(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = cluster.model.parent / "models--owner--name" / "snapshots"
    old = snapshots / ("a" * 40)
    snapshots.mkdir(parents=True)
    old.symlink_to(cluster.model)
    monkeypatch.setattr(hub, "_download", lambda *given: pytest.fail(f"a download: {given}"))
    cluster.model = old
    cluster.left(*FOUR)
    cluster.config = cluster.config.model_copy(update={"model": "owner/name"})
    async with taking_over(cluster) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert (cluster.ended, cluster.created) == ([], [])
