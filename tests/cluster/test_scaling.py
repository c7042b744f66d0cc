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
from tests.checkpoints import generate, load_reference
from tests.cluster.test_supervisor import PROMPT, collect, front, is_alive, running, submit, tokens, until

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


def failovers(supervisor: Supervisor) -> int:
    samples = [s for a in supervisor._fleet.of_kind("front") if a.report for s in a.report.samples]  # type: ignore[union-attr]
    return sum(int(value) for name, _, value in samples if name == "outcrop_failovers_total")


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
        assert failovers(supervisor) == 0, "who leaves the map still answers what it was sent"
        text = (await supervisor.exposition("in", ())).decode()
        assert "outcrop_local_fallback_tokens_total 0.0" in text
        assert 'outcrop_expert_replicas_wanted{group="0"} 1.0' in text


async def test_a_leaving_front_finishes_what_it_has_accepted(ray_session: None, granite_dir: Path) -> None:
    expected = generate(load_reference(granite_dir), PROMPT, LENGTH)
    async with running(granite_dir, groups=1) as supervisor:
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


async def test_a_front_that_does_not_finish_is_ended_after_the_timeout(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=1, fronts=2, drain_timeout_s=0.5) as supervisor:
        await submit(front(supervisor, 1), "a", ingress="silent", max_tokens=200)
        await supervisor.scale(fronts=1)
        await until(lambda: len(supervisor.state().actors) == 2, timeout=15)


async def test_scaling_down_takes_a_member_that_is_still_starting(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=1) as supervisor:
        await supervisor.scale(replicas=3)
        await until(lambda: len(supervisor.state().actors) == 4)
        await supervisor.scale(replicas=1)
        await until(lambda: len(supervisor.state().actors) == 2)
        assert ids(supervisor, "expert") == ["expert-g0-r0"]
        await asyncio.sleep(1)
        assert supervisor.state().map_version == 1, "none of them ever joined"


async def test_a_successor_keeps_the_scaled_numbers(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=1) as first:
        await first.scale(replicas=2)
        await until(lambda: len(ids(first, "expert")) == 2)
        for task in first._tasks:
            task.cancel()
        second = Supervisor(first.config, first.namespace)
        second.start()
        await until(lambda: second.state().state in ("ready", "failed"))
        try:
            assert second.state().wanted == Wanted(1, (2,))
            assert {a.pid for a in second.state().actors} == {a.pid for a in first.state().actors}
        finally:
            await second.stop()


async def test_rebalance_moves_hot_experts_under_load(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=2, replicas=2) as supervisor, streaming(supervisor, granite_dir):
        before = (await supervisor.experts())["balancedness"]
        dry = await supervisor.rebalance(dry_run=True, force=True)
        assert (dry.is_dry_run, dry.map_version) == (True, 1)
        assert dry.balancedness_after > dry.balancedness_before == pytest.approx(before, abs=0.05)
        assert dry.bytes_to_move > 0
        report = await supervisor.rebalance(force=True)
        assert (report.error, report.reason) == ("", "")
        assert report.map_version == 1 + report.layers
        experts = await supervisor.experts()
        assert experts["balancedness"] > before
        held = [m.spec.experts for m in supervisor._fleet.of_kind("expert")]  # type: ignore[union-attr]
        expert_map = supervisor._fleet.expert_map  # type: ignore[union-attr]
        assert held == [expert_map.experts_of(m.group or 0) for m in supervisor._fleet.of_kind("expert")]  # type: ignore[union-attr]
        text = (await supervisor.exposition("in", ())).decode()
        assert "outcrop_rebalances_total 1.0" in text
        assert failovers(supervisor) == 0
        assert "outcrop_local_fallback_tokens_total 0.0" in text


async def test_redundant_experts_live_in_several_groups_and_tokens_stay(ray_session: None, granite_dir: Path) -> None:
    settings = {"groups": 2, "redundant_experts": 4}
    async with running(granite_dir, **settings) as supervisor, streaming(supervisor, granite_dir):
        report = await supervisor.rebalance(force=True)
        assert report.experts_moved > 0
        placement = (await supervisor.experts())["placement"]
        assert all(sum(map(len, layer)) <= 12 for layer in placement)
        assert any(len(groups) == 2 for layer in placement for groups in layer)


async def test_who_joins_after_a_rebalance_holds_what_the_map_says(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=2) as supervisor, streaming(supervisor, granite_dir):
        report = await supervisor.rebalance(force=True)
        assert report.layers > 0
        await supervisor.scale(group=0, replicas=2)
        victim = next(a.pid for a in supervisor.state().actors if a.id == "expert-g1-r0")
        os.kill(victim, signal.SIGKILL)
        await until(lambda: set(ids(supervisor, "expert")) == {"expert-g0-r0", "expert-g0-r1", "expert-g1-r0.1"})
        expert_map = supervisor._fleet.expert_map  # type: ignore[union-attr]
        for name in ids(supervisor, "expert"):
            identity = await ray.get_actor(name, supervisor.namespace).identity.remote()
            assert identity.spec.experts == expert_map.experts_of(identity.spec.group)


async def test_without_load_or_need_nothing_moves_and_the_reason_is_told(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=2, rebalance_threshold=0.1) as supervisor:
        assert (await supervisor.rebalance()).reason == "no load was seen"
        await submit(front(supervisor), "a", max_tokens=4)
        await collect(front(supervisor))
        assert "is not below the threshold 0.1" in (await supervisor.rebalance()).reason
        assert supervisor.state().map_version == 1


async def test_autoscaling_adds_fronts_while_requests_wait(ray_session: None, granite_dir: Path) -> None:
    settings = {"groups": 1, "autoscale": True, "max_fronts": 2, "max_num_seqs": 1, "max_replicas": 1}
    async with running(granite_dir, **settings) as supervisor:
        for i in range(60):
            await submit(front(supervisor), str(i), max_tokens=100)
        await until(lambda: len(supervisor.state().fronts) == 2)
        assert supervisor.state().wanted == Wanted(2, (1,))
