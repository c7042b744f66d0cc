"""What control costs as the cluster grows: CPU of the supervisor's work, without Ray and without a model.

    python -m benchmarks.control [--out FILE] [--profile watch]

64 groups, 94 layers of 128 experts, and members that are objects of this process (benchmarks/in_process.py), each with
the report of one that has served. Arguments of calls are pickled and answers are read from their pickled form, as for
Ray; what a call
of Ray costs is measured beside it, with one real actor. CPU of the members is not counted. Medians.
"""

import asyncio
import cProfile
import json
import logging
import pickle
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from zlib import crc32

import httpx
import numpy as np
import typer

from benchmarks.in_process import Actor, ActorsHere, Spec, WorkingActor
from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.report import environment, table
from cluster.config import ClusterConfig
from cluster.control.supervisor import Supervisor
from cluster.control.watch import Watch
from cluster.messages.actors import ActorReport, FrontSpec, Machine, ReplicaSpec
from cluster.metrics import Metrics
from deploy.ingress import cluster_api
from deploy.ingress.api import create_api
from deploy.ingress.service import Service

GROUPS = 64
# (fronts, replicas of each group): with 64 groups 128, 320 and 1,024 replicas.
SIZES = ((6, 2), (16, 5), (50, 16))
# The real number of layers and experts; all else as small as a checkpoint may be.
MODEL: dict[str, Any] = json.loads(Path(__file__).with_name("control_model.json").read_text())
LAYERS, EXPERTS = MODEL["num_hidden_layers"], MODEL["num_local_experts"]

Work = Callable[[], Awaitable[Any]]


class Served(WorkingActor):
    """Has the report of an actor that has served for a while."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.metrics = Metrics()
        self.ready = replace(self.ready, node=node_of(spec))
        self.answers["load"] = self.ready
        if isinstance(spec, ReplicaSpec):
            group = str(spec.group)
            self.metrics.observe("expert_compute_seconds", 0.001, group=group)
            self.metrics.inc("expert_tokens_total", 64, group=group, replica=spec.actor_id)
        else:
            self._load = np.random.default_rng(0).pareto(1.2, (LAYERS, EXPERTS))
            self.metrics.observe("step_seconds", 0.05)
            self.metrics.observe("request_queue_time_seconds", 0.01)
            self.metrics.observe("dispatch_seconds", 0.001, lane="zmq")
        self._num_reports = 0

    def _report(self) -> ActorReport:
        self._num_reports += 1
        version = self.expert_map.version if self.expert_map else 0
        is_front = isinstance(self.spec, FrontSpec)
        counts = (100 * self._num_reports * self._load).astype(np.int64) if is_front else ()
        samples = self.metrics.samples() if is_front else self.metrics.recorded()
        return ActorReport(self.name, version, 64, samples, counts, "zmq" if is_front else "")


def node_of(spec: Spec) -> str:
    """Fronts have nodes of their own, replicas share them."""
    return spec.actor_id if isinstance(spec, FrontSpec) else f"node-{crc32(spec.actor_id.encode()) % 128}"


class Apart(ActorsHere):
    """As if members were other processes; `theirs` are the seconds of CPU that they have spent."""

    def __init__(self) -> None:
        super().__init__(Machine(10_000, 0, 64))
        self.theirs = 0.0

    def make(self, spec: Spec) -> Actor:
        started = time.process_time()
        actor = Served(spec)
        self.theirs += time.process_time() - started
        return actor

    async def call(self, handle: Actor, method: str, *args: Any, timeout: float | None = None) -> Any:
        async with asyncio.timeout(timeout):
            await asyncio.sleep(0)  # the answer comes in another turn of the loop
            pickle.dumps((method, args), 5)
            started = time.process_time()
            answer = pickle.dumps(await handle.answer(method, *args), 5)
            self.theirs += time.process_time() - started
            return pickle.loads(answer)


class Link:
    """What an ingress asks of the supervisor goes between processes, too."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor

    async def push_samples(self, ingress_id: str, samples: Any) -> Any:
        return _copied(self.supervisor.push_samples(ingress_id, samples))

    async def exposition(self, ingress_id: str, samples: Any) -> bytes:
        return await self.supervisor.exposition(ingress_id, samples)

    async def experts(self) -> Any:
        return _copied(await self.supervisor.experts())


def _copied(answer: Any) -> Any:
    return pickle.loads(pickle.dumps(answer, 5))


