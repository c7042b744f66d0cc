"""The supervisor on a real Ray with fake GPUs: serves, heals, takes over. What needs no Ray: tests/unit/control."""

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.control.fleet import Fleet
from cluster.control.ray_actors import RayActors
from cluster.control.supervisor import Supervisor
from cluster.messages.requests import GenerationRequest, RequestOutput, SamplingParams
from tests.checkpoints import generate, load_reference

PROMPT = [(11 * i) % 250 for i in range(19)]
Fields = dict[str, Any]


@asynccontextmanager
async def running(model_dir: Path, **settings: Any) -> AsyncIterator[Supervisor]:
    namespace = f"test-{uuid.uuid4().hex[:8]}"
    supervisor = Supervisor(ClusterConfig(model=str(model_dir), device="cpu", **settings), RayActors(namespace))
    supervisor.start()
    try:
        await until(lambda: supervisor.state().state in ("ready", "failed"))
        yield supervisor
    finally:
        await supervisor.stop()


async def until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.05)


def fleet_of(supervisor: Supervisor) -> Fleet:
    assert supervisor._watch
    return supervisor._watch.fleet


def front(supervisor: Supervisor, number: int = 0) -> Any:
    state = supervisor.state()
    return ray.get_actor(state.fronts[number], state.namespace)


async def submit(actor: Any, request_id: str, ingress: str = "in", **params: Any) -> Any:
    request = GenerationRequest(request_id, ingress, tuple(PROMPT), SamplingParams(temperature=0.0, **params))
    await actor.open.remote(ingress)
    return await actor.submit.remote(request)


async def collect(actor: Any, ingress: str = "in", count: int = 1) -> dict[str, list[RequestOutput]]:
    """Outputs by request, until `count` requests have finished."""
    outputs: dict[str, list[RequestOutput]] = {}
    finished = received = 0
    while finished < count:
        delivery = await actor.poll.remote(ingress, received)
        received = delivery.first - 1 + len(delivery.outputs)
        for output in delivery.outputs:
            outputs.setdefault(output.request_id, []).append(output)
            finished += output.finish_reason is not None
    await actor.close.remote(ingress)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def test_two_groups_of_two_replicas_serve_and_report(ray_session: None, granite_dir: Path) -> None:
    expected = generate(load_reference(granite_dir), PROMPT, 12)
    settings: Fields = {"groups": 2, "replicas": 2, "fronts": 2, "gpus_per_replica": 1, "gpus_per_front": 0.5}
    async with running(granite_dir, **settings) as supervisor:
        state = supervisor.state()
        assert state.state == "ready", state.error
        assert state.map_version == 1
        assert state.fronts == ("front-0", "front-1")
        replicas = [a for a in state.actors if a.kind == "expert"]
        assert {(a.group, a.state) for a in replicas} == {(0, "ready"), (1, "ready")}
        assert len({a.gpu for a in replicas}) == 4, "each replica has a GPU of its own"
        assert state.progress.loaded == state.progress.total > 0
        for number in (0, 1):
            assert (await submit(front(supervisor, number), "a", max_tokens=12)).accepted
            outputs = await collect(front(supervisor, number))
            assert tokens(outputs["a"]) == expected
            await front(supervisor, number).check_integrity.remote()
        experts = await supervisor.experts()
        assert experts
        computed = len(PROMPT) + 11
        assert [sum(layer) for layer in experts.counts] == [2 * 2 * computed] * 6
        assert 0.5 <= experts.balancedness <= 1
        text = (await supervisor.exposition("in", ())).decode()
        assert f"outcrop_generation_tokens_total {2 * 12:.1f}" in text
        assert 'outcrop_expert_replicas{group="1",state="ready"} 2.0' in text
        assert 'outcrop_lane_bytes_total{direction="sent",lane="unix"}' in text
        assert {a.lane for a in supervisor.state().actors} == {"unix"}, "auto takes the fast lane where it can"
        pids = [a.pid for a in state.actors]
    await until(lambda: not any(is_alive(pid) for pid in pids))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_dead_replicas_leave_the_map_and_are_replaced(ray_session: None, granite_dir: Path) -> None:
    expected = generate(load_reference(granite_dir), PROMPT, 40)
    async with running(granite_dir, groups=1, replicas=2) as supervisor:
        kill(supervisor, "expert-g0-r1")
        await submit(front(supervisor), "a", max_tokens=40)
        assert tokens((await collect(front(supervisor)))["a"]) == expected
        await until(lambda: supervisor.state().state == "degraded")
        assert "expert-g0-r1" in supervisor.state().phase
        await until(lambda: supervisor.state().state == "ready")
        assert {a.id for a in supervisor.state().actors if a.kind == "expert"} == {"expert-g0-r0", "expert-g0-r1.1"}
        assert supervisor.state().map_version == 3, "one without the dead replica, one with the new"

        kill(supervisor, "expert-g0-r0", "expert-g0-r1.1")  # the front computes until one is back
        await submit(front(supervisor), "b", max_tokens=40)
        assert tokens((await collect(front(supervisor)))["b"]) == expected
        text = (await supervisor.exposition("in", ())).decode()
        assert "outcrop_local_fallback_tokens_total 0.0" not in text
        await until(lambda: supervisor.state().state == "degraded")
        await until(lambda: supervisor.state().state == "ready")
        before = computed_by_replicas(supervisor)
        await submit(front(supervisor), "c", max_tokens=40)
        assert tokens((await collect(front(supervisor)))["c"]) == expected
        await supervisor.exposition("in", ())
        assert computed_by_replicas(supervisor) > before


