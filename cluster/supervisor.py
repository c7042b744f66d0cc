"""The supervisor: starts fronts and expert replicas, publishes the expert map, reports the state of the cluster.

It runs inside a Serve replica of the application (deploy/app.py), on that replica's event loop. The only module of
`cluster` that knows Ray. Actors are detached and named in the application's namespace: a crash of the supervisor leaves
them alive, stop() ends them.
"""

import asyncio
import dataclasses
import importlib
import logging
import time
from typing import Any

import ray
import zmq
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from cluster.blueprint import Blueprint, draw_blueprint
from cluster.checkpoint import check_checkpoint, resolve_model
from cluster.config import ClusterConfig, ConfigError
from cluster.expert_map import ExpertMap, ReplicaAddress
from cluster.load import ExpertLoad
from cluster.messages import (
    ActorInfo,
    ActorKind,
    ActorReport,
    ActorState,
    ClusterState,
    FrontSpec,
    LaneKeys,
    LoadProgress,
    ReadyReport,
    ReplicaSpec,
    Sample,
)
from cluster.metrics import Metrics, cumulative, exposition, merge
from cluster.model_config import ModelError, read_model_config
from cluster.resources import Machine

logger = logging.getLogger(__name__)

# Named, not imported: the supervisor must not load torch, and `cluster` does not depend on `actors`.
ENTRYPOINTS: dict[ActorKind, str] = {"front": "actors.front:FrontActor", "expert": "actors.expert:ExpertActor"}
CONCURRENCY: dict[ActorKind, dict[str, Any]] = {
    "front": {"max_concurrency": 1000},
    "expert": {"concurrency_groups": {"control": 2}},
}
PROGRESS_PERIOD_S = 0.25
WATCH_PERIOD_S = 1.0
REPORT_TIMEOUT_S = 2.0
STOP_S = 3.0


@dataclasses.dataclass(slots=True)
class _Member:
    """A front or replica that the supervisor has started."""

    spec: FrontSpec | ReplicaSpec
    kind: ActorKind
    handle: Any
    state: ActorState = "starting"
    since: float = dataclasses.field(default_factory=time.time)
    progress: LoadProgress = dataclasses.field(default_factory=LoadProgress)
    ready: ReadyReport | None = None
    report: ActorReport | None = None
    detail: str = ""

    @property
    def group(self) -> int | None:
        return self.spec.group if isinstance(self.spec, ReplicaSpec) else None

    def enter(self, state: ActorState, detail: str = "") -> None:
        self.state, self.since, self.detail = state, time.time(), detail