class Cluster:
    """A supervisor and its members, brought up; its own watch is at rest while something is measured."""

    def __init__(self, model: Path, fronts: int, replicas: int) -> None:
        self.config = ClusterConfig(
            model=str(model), device="cpu", groups=GROUPS, fronts=fronts, replicas=replicas, redundant_experts=GROUPS,
            load_window_s=10.0,
        )  # fmt: skip
        self.actors = Apart()
        self.supervisor = Supervisor(self.config, self.actors)

    async def bring_up(self) -> "Cluster":
        self.supervisor.start()
        await until_ready(self.supervisor)
        self.watch.end()
        await asyncio.sleep(1.0)  # until the round that is under way has ended
        return self

    @property
    def watch(self) -> Watch:
        assert self.supervisor._watch is not None
        return self.supervisor._watch

    async def cpu_ms(self, work: Work, repeat: int, profile: bool = False) -> float:
        """Of the supervisor's process, less what members have spent."""
        taken = []
        for _ in range(repeat):
            started, theirs = time.process_time(), self.actors.theirs
            with cProfile.Profile() if profile else _Nothing() as profiler:
                await work()
            taken.append(time.process_time() - started - (self.actors.theirs - theirs))
            if profile:
                pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
        return 1000 * statistics.median(taken)

    async def publish(self) -> None:
        """One replica leaves, or comes back: the next version goes to every front."""
        member = self.watch.fleet.of_kind("expert")[0]
        member.enter("draining" if member.state == "ready" else "ready")
        await self.watch.fleet.publish()

    async def plan(self) -> None:
        await self.supervisor.rebalance(dry_run=True, force=True)

    async def take_over(self) -> None:
        """A successor keeps all members, and none is started."""
        before = set(self.actors.named())
        self.supervisor._tasks.cancel_others()
        self.supervisor = Supervisor(self.config, self.actors)
        self.supervisor.start()
        await until_ready(self.supervisor)
        assert set(self.actors.named()) == before, "a member was ended or started"
        self.watch.end()


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


async def until_ready(supervisor: Supervisor) -> None:
    while supervisor._state != "ready":
        assert supervisor._state != "failed", supervisor._error
        await asyncio.sleep(0.01)


async def measure(model: Path, fronts: int, replicas: int, profiled: str | None) -> dict[str, float]:
    cluster = await Cluster(model, fronts, replicas).bring_up()
    service = Service(cluster.config, model, Link(cluster.supervisor))  # type: ignore[arg-type]
    service._follow.cancel()
    service.client.update = lambda state: None  # type: ignore[method-assign]  # its fronts are no actors of Ray
    http = httpx.AsyncClient(transport=httpx.ASGITransport(create_api(service)), base_url="http://127.0.0.1:8000")

    async def get(path: str) -> None:
        (await http.get(path)).raise_for_status()

    work: dict[str, tuple[Work, int]] = {
        "watch": (cluster.watch.round, 9),
        "publish": (cluster.publish, 9),
        "metrics": (lambda: get("/metrics"), 5),
        "cluster": (lambda: get("/v1/cluster"), 9),
        "experts": (lambda: get("/v1/experts"), 5),
        "plan": (cluster.plan, 3),
        "rebalance": (lambda: cluster.supervisor.rebalance(force=True), 1),
    }
    figures: dict[str, float] = {"fronts": fronts, "replicas": GROUPS * replicas}
    for name, (run, repeat) in work.items():
        if name != "rebalance":  # after the first one there is nothing left to move
            await run()
        figures[name] = await cluster.cpu_ms(run, repeat, name == profiled)
    started = time.perf_counter()
    figures["takeover_cpu"] = await cluster.cpu_ms(cluster.take_over, 1, profiled == "takeover")
    figures["takeover_seconds"] = time.perf_counter() - started
    await http.aclose()
    await service.close()
    return figures


def of_ray() -> dict[str, float]:
    """In a process of its own: Ray reads its settings when it is imported."""
    command = [sys.executable, "-m", "benchmarks.ray_calls"]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def main(
    out: Annotated[Path | None, typer.Option(help="write the figures there as JSON")] = None,
    profile: Annotated[str | None, typer.Option(help="profile this work at the largest size")] = None,
) -> None:
    logging.disable(logging.WARNING)
    cluster_api.REFRESH_TIMEOUT_S = 60.0  # this process is the supervisor, too, and others may use the machine
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(MODEL, Path(directory))
        sizes = SIZES[-1:] if profile else SIZES
        figures = [asyncio.run(measure(Path(directory), *size, profile)) for size in sizes]
    calls = of_ray() if not profile else {}
    columns = list(figures[0])
    table(columns, [[f"{each[name]:.4g}" for name in columns] for each in figures])
    table(("a call of Ray", "us of CPU"), [(what, f"{spent:.0f}") for what, spent in calls.items()])
    if out:
        out.write_text(
            json.dumps({"environment": environment(), "ray_call_us": calls, "figures": figures}, indent=2) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
