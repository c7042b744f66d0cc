"""Experts move while the cluster serves: first they are loaded, then the map says so, then they are dropped."""

import asyncio

import pytest

from benchmarks.in_process import WorkingActor
from cluster.control.actors import ActorError, DeadActorError, UnreachableActorError
from cluster.control.rebalancing import MIB, carry_out, most_loaded
from cluster.control.supervisor import Supervisor
from cluster.messages.state import ExpertsReport
from tests.unit.control.fake_actors import FakeActors, fleet_of, supervising, until, watch_of

# By expert, in every layer: groups of 0-3 and 4-7 are far from balance.
HOT = (90, 80, 70, 60, 1, 2, 3, 4)


async def under_load(actors: FakeActors, supervisor: Supervisor) -> ExpertsReport:
    await until(lambda: supervisor.state().state == "ready")
    front = actors["front-0"]
    assert isinstance(front, WorkingActor)
    front.expert_counts = (HOT,) * 6
    report = await supervisor.experts()
    assert report
    return report


def held(actors: FakeActors) -> dict[str, tuple[tuple[int, ...], ...]]:
    replicas = {n: a for n, a in actors.actors.items() if n.startswith("expert")}
    return {name: actor.spec.experts for name, actor in replicas.items()}  # type: ignore[attr-defined]


async def test_hot_experts_move_and_every_replica_holds_what_the_map_says(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(replicas=2)
    async with supervising(actors) as supervisor:
        before = await under_load(actors, supervisor)
        assert before.counts == (HOT,) * 6
        dry = await supervisor.rebalance(dry_run=True, force=True)
        assert (dry.is_dry_run, dry.map_version) == (True, 1)
        assert dry.balancedness_after > dry.balancedness_before == before.balancedness
        assert dry.bytes_to_move > 0
        assert held(actors)["expert-g0-r0"] == fleet_of(supervisor).expert_map.experts_of(0)
        report = await supervisor.rebalance(force=True)
        assert (report.error, report.reason, report.layers) == ("", "", 6)
        assert report.map_version == 1 + report.layers
        after = await supervisor.experts()
        assert after
        assert after.balancedness > before.balancedness
        assert after.placement == fleet_of(supervisor).expert_map.homes != before.placement
        expert_map = fleet_of(supervisor).expert_map
        of_group = [expert_map.experts_of(group) for group in range(2)]
        assert held(actors) == {f"expert-g{g}-r{r}": of_group[g] for g in range(2) for r in range(2)}
        assert "outcrop_rebalances_total 1.0" in (await supervisor.exposition("in", ())).decode()


async def test_redundant_experts_live_in_several_groups(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(redundant_experts=4)
    async with supervising(actors) as supervisor:
        await under_load(actors, supervisor)
        assert (await supervisor.rebalance(force=True)).experts_moved > 0
        report = await supervisor.experts()
        assert report
        assert all(sum(map(len, layer)) <= 12 for layer in report.placement)
        assert any(len(groups) == 2 for layer in report.placement for groups in layer)


async def test_who_joins_after_a_rebalance_holds_what_the_map_says(actors: FakeActors) -> None:
    actors.make = WorkingActor
    async with supervising(actors) as supervisor:
        await under_load(actors, supervisor)
        assert (await supervisor.rebalance(force=True)).layers > 0
        await supervisor.scale(group=0, replicas=2)
        actors["expert-g1-r0"].die()
        names = {"expert-g0-r0", "expert-g0-r1", "expert-g1-r0.1"}
        await until(lambda: {r.replica_id for r in fleet_of(supervisor).expert_map.replicas} == names)
        expert_map = fleet_of(supervisor).expert_map
        assert {name: held(actors)[name] for name in names} == {
            name: expert_map.experts_of(0 if "g0" in name else 1) for name in names
        }


async def test_without_load_or_need_nothing_moves_and_the_reason_is_told(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(rebalance_threshold=0.1)
    async with supervising(actors) as supervisor:
        await until(lambda: supervisor.state().state == "ready")
        assert (await supervisor.rebalance()).reason == "no load was seen"
        await under_load(actors, supervisor)
        assert "is not below the threshold 0.1" in (await supervisor.rebalance()).reason
        assert supervisor.state().map_version == 1


@pytest.mark.parametrize("error", [ActorError("the file can't be read"), UnreachableActorError("away")])
async def test_a_replica_that_has_not_loaded_breaks_it_off_in_a_map_that_holds(
    actors: FakeActors, error: Exception
) -> None:
    actors.make = WorkingActor
    async with supervising(actors) as supervisor:
        before = await under_load(actors, supervisor)
        actors["expert-g0-r0"].answers["set_experts"] = DeadActorError("lost")
        actors["expert-g1-r0"].answers["set_experts"] = error
        report = await supervisor.rebalance(force=True)
        assert "expert-g1-r0 could not load experts of layer 0" in report.error
        assert fleet_of(supervisor).expert_map.homes == before.placement


async def test_a_replica_that_dies_does_not_break_it_off(actors: FakeActors) -> None:
    actors.make = WorkingActor
    async with supervising(actors) as supervisor:
        await under_load(actors, supervisor)
        actors["expert-g1-r0"].answers["set_experts"] = DeadActorError("lost")
        assert (await supervisor.rebalance(force=True)).error == ""


async def test_it_is_due_once_for_each_interval(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(rebalance_interval_s=100.0)
    async with supervising(actors) as supervisor:
        await under_load(actors, supervisor)
        fleet, rebalancer = fleet_of(supervisor), watch_of(supervisor).rebalancer
        assert not rebalancer.is_due
        await asyncio.sleep(90)
        assert fleet.expert_map.version == 1
        await until(lambda: fleet.expert_map.version == 1 + 6, within=15)
        front = actors["front-0"]
        assert isinstance(front, WorkingActor)
        front.expert_counts = tuple(
            tuple(1000 * (expert + 1) if groups == (0,) else 100 for expert, groups in enumerate(layer))
            for layer in fleet.expert_map.homes
        )
        await asyncio.sleep(80)
        assert fleet.expert_map.version == 1 + 6
        await until(lambda: fleet.expert_map.version > 1 + 6, within=25)
        assert not rebalancer.is_due
        assert not rebalancer.is_due, "to ask changes nothing"


async def test_unasked_nothing_is_ever_due(actors: FakeActors) -> None:
    actors.make = WorkingActor
    async with supervising(actors) as supervisor:
        await under_load(actors, supervisor)
        await asyncio.sleep(300)
        assert not watch_of(supervisor).rebalancer.is_due
        assert supervisor.state().map_version == 1


async def test_a_bound_on_what_is_loaded_spreads_the_layers_over_time(actors: FakeActors) -> None:
    actors.make = WorkingActor
    async with supervising(actors) as supervisor:
        await under_load(actors, supervisor)
        fleet = fleet_of(supervisor)
        plan = watch_of(supervisor).rebalancer._plan(fleet, force=True)
        most = most_loaded(plan)
        assert all(0 < most[layer] <= len(plan.moves) for layer in plan.changed_layers)
        loaded = sum(most.values()) * fleet.blueprint.bytes_per_expert
        started = asyncio.get_running_loop().time()
        await carry_out(plan, fleet, mib_per_s=loaded / 60 / MIB)
        assert asyncio.get_running_loop().time() - started == pytest.approx(60.0), "the event loop's own time"
        assert fleet.expert_map.homes == plan.homes
