"""A thousand replicas in some hundred groups: what control does for four it does for all, and for all at once."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.in_process import WorkingActor
from cluster.actor_id import ActorId, slot_of
from cluster.control.supervisor import Supervisor
from cluster.messages.actors import Wanted
from tests.checkpoints import TinyModel, write_checkpoint
from tests.unit.control.fake_actors import FakeActors, fleet_of, supervising, until

GROUPS, REPLICAS, FRONTS = 256, 4, 8
MANY = TinyModel({"num_local_experts": GROUPS, "num_hidden_layers": 1})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MANY, tmp_path_factory.mktemp("many"))


def lose(actors: FakeActors, names: Iterable[str]) -> None:
    for name in names:
        actors.actors.pop(name).die()


def check(actors: FakeActors, supervisor: Supervisor, wanted: Wanted) -> None:
    """All that there should be is there, in the newest map and nowhere else; every front has that map."""
    fleet, state = fleet_of(supervisor), supervisor.state()
    fleet.expert_map.check_integrity()
    assert (state.wanted, len(state.fronts), state.draining) == (wanted, wanted.fronts, ())
    replicas = [address.replica_id for address in fleet.expert_map.replicas]
    assert Counter(ActorId.parse(name).group for name in replicas) == Counter(dict(enumerate(wanted.replicas)))
    assert sorted(actors.named()) == sorted([*replicas, *state.fronts])
    fronts = [actors[name] for name in state.fronts]
    assert {front.expert_map for front in fronts} == {fleet.expert_map}  # type: ignore[attr-defined]


async def test_a_thousand_members(actors: FakeActors) -> None:
    actors.make = WorkingActor
    actors.set(groups=GROUPS, replicas=REPLICAS, fronts=FRONTS)
    wanted = Wanted(FRONTS, (REPLICAS,) * GROUPS)
    async with supervising(actors) as first:
        await until(lambda: first._state == "ready")
        check(actors, first, wanted)
        assert first.state().map_version == 1

        lost = sorted(actors.named())[::10][:100]
        lose(actors, lost)
        await until(lambda: first._state == "degraded")
        await until(lambda: first._state == "ready")
        check(actors, first, wanted)
        assert sorted(actors.created[-100:]) == sorted(f"{name}.1" for name in lost)
        text = (await first.exposition("in", ())).decode()
        fronts = sum(name.startswith("front") for name in lost)
        assert f'outcrop_actor_restarts_total{{kind="expert"}} {100 - fronts:.1f}' in text
        assert f'outcrop_actor_restarts_total{{kind="front"}} {fronts:.1f}' in text
        assert f'outcrop_expert_replicas{{group="255",state="ready"}} {REPLICAS:.1f}' in text

        await first.scale(fronts=4, replicas=3)
        await first.scale(group=7, replicas=12)
        wanted = Wanted(4, (3,) * 7 + (12,) + (3,) * (GROUPS - 8))
        await until(lambda: len(fleet_of(first).members) == 4 + 3 * (GROUPS - 1) + 12)
        await until(lambda: len(fleet_of(first).expert_map.replicas) == 3 * (GROUPS - 1) + 12)
        check(actors, first, wanted)
        assert len(actors.ended) == (FRONTS - 4) + GROUPS

        first._tasks.cancel_others()
        lost = sorted(actors.named())[::10][:50]
        lose(actors, lost)
        kept, created = actors.named(), len(actors.created)
        async with supervising(actors) as second:
            await until(lambda: second._state == "ready")
            check(actors, second, wanted)
            assert kept.items() <= actors.named().items(), "who lives is kept"
            successors = actors.created[created:]
            assert sorted(map(slot_of, successors)) == sorted(map(slot_of, lost))
            assert not {n for n in successors if n.startswith("expert")} & set(lost), "under names of their own"
