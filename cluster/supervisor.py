"""The supervisor: starts fronts and expert replicas, restarts the dead, publishes the expert map, reports.

It runs inside a Serve replica of the application (deploy/app.py), on that replica's event loop. The only module of
`cluster` that knows Ray. Actors are detached and named in the application's namespace: a crash of the supervisor leaves
them alive and its successor keeps them; stop() ends them.
"""

import asyncio
import importlib
import logging
import time
from typing import Any, get_args

import ray
import zmq
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from cluster.blueprint import Blueprint, draw_blueprint
from cluster.checkpoint import check_checkpoint, resolve_model
from cluster.config import ClusterConfig, ConfigError
from cluster.expert_map import ExpertMap, ReplicaAddress
from cluster.load import ExpertLoad
from cluster.members import Member
from cluster.messages import ActorKind, ActorState, ClusterState, LaneKeys, LoadProgress, Sample
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
WATCH_PERIOD_S = 0.5
REPORT_TIMEOUT_S = 2.0
STOP_S = 3.0


class Supervisor:
    def __init__(self, config: ClusterConfig, namespace: str) -> None:
        self.config = config
        self.namespace = namespace
        self.metrics = Metrics()
        self.started = time.time()
        self._state: str = "starting"
        self._phase = "checking the checkpoint"
        self._error: str | None = None
        self._members: list[Member] = []
        self._map: ExpertMap | None = None
        self._blueprint: Blueprint | None = None
        self._load: ExpertLoad | None = None
        self._ingress_samples: dict[str, tuple[Sample, ...]] = {}
        self._gone: tuple[Sample, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the cluster up in the background; state() tells how far it is."""
        self._spawn(self._bring_up())

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End every actor that was started. Safe to call twice."""
        self._enter("stopping", "stopping")
        for task in tuple(self._tasks):
            if task is not asyncio.current_task():  # bring-up stops what it has started when it fails
                task.cancel()
        await self._close_lanes()
        for member in self._members:
            if member.handle is not None:
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
                self._members = self._make_members(blueprint)
                await self._adopt()
                await self._start_all()
        except Exception as error:
            await self._fail(error)
            return
        self._enter("ready", "ready")
        self._spawn(self._watch())

    async def _fail(self, error: Exception) -> None:
        told = isinstance(error, ConfigError | ModelError)
        self._error = str(error) if told else f"{type(error).__name__}: {error}"
        if isinstance(error, TimeoutError):
            waiting = [m.spec.actor_id for m in self._members if m.state != "ready"]
            self._error = f"not ready after load_timeout_s={self.config.load_timeout_s:g}: {', '.join(waiting)}"
        logger.error("bring-up failed: %s", self._error, exc_info=None if told else error)
        await self.stop()
        self._enter("failed", "failed")

    def _enter(self, state: str, phase: str) -> None:
        if (state, phase) != (self._state, self._phase):
            logger.info("cluster %s: %s: %s", self.namespace, state, phase)
        self._state, self._phase = state, phase

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

    def _make_members(self, blueprint: Blueprint) -> list[Member]:
        experts = [Member(spec, "expert") for spec in blueprint.replicas]
        return experts + [Member(spec, "front") for spec in blueprint.fronts]

    async def _adopt(self) -> None:
        """Keep the live actors that a supervisor before this one has left; end those that no slot wants."""
        self._enter("starting", "looking for actors of a predecessor")
        by_slot = {member.slot: member for member in self._members}
        for name in _named_actors(self.namespace):
            member = by_slot.get(name.partition(".")[0])
            handle = ray.get_actor(name, self.namespace)
            if member is None or member.handle is not None or not await self._adopt_one(member, handle):
                ray.kill(handle, no_restart=True)

    async def _adopt_one(self, member: Member, handle: Any) -> bool:
        try:
            found = await asyncio.wait_for(_await(handle.identity.remote()), REPORT_TIMEOUT_S)
        except (TimeoutError, RayError):
            return False
        if found is None or not found.spec.fits(member.spec):
            return False
        member.spec, member.handle = found.spec, handle
        member.num_restarts = int(found.spec.actor_id.partition(".")[2] or 0)
        member.become_ready(found.ready)
        if found.expert_map and self._map and found.expert_map.version > self._map.version:
            self._map = found.expert_map
        logger.info("%s of a predecessor is kept", member.spec.actor_id)
        return True

    async def _start_all(self) -> None:
        missing = [m for m in self._members if m.handle is None]
        keys = next((m.spec.lane_keys for m in self._members if m.handle is not None), None)
        self._enter("starting", "starting actors")
        for member in missing:
            if keys:  # all speak with the keys of those that were kept
                member.share_keys(keys)
            self._create(member)
        self._enter("starting", "loading weights")
        progress = asyncio.create_task(self._follow_progress())
        try:
            await asyncio.gather(*(self._load_member(m) for m in missing))
        finally:
            progress.cancel()
        await self._publish()
        self._enter("starting", "warming up")
        await asyncio.gather(*(self._start_front(m) for m in missing if m.kind == "front"))
        await self._collect()

    def _create(self, member: Member) -> None:
        assert self._blueprint is not None
        resources = self._blueprint.resources
        module, _, name = ENTRYPOINTS[member.kind].partition(":")
        actor_class = ray.remote(**CONCURRENCY[member.kind])(getattr(importlib.import_module(module), name))
        is_front = member.kind == "front"
        options = actor_class.options(
            name=member.spec.actor_id,
            namespace=self.namespace,
            lifetime="detached",
            num_cpus=resources.cpus_per_front if is_front else resources.cpus_per_replica,
            num_gpus=resources.gpus_per_front if is_front else resources.gpus_per_replica,
            resources=dict(resources.front_resources if is_front else resources.replica_resources),
            max_restarts=0,
            max_task_retries=0,
        )
        member.handle = options.remote(member.spec, self.namespace) if is_front else options.remote(member.spec)

    async def _load_member(self, member: Member) -> None:
        """Raises the actor's own ConfigError or ModelError, or a RayError."""
        started = time.time()
        member.enter("loading", member.detail)
        try:
            ready = await member.handle.load.remote()
        except RayError as error:
            raise _cause(error) from None
        member.ready = ready
        if member.kind == "expert":
            self.metrics.observe("replica_start_seconds", time.time() - started)
            member.become_ready(ready)
        logger.info("%s has loaded %d bytes in %.1f s", ready.actor_id, ready.weight_bytes, ready.load_seconds)

    async def _start_front(self, member: Member) -> None:
        """A loaded front takes the map, tries itself out, and serves."""
        await member.handle.start.remote(self._map)
        assert member.ready is not None
        member.become_ready(member.ready)

    async def _follow_progress(self) -> None:
        while True:
            await asyncio.gather(*(self._ask_progress(m) for m in self._members if m.ready is None))
            await asyncio.sleep(PROGRESS_PERIOD_S)

    async def _ask_progress(self, member: Member) -> None:
        try:
            progress = await asyncio.wait_for(_await(member.handle.progress.remote()), 1.0)
        except (TimeoutError, RayError):
            return  # still starting; a real failure surfaces in load()
        if member.ready is None:
            member.progress = progress

    # -- expert map ----------------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        """If the live replicas are not those of the map: next version, to every front that serves."""
        assert self._map is not None
        live = tuple(
            ReplicaAddress(m.spec.actor_id, m.group or 0, (("object_ref", m.spec.actor_id), *m.ready.endpoints))
            for m in self._of_kind("expert")
            if m.state == "ready" and m.ready
        )
        if self._map.version and live == self._map.replicas:
            return
        old, self._map = self._map.version, self._map.with_replicas(live)
        self._map.check_integrity()
        logger.info("expert map version %d -> %d: %d replicas", old, self._map.version, len(live))
        serving = [m for m in self._of_kind("front") if m.state == "ready"]
        sending = (_await(m.handle.set_expert_map.remote(self._map)) for m in serving)
        await asyncio.gather(*sending, return_exceptions=True)

    # -- watching and healing ------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Read every member's report; the dead leave the map at once and are replaced after a pause."""
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            try:
                await self._collect()
                await self._publish()
                for member in self._members:
                    if member.is_due:
                        member.renew()
                        self._spawn(self._revive(member))
                self._judge()
            except Exception:
                logger.exception("watching goes on after an unexpected error")

    async def _revive(self, member: Member) -> None:
        try:
            async with asyncio.timeout(self.config.load_timeout_s):
                self._create(member)
                await self._load_member(member)
                if member.kind == "front":
                    await self._start_front(member)
        except Exception as error:
            if member.handle is not None:
                ray.kill(member.handle, no_restart=True)
            self._bury(member, _first_line(error))
            return
        logger.info("%s is back as %s", member.slot, member.spec.actor_id)
        await self._publish()

    async def _collect(self) -> None:
        members = [m for m in self._members if m.state in ("ready", "draining")]
        await asyncio.gather(*(self._ask(m) for m in members))
        if self._load:
            fronts = {m.spec.actor_id: m.report.expert_counts for m in self._of_kind("front") if m.report}
            self._load.update(fronts)

    async def _ask(self, member: Member) -> None:
        try:
            member.report = await asyncio.wait_for(_await(member.handle.report.remote()), REPORT_TIMEOUT_S)
            member.detail = ""
        except ActorUnavailableError:
            member.detail = "not reachable"
        except RayActorError as error:
            if member.state != "dead":
                self._bury(member, _first_line(error))
        except (TimeoutError, GetTimeoutError):
            member.detail = "slow to answer"

    def _bury(self, member: Member, why: str) -> None:
        if member.report:
            self._gone = merge((self._gone, cumulative(member.report.samples)))
        member.bury(why)
        self.metrics.inc("actor_restarts_total", kind=member.kind)
        logger.warning("%s is lost: %s", member.spec.actor_id, member.detail)

    def _judge(self) -> None:
        """Fronts can compute without replicas, but nothing without a front."""
        missing = [m.spec.actor_id for m in self._members if m.state != "ready"]
        if not missing:
            self._enter("ready", "ready")
        else:
            has_front = any(m.state == "ready" for m in self._of_kind("front"))
            self._enter("degraded" if has_front else "recovering", f"restarting {', '.join(missing)}")

    # -- what others ask -----------------------------------------------------------------------------------------

    def state(self) -> ClusterState:
        lane = next((m.report.lane for m in self._of_kind("front") if m.report), self.config.lane)
        version = self._map.version if self._map else 0
        return ClusterState(
            state=self._state,  # type: ignore[arg-type]
            phase=self._phase,
            namespace=self.namespace,
            map_version=version,
            fronts=tuple(m.spec.actor_id for m in self._of_kind("front") if m.state == "ready"),
            actors=tuple(member.info(lane, version) for member in self._members),
            progress=LoadProgress(
                sum(m.progress.loaded for m in self._members), sum(m.progress.total for m in self._members)
            ),
            error=self._error,
            started=self.started,
            kv_cache_tokens=sum(m.ready.kv_cache_tokens for m in self._members if m.ready),
            max_model_len=self._blueprint.max_model_len if self._blueprint else 0,
        )

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
        live = [m.report.samples for m in self._members if m.report]
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
            wanted = sum(m.state != "draining" for m in members)
            self.metrics.set("expert_replicas_wanted", wanted, group=str(group))
            for state in get_args(ActorState):
                number = sum(m.state == state for m in members)
                self.metrics.set("expert_replicas", number, group=str(group), state=state)
        for state in get_args(ActorState):
            self.metrics.set("fronts", sum(m.state == state for m in self._of_kind("front")), state=state)

    def _of_kind(self, kind: ActorKind) -> list[Member]:
        return [m for m in self._members if m.kind == kind]


def _machine() -> Machine:
    total = ray.cluster_resources()
    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=1.0)
    return Machine(total.get("CPU", 1.0), total.get("GPU", 0.0), max(1.0, largest))


def _named_actors(namespace: str) -> list[str]:
    listed = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in listed if actor["namespace"] == namespace)


def _new_keys() -> LaneKeys:
    return LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())


def _cause(error: RayError) -> Exception:
    """The actor's own exception, if it is one that we raise for people."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ConfigError | ModelError) else error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


async def _await(ref: Any) -> Any:
    return await ref
