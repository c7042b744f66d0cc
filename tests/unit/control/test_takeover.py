"""What a supervisor keeps, ends and goes on with of the actors that one before it has left."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.in_process import WorkingActor
from cluster.control import takeover
from cluster.expert_map import ExpertMap
from cluster.messages.actors import Machine, Wanted
from cluster.models import hub
from tests.unit.control.fake_actors import FOUR, THEN, FakeActors, fleet_of, supervising, until, with_addresses


async def test_what_lives_serves_on_while_the_checkpoint_cannot_be_read(actors: FakeActors) -> None:
    actors.left(*FOUR)
    config = actors.model / "config.json"
    config.rename(actors.model / "away")
    try:
        async with supervising(actors) as supervisor:
            await until(lambda: "next attempt" in supervisor.state().phase)
            state = supervisor.state()
            assert (state.state, state.fronts) == ("recovering", ("front-0", "front-1"))
            assert "config.json is missing" in (state.error or "")
            assert not actors.ended
            (actors.model / "away").rename(config)
            await until(lambda: supervisor.state().state == "ready")
            assert (supervisor.state().error, actors.ended, actors.created) == (None, [], [])
    finally:
        if not config.exists():
            (actors.model / "away").rename(config)


async def test_the_dead_are_replaced_once_the_blueprint_is_drawn(actors: FakeActors) -> None:
    actors.left(*FOUR[:-1])
    async with supervising(actors) as supervisor:
        await until(lambda: actors.created == ["expert-g1-r0.1"])
        assert supervisor.state().fronts == ("front-0", "front-1")
        assert not actors.ended


async def test_any_slot_is_as_good(actors: FakeActors) -> None:
    actors.left("front-0", "front-2", "expert-g0-r3.1", "expert-g1-r0")
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert supervisor.state().fronts == ("front-0", "front-2")
        assert (actors.ended, actors.created) == ([], [])


async def test_a_machine_that_has_changed_since_ends_nobody(actors: FakeActors) -> None:
    actors.left(*FOUR)
    actors.there = Machine(2, 4, 2)  # other shares, other threads, GPUs
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert (actors.ended, actors.created) == ([], [])
        assert fleet_of(supervisor).blueprint.resources.machine == THEN


async def test_members_that_the_configuration_has_changed_for_are_replaced(actors: FakeActors) -> None:
    actors.left(*FOUR)
    actors.set(max_num_seqs=3)
    async with supervising(actors) as supervisor:
        await until(lambda: sorted(actors.created) == ["front-0.1", "front-1.1"])
        assert actors.ended == ["front-0", "front-1"]
        assert {m.spec.engine.max_num_seqs for m in fleet_of(supervisor).of_kind("front")} == {3}  # type: ignore[union-attr]


async def test_one_too_many_is_drained(actors: FakeActors) -> None:
    actors.left("front-1", "front-2", *FOUR[2:], wanted=Wanted(1, (1, 1)))
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().fronts == ("front-1",))
        await until(lambda: actors.ended == ["front-2"])
        assert actors.created == []


async def test_one_that_was_leaving_goes_on_leaving(actors: FakeActors) -> None:
    actors.left("front-0", is_draining=True)
    actors.left("front-1", "front-2", *FOUR[2:])
    drained = actors["front-0"]
    async with supervising(actors) as supervisor:
        await until(lambda: actors.ended == ["front-0"])
        assert supervisor.state().fronts == ("front-1", "front-2")
        assert drained.was_asked("drain")


async def test_the_newest_map_counts_and_every_front_gets_it(actors: FakeActors) -> None:
    actors.left("front-0", *FOUR[2:], version=5)
    actors.left("front-1", version=6)  # the predecessor has died while it told them
    actors["front-1"].answers["identity"] = replace(
        actors["front-1"].answers["identity"], expert_map=replace(with_addresses(actors).expert_map, version=6)
    )
    async with supervising(actors) as supervisor:
        await until(lambda: actors["front-0"].was_asked("set_expert_map") > 0)
        assert actors["front-0"].calls[-1][0] in ("set_expert_map", "report")
        assert supervisor.state().map_version == 6
        assert not actors["front-1"].was_asked("set_expert_map")


def test_a_front_with_another_map_of_the_same_version_gets_a_newer_one() -> None:
    ours = ExpertMap(6, 1, (((0,), (0,)),))
    assert takeover._newer(ours, replace(ours, homes=(((0,), (1,)),))) == replace(ours, version=7)
    assert takeover._newer(ours, replace(ours, version=5)) is ours
    assert takeover._newer(ours, ours) is ours


async def test_a_replica_loads_what_it_lacks_before_it_enters_the_map(actors: FakeActors) -> None:
    """Its predecessor, or its supervisor's, has died in mid-rebalance."""
    actors.left(*FOUR)
    lacking, more = actors["expert-g0-r0"], actors["expert-g1-r0"]
    for actor, first in ((lacking, (0, 1, 2)), (more, tuple(range(8)))):
        identity = actor.answers["identity"]
        experts = (first, *identity.spec.experts[1:])
        actor.answers["identity"] = replace(identity, spec=replace(identity.spec, experts=experts))
    lacking.answers["set_experts"] = RuntimeError("the file can't be read")
    async with supervising(actors) as supervisor:
        await until(lambda: lacking.was_asked("set_experts") > 1)
        assert [r.replica_id for r in fleet_of(supervisor).expert_map.replicas] == ["expert-g1-r0"]
        lacking.answers["set_experts"] = 1
        await until(lambda: len(fleet_of(supervisor).expert_map.replicas) == 2)
        assert ("set_experts", 0, (0, 1, 2, 3)) in lacking.calls
        assert not more.was_asked("set_experts"), "what it has beside its group's experts does no harm"
        assert (actors.ended, actors.created) == ([], [])


