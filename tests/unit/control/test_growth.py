"""What control does grows with the cluster, not with its square. Counted are calls of Python, not seconds."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from benchmarks.control import Apart, Served
from benchmarks.in_process import Spec
from cluster.config import ClusterConfig
from cluster.control.actors import ActorError
from cluster.control.supervisor import Supervisor
from cluster.expert_map import ExpertMap, MapChange
from tests.checkpoints import TinyModel, write_checkpoint
from tests.unit.control.fake_actors import fleet_of, until, watch_of

EXPERTS = 128
# Four times the members may take four times the calls and a little more, not sixteen times. A takeover waits for the
# clock too, and whoever waits is called meanwhile.
LINEAR = {"take_over": 10}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = TinyModel({"num_local_experts": EXPERTS, "num_hidden_layers": 2})
    return write_checkpoint(model, tmp_path_factory.mktemp("growing"))


class Recorded(Served):
    """Keeps what it was told, and has few experts to tell of."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._load = self._load[:2, :EXPERTS] if hasattr(self, "_load") else ()
        self.told: list[ExpertMap | MapChange] = []
        take = self.answers["set_expert_map"]
        self.answers["set_expert_map"] = lambda news, legacy: (self.told.append(news), take(news, legacy))[1]


class Cluster:
    def __init__(self, model: Path, groups: int, replicas: int, fronts: int) -> None:
        self.actors = Apart()
        self.actors.make = Recorded  # type: ignore[method-assign, assignment]
        self.config = ClusterConfig(
            model=str(model), device="cpu", groups=groups, fronts=fronts, replicas=replicas, autoscale=True
        )
        self.supervisor = Supervisor(self.config, self.actors)

    async def bring_up(self) -> "Cluster":
        self.supervisor.start()
        await until(lambda: self.supervisor._state == "ready")
        self.supervisor._tasks.cancel_others()
        return self

    async def take_over(self) -> None:
        self.supervisor = Supervisor(self.config, self.actors)
        await self.bring_up()

    async def publish(self) -> None:
        fleet = fleet_of(self.supervisor)
        member = fleet.of_kind("expert")[0]
        member.enter("draining" if member.state == "ready" else "ready")
        await fleet.publish()


async def calls(work: Callable[[], Awaitable[Any]]) -> int:
    """Of functions written in Python, while `work` runs."""
    number = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal number
        number += event == "call"

    sys.setprofile(note)
    try:
        await work()
    finally:
        sys.setprofile(None)
    return number


@pytest.mark.parametrize("what", ["round", "publish", "exposition", "state", "take_over", "autoscale", "plan"])
async def test_four_times_the_groups_and_fronts_take_four_times_the_calls(checkpoint: Path, what: str) -> None:
    found = []
    for groups, fronts in ((32, 8), (128, 32)):
        cluster = await Cluster(checkpoint, groups, 2, fronts).bring_up()

        times = count(1000.0, 10.0)

        async def state(cluster: Cluster = cluster) -> None:
            cluster.supervisor.state()

        async def autoscale(cluster: Cluster = cluster, times: Iterator[float] = times) -> None:
            watch = watch_of(cluster.supervisor)
            watch.autoscaler.decide(watch.fleet, next(times))

        work: dict[str, Callable[[], Awaitable[Any]]] = {
            "round": watch_of(cluster.supervisor).round,
            "publish": cluster.publish,
            "exposition": lambda cluster=cluster: cluster.supervisor.exposition("in", ()),  # type: ignore[misc]
            "state": state,
            "autoscale": autoscale,
            "plan": lambda cluster=cluster: cluster.supervisor.rebalance(dry_run=True, force=True),  # type: ignore[misc]
            "take_over": cluster.take_over,
        }
        await work[what]()
        found.append(await calls(work[what]))
    assert found[1] <= LINEAR.get(what, 6) * found[0], found


async def test_fronts_get_what_has_changed_and_know_the_whole_map(checkpoint: Path) -> None:
    cluster = await Cluster(checkpoint, 32, 2, 3).bring_up()
    fleet = fleet_of(cluster.supervisor)
    fronts = [cluster.actors[m.spec.actor_id] for m in fleet.of_kind("front")]
    for _ in range(2):
        await cluster.publish()
    await fleet.publish_homes(1, (*fleet.expert_map.homes[1][:-1], (0,)))
    for front in fronts:
        assert [type(news) for news in front.told] == [MapChange] * 3  # type: ignore[attr-defined]
        assert front.expert_map == fleet.expert_map  # type: ignore[attr-defined]
    fronts[0].expert_map = None  # type: ignore[attr-defined]
    await cluster.publish()
    assert [type(news) for news in fronts[0].told[3:]] == [MapChange, ExpertMap]  # type: ignore[attr-defined]
    assert fronts[0].expert_map == fleet.expert_map  # type: ignore[attr-defined]


async def test_of_a_node_with_many_replicas_one_asks_the_others(checkpoint: Path) -> None:
    cluster = await Cluster(checkpoint, 16, 4, 2).bring_up()
    members = fleet_of(cluster.supervisor).of_kind("expert")
    asked = [cluster.actors[m.spec.actor_id] for m in members]
    for member, actor in zip(members, asked, strict=True):
        assert member.ready
        member.ready = replace(member.ready, node="one")
        actor.calls.clear()
    victim = asked[-1]
    cluster.actors.actors.pop(victim.name).die()
    await watch_of(cluster.supervisor).collect()
    assert [actor.name for actor in asked if actor.was_asked("reports")] == [asked[0].name]
    assert members[-1].state == "dead"
    assert all(m.report and m.state == "ready" for m in members[:-1])


async def test_a_replica_that_can_not_ask_for_others_is_spared_and_another_one_asked(checkpoint: Path) -> None:
    cluster = await Cluster(checkpoint, 16, 1, 1).bring_up()
    members = fleet_of(cluster.supervisor).of_kind("expert")
    for member in members:
        assert member.ready
        member.ready = replace(member.ready, node="one")
    asked = [cluster.actors[m.spec.actor_id] for m in members]
    asked[0].answers["reports"] = ActorError("it does not reach the control store")
    for _ in range(3):
        await watch_of(cluster.supervisor).collect()
    assert [actor.was_asked("reports") for actor in asked[:3]] == [1, 2, 0]
    assert all(m.report and m.state == "ready" for m in members), "whoever fails at it is heard all the same"


async def test_a_front_with_the_map_of_another_supervisor_gets_the_whole_one(checkpoint: Path) -> None:
    """Its version may be as high, or higher: a change would be one of another map."""
    cluster = await Cluster(checkpoint, 16, 1, 1).bring_up()
    fleet = fleet_of(cluster.supervisor)
    front = cluster.actors[fleet.of_kind("front")[0].spec.actor_id]
    strange = replace(fleet.expert_map, version=fleet.expert_map.version + 1, replicas=fleet.expert_map.replicas[:-1])
    front.expert_map = strange  # type: ignore[attr-defined]
    for _ in range(3):
        await cluster.publish()
    assert front.expert_map == fleet.expert_map  # type: ignore[attr-defined]


async def test_who_asks_for_experts_at_once_gets_one_answer(checkpoint: Path) -> None:
    cluster = await Cluster(checkpoint, 16, 1, 2).bring_up()
    answers = await asyncio.gather(*(cluster.supervisor.experts() for _ in range(5)))
    assert len({id(answer) for answer in answers}) == 1
    later = await cluster.supervisor.experts()
    assert later is not answers[0], "fronts have counted on"
    assert later
    assert answers[0]
    assert later.counts != answers[0].counts
