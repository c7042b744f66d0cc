"""The supervisor on a real Ray with fake GPUs: starts, reports, notices losses, stops everything."""

import asyncio
import os
import shutil
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.config import ClusterConfig
from cluster.control import ray_actors
from cluster.control.supervisor import Supervisor
from cluster.messages.actors import Machine
from cluster.messages.requests import GenerationRequest, RequestOutput, SamplingParams
from tests.checkpoints import generate, load_reference

PROMPT = [(11 * i) % 250 for i in range(19)]
Fields = dict[str, Any]


@asynccontextmanager
async def running(model_dir: Path, **settings: Any) -> AsyncIterator[Supervisor]:
    namespace = f"test-{uuid.uuid4().hex[:8]}"
    supervisor = Supervisor(ClusterConfig(model=str(model_dir), device="cpu", **settings), namespace)
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
        computed = len(PROMPT) + 11
        assert [sum(layer) for layer in experts["counts"]] == [2 * 2 * computed] * 6
        assert 0.5 <= experts["balancedness"] <= 1
        text = (await supervisor.exposition("in", ())).decode()
        assert f"outcrop_generation_tokens_total {2 * 12:.1f}" in text
        assert 'outcrop_expert_replicas{group="1",state="ready"} 2.0' in text
        assert 'outcrop_lane_bytes_total{direction="sent",lane="zmq"}' in text
        assert {a.lane for a in supervisor.state().actors} == {"zmq"}, "auto takes the fast lane where it can"
        pids = [a.pid for a in state.actors]
    await until(lambda: not any(is_alive(pid) for pid in pids))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_dead_replica_leaves_the_map_and_is_replaced(ray_session: None, granite_dir: Path) -> None:
    expected = generate(load_reference(granite_dir), PROMPT, 12)
    async with running(granite_dir, groups=1, replicas=2) as supervisor:
        victim = next(a for a in supervisor.state().actors if a.id == "expert-g0-r1")
        os.kill(victim.pid, signal.SIGKILL)
        await submit(front(supervisor), "a", max_tokens=12)
        assert tokens((await collect(front(supervisor)))["a"]) == expected
        await until(lambda: supervisor.state().state == "degraded")
        assert "expert-g0-r1" in supervisor.state().phase
        await until(lambda: supervisor.state().state == "ready")
        assert {a.id for a in supervisor.state().actors if a.kind == "expert"} == {"expert-g0-r0", "expert-g0-r1.1"}
        assert supervisor.state().map_version == 3, "one without the dead replica, one with the new"


async def test_without_any_replica_the_front_computes_until_one_is_back(ray_session: None, granite_dir: Path) -> None:
    expected = generate(load_reference(granite_dir), PROMPT, 40)
    async with running(granite_dir, groups=2, replicas=1) as supervisor:
        for actor in supervisor.state().actors:
            if actor.kind == "expert":
                os.kill(actor.pid, signal.SIGKILL)
        await submit(front(supervisor), "a", max_tokens=40)
        assert tokens((await collect(front(supervisor)))["a"]) == expected
        text = (await supervisor.exposition("in", ())).decode()
        assert "outcrop_local_fallback_tokens_total 0.0" not in text
        await until(lambda: supervisor.state().state == "degraded")
        await until(lambda: supervisor.state().state == "ready")
        before = sum(a.tokens for a in supervisor.state().actors if a.kind == "expert")
        await submit(front(supervisor), "b", max_tokens=40)
        assert tokens((await collect(front(supervisor)))["b"]) == expected
        await supervisor.exposition("in", ())
        assert sum(a.tokens for a in supervisor.state().actors if a.kind == "expert") > before


async def test_a_dead_front_is_replaced(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=1) as supervisor:
        os.kill(next(a.pid for a in supervisor.state().actors if a.kind == "front"), signal.SIGKILL)
        await until(lambda: supervisor.state().state == "recovering")
        assert supervisor.state().fronts == ()
        await until(lambda: supervisor.state().state == "ready")
        assert supervisor.state().fronts == ("front-0.1",)
        await submit(front(supervisor), "a", max_tokens=4)
        assert len(tokens((await collect(front(supervisor)))["a"])) == 4