async def test_a_first_start_that_fails_has_failed(actors: FakeActors) -> None:
    actors.set(groups=3)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "failed")
        assert "groups=3 does not divide 8 experts" in (supervisor.state().error or "")


async def test_a_newer_commit_on_the_hub_ends_nobody(actors: FakeActors, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = actors.model.parent / "models--owner--name" / "snapshots"
    old = snapshots / ("a" * 40)
    snapshots.mkdir(parents=True)
    old.symlink_to(actors.model)
    monkeypatch.setattr(hub, "_download", lambda *given: pytest.fail(f"a download: {given}"))
    actors.model = old
    actors.left(*FOUR)
    actors.set(model="owner/name")
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert (actors.ended, actors.created) == ([], [])


async def test_what_lives_is_kept_whatever_else_is_wrong(actors: FakeActors, checkpoint: Path) -> None:
    """Slots that are not the first, a checkpoint that is away, nodes that have gone since."""
    actors.make = WorkingActor
    actors.set(groups=1, drain_timeout_s=0.2)
    config = checkpoint / "config.json"
    async with supervising(actors) as first:
        await until(lambda: first.state().state == "ready")
        leaving = actors["front-1"]
        leaving.answers["report"] = replace(await leaving.answer("report"), num_requests=1)
        await first.scale(fronts=1)
        await first.scale(fronts=2)  # while front-1 still leaves
        await until(lambda: first.state().fronts == ("front-0", "front-2") and not first.state().draining)
        there = actors.named()
        first._tasks.cancel_others()
        config.rename(checkpoint / "away")
        actors.there = Machine(2, 0, 2)
        try:
            async with supervising(actors) as second:
                await until(lambda: "config.json is missing" in (second.state().error or ""))
                assert (second.state().state, second.state().fronts) == ("recovering", ("front-0", "front-2"))
                assert actors.named() == there
                (checkpoint / "away").rename(config)
                await until(lambda: second.state().state == "ready")
                assert actors.named() == there
        finally:
            if not config.exists():
                (checkpoint / "away").rename(config)


async def test_a_changed_configuration_keeps_nothing(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(groups=1, max_num_seqs=8)
    async with supervising(actors) as first:
        await until(lambda: first.state().state == "ready")
        there = actors.named()
        first._tasks.cancel_others()
        actors.set(groups=2, max_num_seqs=4)
        async with supervising(actors) as second:
            await until(lambda: second.state().state == "ready")
            assert sorted(actors.ended) == sorted(there)
            assert not set(actors.named().values()) & set(there.values())
            assert sorted(actors.named()) == sorted(FOUR)


async def test_a_crash_leaves_all_to_a_successor_who_replaces_the_lost(actors: FakeActors) -> None:
    actors.make = WorkingActor
    async with supervising(actors) as first:
        await until(lambda: first.state().state == "ready")
        there = actors.named()
        first._tasks.cancel_others()
        actors["expert-g1-r0"].die()  # while nobody was watching
        del actors.actors["expert-g1-r0"]
        async with supervising(actors) as second:
            seen: set[str] = set()
            await until(lambda: seen.add(second.state().state) is None and second.state().state == "ready")
            assert second.state().error is None
            assert "starting" not in seen, "requests go on meanwhile"
            there["expert-g1-r0.1"] = actors["expert-g1-r0.1"]
            del there["expert-g1-r0"]
            assert actors.named() == there
            assert second.state().map_version == 3, "one without the lost replica, one with the new"


async def test_the_successor_of_one_that_was_a_successor_has_a_name_of_its_own(actors: FakeActors) -> None:
    actors.make = WorkingActor
    async with supervising(actors) as first:
        await until(lambda: first.state().state == "ready")
        actors["expert-g1-r0"].die()
        await until(lambda: "expert-g1-r0.1" in actors.actors and first.state().state == "ready")
        first._tasks.cancel_others()
        actors.actors.pop("expert-g1-r0.1").die()
        async with supervising(actors) as second:
            await until(lambda: second.state().state == "ready")
            assert actors.created[-1] == "expert-g1-r0.2"
