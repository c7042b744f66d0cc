"""Scaling and rebalancing on a real Ray: streams go on, tokens stay, nothing is left behind."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import ray

from cluster.control.supervisor import Supervisor
from cluster.messages.actors import Wanted
from cluster.messages.state import ExpertsReport
from tests.checkpoints import generate, load_reference
from tests.cluster.test_supervisor import PROMPT, collect, fleet_of, front, is_alive, running, submit, tokens, until

LENGTH = 40


class Stream:
    """Requests one after the other on the first front, until the block ends."""

    def __init__(self) -> None:
        self.answers: list[list[int]] = []
        self.stop = False

    async def run(self, supervisor: Supervisor) -> None:
        while not self.stop:
            name = str(len(self.answers))
            actor = front(supervisor)
            assert (await submit(actor, name, max_tokens=LENGTH)).accepted
            self.answers.append(tokens((await collect(actor))[name]))


@asynccontextmanager
async def streaming(supervisor: Supervisor, model_dir: Path) -> AsyncIterator[Stream]:
    """Yields once a first answer is there; at the end every answer must be that of transformers."""
    expected = generate(load_reference(model_dir), PROMPT, LENGTH)
    stream = Stream()
    task = asyncio.create_task(stream.run(supervisor))
    await until(lambda: bool(stream.answers) or task.done())
    yield stream
    seen = len(stream.answers)
    await until(lambda: len(stream.answers) > seen + 1 or task.done())
    stream.stop = True
    await task
    assert all(answer == expected for answer in stream.answers)


def ids(supervisor: Supervisor, kind: str, state: str = "ready") -> list[str]:
    return [a.id for a in supervisor.state().actors if a.kind == kind and a.state == state]


def failovers(supervisor: Supervisor) -> dict[str, float]:
    """By reason, as the fronts have counted them."""
    samples = [s for a in fleet_of(supervisor).of_kind("front") if a.report for s in a.report.samples]
    return {dict(labels)["reason"]: n for name, labels, n in samples if name == "outcrop_failovers_total" and n}


async def test_replicas_go_up_and_down_under_load(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=2) as supervisor, streaming(supervisor, granite_dir):
        assert await supervisor.scale(replicas=3) == Wanted(1, (3, 3))
        await until(lambda: len(ids(supervisor, "expert")) == 6)
        assert supervisor.state().state == "ready", "new members are no degradation"
        assert await supervisor.scale(group=1, replicas=1) == Wanted(1, (3, 1))
        await until(lambda: len(supervisor.state().actors) == 5)
        assert ids(supervisor, "expert") == ["expert-g0-r0", "expert-g1-r0", "expert-g0-r1", "expert-g0-r2"]
        await supervisor.scale(replicas=1)
        await until(lambda: len(supervisor.state().actors) == 3)
        await supervisor.exposition("in", ())
        # New processes take the cores for a while, and a part that is late is hedged: no fault of one that leaves.
        assert failovers(supervisor).keys() <= {"timeout"}, "who leaves the map still answers what it was sent"
        text = (await supervisor.exposition("in", ())).decode()
        assert "outcrop_local_fallback_tokens_total 0.0" in text
        assert 'outcrop_expert_replicas_wanted{group="0"} 1.0' in text


async def test_a_leaving_front_finishes_what_it_has_accepted(ray_session: None, granite_dir: Path) -> None:
    expected = generate(load_reference(granite_dir), PROMPT, LENGTH)
    async with running(granite_dir, groups=4, lane="local") as supervisor:
        assert [a.id for a in supervisor.state().actors] == ["front-0"], "the lane local needs no replica"
        await supervisor.scale(fronts=2)
        await until(lambda: len(supervisor.state().fronts) == 2)
        leaving = front(supervisor, 1)
        pid = next(a.pid for a in supervisor.state().actors if a.id == "front-1")
        for name in "abcd":
            await submit(leaving, name, max_tokens=LENGTH)
        await supervisor.scale(fronts=1)
        await until(lambda: supervisor.state().draining == ("front-1",))
        await until(lambda: not supervisor.state().fronts[1:])
        assert {tuple(tokens(outputs)) for outputs in (await collect(leaving, count=4)).values()} == {tuple(expected)}
        answer = await submit(leaving, "late", max_tokens=4)
        assert (answer.accepted, answer.reason) == (False, "draining")
        await until(lambda: not is_alive(pid))
        assert [a.id for a in supervisor.state().actors if a.kind == "front"] == ["front-0"]


async def test_rebalance_moves_hot_experts_under_load(ray_session: None, mixed_dir: Path) -> None:
    settings = {"groups": 2, "replicas": 2, "redundant_experts": 4}
    async with running(mixed_dir, **settings) as supervisor, streaming(supervisor, mixed_dir):
        before = await experts_of(supervisor)
        dry = await supervisor.rebalance(dry_run=True, force=True)
        assert (dry.is_dry_run, dry.map_version) == (True, 1)
        assert dry.balancedness_after > dry.balancedness_before == pytest.approx(before.balancedness, abs=0.05)
        assert dry.bytes_to_move > 0
        report = await supervisor.rebalance(force=True)
        assert (report.error, report.reason) == ("", "")
        assert report.experts_moved > 0
        assert report.map_version == 1 + report.layers
        after = await experts_of(supervisor)
        assert after.balancedness > before.balancedness
        assert all(sum(map(len, layer)) <= 12 for layer in after.placement)
        assert any(len(groups) == 2 for layer in after.placement for groups in layer)
        await check_held(supervisor)
        text = (await supervisor.exposition("in", ())).decode()
        assert "outcrop_rebalances_total 1.0" in text
        assert failovers(supervisor).keys() <= {"timeout"}
        assert "outcrop_local_fallback_tokens_total 0.0" in text

        await supervisor.scale(group=0, replicas=3)  # who joins now holds what the map says
        os.kill(next(a.pid for a in supervisor.state().actors if a.id == "expert-g1-r0"), signal.SIGKILL)
        there = {"expert-g0-r0", "expert-g0-r1", "expert-g0-r2", "expert-g1-r0.1", "expert-g1-r1"}
        await until(lambda: set(ids(supervisor, "expert")) == there)
        await check_held(supervisor)


async def experts_of(supervisor: Supervisor) -> ExpertsReport:
    report = await supervisor.experts()
    assert report
    return report


async def check_held(supervisor: Supervisor) -> None:
    """Every replica holds what the map says, and its supervisor knows it."""
    fleet = fleet_of(supervisor)
    for member in fleet.of_kind("expert"):
        expected = fleet.expert_map.experts_of(member.group or 0)
        assert member.spec.experts == expected  # type: ignore[union-attr]
        identity = await ray.get_actor(member.spec.actor_id, supervisor.actors.namespace).identity.remote()
        assert identity.spec.experts == expected