async def test_a_new_supervisor_keeps_the_actors_of_one_that_crashed(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=2) as first:
        pids = {a.id: a.pid for a in first.state().actors}
        for task in first._tasks:
            task.cancel()
        os.kill(pids["expert-g1-r0"], signal.SIGKILL)  # lost while nobody was watching
        second = Supervisor(first.config, first.namespace)
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


async def test_takeover_keeps_what_lives_whatever_else_is_wrong(
    ray_session: None, granite_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(granite_dir, tmp_path / "model"))
    async with running(model, groups=1, fronts=2, drain_timeout_s=0.2) as first:
        await submit(front(first, 1), "long", ingress="silent", max_tokens=200)
        await first.scale(fronts=1)
        await first.scale(fronts=2)  # while front-1 still leaves
        await until(lambda: first.state().fronts == ("front-0", "front-2") and not first.state().draining)
        pids = {a.id: a.pid for a in first.state().actors}
        for task in first._tasks:
            task.cancel()
        (model / "config.json").rename(tmp_path / "away")
        monkeypatch.setattr(ray_actors, "machine", lambda: Machine(2, 0, 2))  # nodes have gone since
        second = Supervisor(first.config, first.namespace)
        second.start()
        try:
            await until(lambda: "config.json is missing" in (second.state().error or ""))
            assert (second.state().state, second.state().fronts) == ("recovering", ("front-0", "front-2"))
            await submit(front(second, 1), "a", max_tokens=4)
            assert len(tokens((await collect(front(second, 1)))["a"])) == 4
            (tmp_path / "away").rename(model / "config.json")
            await until(lambda: second.state().state == "ready")
            assert {a.id: a.pid for a in second.state().actors} == pids
        finally:
            await second.stop()


async def test_a_changed_configuration_keeps_nothing(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=1, max_num_seqs=8) as first:
        pids = [a.pid for a in first.state().actors]
        for task in first._tasks:
            task.cancel()
        second = Supervisor(first.config.model_copy(update={"groups": 2, "max_num_seqs": 4}), first.namespace)
        second.start()
        await until(lambda: second.state().state in ("ready", "failed"))
        assert not set(pids) & {a.pid for a in second.state().actors}
        await second.stop()
        await until(lambda: not any(is_alive(pid) for pid in pids))


async def test_abort_frees_everything_within_a_step(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=1, max_num_seqs=2, max_num_waiting=3) as supervisor:
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


async def test_object_ref_lane_opens_no_socket(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, groups=2, lane="object_ref") as supervisor:
        await submit(front(supervisor), "a", max_tokens=4)
        assert len(tokens((await collect(front(supervisor)))["a"])) == 4
        assert {a.lane for a in supervisor.state().actors} == {"object_ref"}


async def test_local_lane_needs_no_replica(ray_session: None, granite_dir: Path) -> None:
    async with running(granite_dir, lane="local", groups=4) as supervisor:
        assert [a.id for a in supervisor.state().actors] == ["front-0"]
        await submit(front(supervisor), "a", max_tokens=4)
        assert len(tokens((await collect(front(supervisor)))["a"])) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 3}, "groups=3 does not divide 8 experts: choose 1, 2, 4 or 8"),
        ({"max_model_len": 1000}, "max_model_len=1000 is more than the model's context of 256 tokens"),
        ({"kv_cache_gib": 0.00001}, "kv_cache_gib=1e-05 holds"),
        ({"load_timeout_s": 8, "cpus_per_replica": 100}, "not ready after load_timeout_s=8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_bring_up_fails_with_the_reason_and_leaves_nothing(
    ray_session: None, granite_dir: Path, settings: Fields, message: str
) -> None:
    async with running(granite_dir, **settings) as supervisor:
        assert supervisor.state().state == "failed"
        assert message in (supervisor.state().error or "")
        assert all(a.state == "dead" for a in supervisor.state().actors)