class Supervisor:
    def __init__(self, config: ClusterConfig, namespace: str) -> None:
        self.config = config
        self.namespace = namespace
        self.metrics = Metrics()
        self.started = time.time()
        self._state: str = "starting"
        self._phase = "checking the checkpoint"
        self._error: str | None = None
        self._members: dict[str, _Member] = {}
        self._map: ExpertMap | None = None
        self._blueprint: Blueprint | None = None
        self._load: ExpertLoad | None = None
        self._ingress_samples: dict[str, tuple[Sample, ...]] = {}
        self._gone: tuple[Sample, ...] = ()
        self._tasks: list[asyncio.Task[None]] = []

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the cluster up in the background; state() tells how far it is."""
        self._tasks.append(asyncio.create_task(self._bring_up()))

    async def stop(self) -> None:
        """End every actor that was started. Safe to call twice."""
        self._state, self._phase = "stopping", "stopping"
        for task in self._tasks:
            if task is not asyncio.current_task():  # bring-up stops what it has started when it fails
                task.cancel()
        await self._close_lanes()
        for member in self._members.values():
            ray.kill(member.handle, no_restart=True)
            member.enter("dead", "stopped")

    async def _close_lanes(self) -> None:
        """Let replicas remove the files of their sockets; a killed process can't."""
        closing = [_await(m.handle.stop.remote()) for m in self._of_kind("expert") if m.state == "ready"]
        try:
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*closing, return_exceptions=True)
        except TimeoutError:
            logger.warning("replicas did not close their lanes in %g s", STOP_S)

    async def _bring_up(self) -> None:
        try:
            async with asyncio.timeout(self.config.load_timeout_s):
                blueprint = await self._draw_blueprint()
                self._create_members(blueprint)
                await self._load_members()
                await self._publish(self._live_replicas())
                await self._start_fronts()
                await self._collect()
        except Exception as error:
            await self._fail(error)
            return
        self._enter("ready", "ready")
        self._tasks.append(asyncio.create_task(self._watch()))

    async def _fail(self, error: Exception) -> None:
        told = isinstance(error, ConfigError | ModelError)
        self._error = str(error) if told else f"{type(error).__name__}: {error}"
        if isinstance(error, TimeoutError):
            waiting = [m.spec.actor_id for m in self._members.values() if m.state != "ready"]
            self._error = f"not ready after load_timeout_s={self.config.load_timeout_s:g}: {', '.join(waiting)}"
        logger.error("bring-up failed: %s", self._error, exc_info=None if told else error)
        await self.stop()
        self._enter("failed", "failed")

    def _enter(self, state: str, phase: str) -> None:
        self._state, self._phase = state, phase
        logger.info("cluster %s: %s", self.namespace, phase)

    # -- bring-up ------------------------------------------------------------------------------------------------

    async def _draw_blueprint(self) -> Blueprint:
        model_dir = await asyncio.to_thread(resolve_model, self.config.model)
        model = read_model_config(model_dir)
        info = await asyncio.to_thread(check_checkpoint, model_dir, model)
        keys = _new_keys() if self.config.lane in ("auto", "zmq") else None
        self._blueprint = draw_blueprint(self.config, info, model_dir, model, _machine(), keys)
        self._map = self._blueprint.expert_map
        self._load = ExpertLoad(model.num_hidden_layers, model.num_local_experts)
        return self._blueprint

    def _create_members(self, blueprint: Blueprint) -> None:
        self._enter("starting", "starting actors")
        resources = blueprint.resources
        for replica in blueprint.replicas:
            self._create("expert", replica, resources.cpus_per_replica, resources.gpus_per_replica)
        for front in blueprint.fronts:
            self._create("front", front, resources.cpus_per_front, resources.gpus_per_front)

    def _create(self, kind: ActorKind, spec: FrontSpec | ReplicaSpec, num_cpus: float, num_gpus: float) -> None:
        _end_leftover(spec.actor_id, self.namespace)
        module, _, name = ENTRYPOINTS[kind].partition(":")
        actor_class = ray.remote(**CONCURRENCY[kind])(getattr(importlib.import_module(module), name))
        options = actor_class.options(
            name=spec.actor_id,
            namespace=self.namespace,
            lifetime="detached",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=0,
            max_task_retries=0,
        )
        arguments = (spec, self.namespace) if kind == "front" else (spec,)
        self._members[spec.actor_id] = _Member(spec, kind, options.remote(*arguments))

    async def _load_members(self) -> None:
        self._phase = "loading weights"
        progress = asyncio.create_task(self._follow_progress())
        try:
            await asyncio.gather(*(self._load_member(m) for m in self._members.values()))
        finally:
            progress.cancel()

    async def _load_member(self, member: _Member) -> None:
        member.enter("loading")
        try:
            member.ready = await member.handle.load.remote()
        except RayError as error:
            member.enter("dead", str(error).splitlines()[-1])
            raise _cause(error) from None
        assert member.ready is not None
        member.progress = LoadProgress(member.ready.weight_bytes, member.ready.weight_bytes)
        if member.kind == "expert":
            self.metrics.observe("replica_start_seconds", time.time() - self.started)
            member.enter("ready")
        logger.info(
            "%s loaded %d bytes in %.1f s", member.spec.actor_id, member.ready.weight_bytes, member.ready.load_seconds
        )

    async def _follow_progress(self) -> None:
        while True:
            loading = [m for m in self._members.values() if m.ready is None]
            await asyncio.gather(*(self._ask_progress(m) for m in loading))
            await asyncio.sleep(PROGRESS_PERIOD_S)

    async def _ask_progress(self, member: _Member) -> None:
        try:
            progress = await asyncio.wait_for(_await(member.handle.progress.remote()), 1.0)
        except (TimeoutError, RayError):
            return  # still starting; a real failure surfaces in load()
        if member.ready is None:
            member.progress = progress

    async def _start_fronts(self) -> None:
        self._phase = "warming up"
        fronts = self._of_kind("front")
        await asyncio.gather(*(_await(m.handle.start.remote(self._map)) for m in fronts))
        for member in fronts:
            member.enter("ready")

    # -- expert map ----------------------------------------------------------------------------------------------

    def _live_replicas(self) -> tuple[ReplicaAddress, ...]:
        return tuple(
            ReplicaAddress(m.spec.actor_id, m.group or 0, (("object_ref", m.spec.actor_id), *m.ready.endpoints))
            for m in self._of_kind("expert")
            if m.state == "ready" and m.ready
        )

    async def _publish(self, replicas: tuple[ReplicaAddress, ...]) -> None:
        """Next version of the map, to every front that serves."""
        assert self._map is not None
        self._map = self._map.with_replicas(replicas)
        self._map.check_integrity()
        logger.info("expert map version %d: %d replicas", self._map.version, len(replicas))
        serving = [m for m in self._of_kind("front") if m.state == "ready"]
        await asyncio.gather(
            *(_await(m.handle.set_expert_map.remote(self._map)) for m in serving), return_exceptions=True
        )

    # -- watching ------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Read every member's report once a second; one that is dead leaves the map."""
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            try:
                await self._collect()
                live = self._live_replicas()
                if self._map and live != self._map.replicas:
                    await self._publish(live)
                self._judge()
            except Exception:
                logger.exception("watching goes on after an unexpected error")

    async def _collect(self) -> None:
        members = [m for m in self._members.values() if m.state in ("ready", "draining")]
        await asyncio.gather(*(self._ask(m) for m in members))
        if self._load:
            self._load.update({m.spec.actor_id: m.report.expert_counts for m in self._of_kind("front") if m.report})

    async def _ask(self, member: _Member) -> None:
        try:
            member.report = await asyncio.wait_for(_await(member.handle.report.remote()), REPORT_TIMEOUT_S)
        except RayActorError as error:
            if "unavailable" not in type(error).__name__.lower():
                self._bury(member, str(error).splitlines()[0])
        except (TimeoutError, GetTimeoutError):
            member.detail = "slow to answer"

    def _bury(self, member: _Member, why: str) -> None:
        logger.warning("%s is lost: %s", member.spec.actor_id, why)
        if member.report:
            self._gone = merge((self._gone, cumulative(member.report.samples)))
            member.report = None
        member.enter("dead", why)

    def _judge(self) -> None:
        """Ready if a generation could succeed now."""
        has_front = any(m.state == "ready" for m in self._of_kind("front"))
        complete = self._map is not None and (self.config.lane == "local" or self._map.is_complete())
        all_live = all(m.state == "ready" for m in self._members.values())
        state = "ready" if all_live else "degraded" if has_front and complete else "failed"
        if state != self._state:
            dead = [m.spec.actor_id for m in self._members.values() if m.state == "dead"]
            self._enter(state, "ready" if all_live else f"lost {', '.join(dead)}")
            self._error = f"lost {', '.join(dead)}" if state == "failed" else None

    # -- what others ask -----------------------------------------------------------------------------------------

    def state(self) -> ClusterState:
        members = self._members.values()
        return ClusterState(
            state=self._state,  # type: ignore[arg-type]
            phase=self._phase,
            namespace=self.namespace,
            map_version=self._map.version if self._map else 0,
            fronts=tuple(m.spec.actor_id for m in self._of_kind("front") if m.state == "ready"),
            actors=tuple(self._info(m) for m in members),
            progress=LoadProgress(sum(m.progress.loaded for m in members), sum(m.progress.total for m in members)),
            error=self._error,
            started=self.started,
            kv_cache_tokens=sum(m.ready.kv_cache_tokens for m in members if m.ready),
            max_model_len=self._blueprint.max_model_len if self._blueprint else 0,
        )

    def _info(self, member: _Member) -> ActorInfo:
        ready, report = member.ready, member.report
        return ActorInfo(
            id=member.spec.actor_id,
            kind=member.kind,
            group=member.group,
            node=ready.node if ready else "",
            pid=ready.pid if ready else 0,
            gpu=ready.gpu if ready else "",
            state=member.state,
            lane=self._lane(),
            map_version=report.map_version if report and member.kind == "front" else self._version(),
            tokens=report.tokens if report else 0,
            since=member.since,
            detail=member.detail,
            weight_bytes=ready.weight_bytes if ready else 0,
        )

    def _lane(self) -> str:
        """What fronts say they use; the configured lane before any has said so."""
        return next((m.report.lane for m in self._of_kind("front") if m.report), self.config.lane)

    def _version(self) -> int:
        return self._map.version if self._map else 0

    async def experts(self) -> dict[str, Any]:
        """The answer of GET /v1/experts."""
        if self._map is None or self._load is None:
            return {}
        await self._collect()
        return {
            "layers": len(self._map.homes),
            "experts": len(self._map.homes[0]),
            "counts": self._load.counts,
            "balancedness": self._load.balancedness(self._map),
            "map_version": self._map.version,
            "placement": self._map.homes,
        }

    async def exposition(self, ingress_id: str, samples: tuple[Sample, ...]) -> bytes:
        """Prometheus text over all processes; the asking ingress brings its own newest samples."""
        self._ingress_samples[ingress_id] = samples
        await self._collect()
        self._publish_gauges()
        live = [m.report.samples for m in self._members.values() if m.report]
        return exposition(merge([self._gone, self.metrics.samples(), *live, *self._ingress_samples.values()]))

    def push_samples(self, ingress_id: str, samples: tuple[Sample, ...]) -> ClusterState:
        """An ingress reports its metrics and learns the state of the cluster in one call."""
        self._ingress_samples[ingress_id] = samples
        return self.state()

    def _publish_gauges(self) -> None:
        if self._map and self._load:
            self.metrics.set("expert_map_version", self._map.version)
            self.metrics.set("expert_balancedness", self._load.balancedness(self._map))
        for group in range(self.config.groups):
            members = [m for m in self._of_kind("expert") if m.group == group]
            for state in ("starting", "loading", "ready", "draining", "dead"):
                number = sum(m.state == state for m in members)
                self.metrics.set("expert_replicas", number, group=str(group), state=state)

    def _of_kind(self, kind: ActorKind) -> list[_Member]:
        return [m for m in self._members.values() if m.kind == kind]


def _machine() -> Machine:
    total = ray.cluster_resources()
    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=1.0)
    return Machine(total.get("CPU", 1.0), total.get("GPU", 0.0), max(1.0, largest))


def _new_keys() -> LaneKeys:
    return LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())


def _end_leftover(name: str, namespace: str) -> None:
    """A predecessor that crashed may have left an actor of this name behind."""
    try:
        ray.kill(ray.get_actor(name, namespace), no_restart=True)
    except ValueError:
        return


def _cause(error: RayError) -> Exception:
    """The actor's own exception, if it is one that we raise for people."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ConfigError | ModelError) else error


async def _await(ref: Any) -> Any:
    return await ref