def kill(supervisor: Supervisor, *names: str) -> None:
    for actor in supervisor.state().actors:
        if actor.id in names:
            os.kill(actor.pid, signal.SIGKILL)


def computed_by_replicas(supervisor: Supervisor) -> int:
    return sum(a.tokens for a in supervisor.state().actors if a.kind == "expert")


async def test_a_dead_front_is_replaced(ray_session: None, granite_dir: Path) -> None:
    settings: Fields = {"lane": "object_ref", "max_num_seqs": 2, "max_num_waiting": 3}
    async with running(granite_dir, groups=2, **settings) as supervisor:
        kill(supervisor, "front-0")
        await until(lambda: supervisor.state().state == "recovering")
        assert supervisor.state().fronts == ()
        await until(lambda: supervisor.state().state == "ready")
        assert supervisor.state().fronts == ("front-0.1",)
        await submit(front(supervisor), "a", max_tokens=4)
        assert len(tokens((await collect(front(supervisor)))["a"])) == 4
        await supervisor.exposition("in", ())
        assert {a.lane for a in supervisor.state().actors} == {"object_ref"}
        await check_that_abort_frees_everything(supervisor)


async def check_that_abort_frees_everything(supervisor: Supervisor) -> None:
    """Within a step."""
    actor = front(supervisor)
    answers = [await submit(actor, str(i), max_tokens=200) for i in range(12)]
    assert [a.accepted for a in answers[:3]] == [True] * 3
    refused = [a for a in answers if not a.accepted]
    assert refused, "a queue of 3 behind 2 running ones can't take 12"
    assert {a.reason for a in refused} == {"full"}
    await actor.abort.remote(tuple(str(i) for i in range(12)))
    await actor.check_integrity.remote()
    text = (await supervisor.exposition("in", ())).decode()
    assert "outcrop_num_requests_running 0.0" in text
    assert "outcrop_kv_cache_usage_ratio 0.0" in text


async def test_a_new_supervisor_keeps_the_actors_of_one_that_crashed(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=2) as first:
        pids = {a.id: a.pid for a in first.state().actors}
        first._tasks.cancel_others()
        os.kill(pids["expert-g1-r0"], signal.SIGKILL)  # lost while nobody was watching
        second = Supervisor(first.config, first.actors)
        second.start()
        seen: set[str] = set()
        await until(lambda: seen.add(second.state().state) is None and second.state().state in ("ready", "failed"))
        try:
            assert second.state().error is None
            assert "starting" not in seen, "requests go on meanwhile"
            kept = {a.id: a.pid for a in second.state().actors}
            assert kept["front-0"] == pids["front-0"]
            assert kept["expert-g0-r0"] == pids["expert-g0-r0"]
            assert kept["expert-g1-r0.1"] != pids["expert-g1-r0"]
            assert second.state().map_version == 3, "one without the lost replica, one with the new"
            await submit(front(second), "a", max_tokens=4)
            assert len(tokens((await collect(front(second)))["a"])) == 4
        finally:
            await second.stop()
