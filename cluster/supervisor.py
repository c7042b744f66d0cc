"""The supervisor: brings the cluster up, replaces what dies, scales and rebalances, and reports.

It runs inside a Serve replica of the application (deploy/app.py), on that replica's event loop. It decides; the fleet
acts (cluster/fleet.py). A crash of the supervisor leaves the actors alive and its successor keeps them; stop() ends
them.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import zmq
from ray.exceptions import RayError

from cluster import ray_actors
from cluster.blueprint import Blueprint, draw_blueprint
from cluster.checkpoint import check_checkpoint, resolve_model
from cluster.config import ClusterConfig, ConfigError
from cluster.fleet import Fleet
from cluster.load import ExpertLoad
from cluster.members import Member
from cluster.messages import ClusterState, LaneKeys, LoadProgress, RebalanceReport, Sample, Wanted
from cluster.metrics import Metrics
from cluster.model_config import ModelError, read_model_config
from cluster.ray_actors import answer, first_line
from cluster.rebalancing import Rebalancer
from cluster.reports import Reports
from cluster.signals import Autoscaler

logger = logging.getLogger(__name__)

PROGRESS_PERIOD_S = 0.25
WATCH_PERIOD_S = 0.5
# Before the end of the application, requests that are still running get this long.
FINISH_S = 20.0


class Supervisor:
    def __init__(self, config: ClusterConfig, namespace: str) -> None:
        self.config = config
        self.namespace = namespace
        self.metrics = Metrics()
        self.reports = Reports(self.metrics)
        self.started = time.time()
        self._state: str = "starting"
        self._phase = "checking the checkpoint"
        self._error: str | None = None
        self._fleet: Fleet | None = None
        self._load: ExpertLoad | None = None
        self._autoscaler = Autoscaler(config)
        self._rebalancer: Rebalancer | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the cluster up in the background; state() tells how far it is."""
        if ray_actors.named_actors(self.namespace):
            # Requests go on with the fronts that ingresses know: nothing "starts".
            self._enter("recovering", "looking for actors of a predecessor")
        self._spawn(self._bring_up())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self) -> None:
        """Wait, not too long, until the fronts have answered what they have accepted."""
        deadline = time.monotonic() + FINISH_S
        while self._fleet and time.monotonic() < deadline:
            await self._fleet.collect()
            if not any(m.report and m.report.num_requests for m in self._fleet.of_kind("front", "ready")):
                return
            await asyncio.sleep(WATCH_PERIOD_S)

    async def stop(self) -> None:
        """End every actor that was started. Safe to call twice."""
        self._enter("stopping", "stopping")
        for task in tuple(self._tasks):
            if task is not asyncio.current_task():  # bring-up stops what it has started when it fails
                task.cancel()
        if self._fleet:
            await self._fleet.close_lanes(self._fleet.of_kind("expert", "ready"))
            for member in self._fleet.members:
                self._fleet.kill(member)
                member.enter("dead", "stopped")

    async def _bring_up(self) -> None:
        try:
            async with asyncio.timeout(self.config.load_timeout_s):
                fleet = self._fleet = Fleet(await self._draw_blueprint(), self.namespace, self.metrics)
                await fleet.adopt()
                if any(member.handle for member in fleet.members):
                    await self._take_over(fleet)
                else:
                    await self._start_all(fleet)
        except Exception as error:
            await self._fail(error)
            return
        self._judge(fleet)
        self._spawn(self._watch(fleet))

    async def _fail(self, error: Exception) -> None:
        told = isinstance(error, ConfigError | ModelError)
        self._error = str(error) if told else f"{type(error).__name__}: {error}"
        if isinstance(error, TimeoutError) and self._fleet:
            waiting = [m.spec.actor_id for m in self._fleet.members if m.state != "ready"]
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
        self._load = ExpertLoad(model.num_hidden_layers, model.num_local_experts, self.config.load_window_s)
        self._rebalancer = Rebalancer(self.config, self._load)
        return draw_blueprint(self.config, info, model_dir, model, ray_actors.machine(), keys)

    async def _take_over(self, fleet: Fleet) -> None:
        """Go on with what lives; the watch brings back what has died meanwhile."""
        for member in fleet.members:
            if member.handle is None:
                member.bury("lost while nobody watched")
        await fleet.publish()
        await self._collect(fleet)

    async def _start_all(self, fleet: Fleet) -> None:
        self._enter("starting", "loading weights")
        progress = asyncio.create_task(self._follow_progress(fleet))
        try:
            await asyncio.gather(*(fleet.load(m) for m in fleet.members))
        finally:
            progress.cancel()
        for member in fleet.of_kind("expert"):  # all at once: the first map is complete
            assert member.ready is not None
            member.become_ready(member.ready)
        await fleet.publish()
        self._enter("starting", "warming up")
        await asyncio.gather(*(fleet.join(m) for m in fleet.of_kind("front")))
        await self._collect(fleet)

    async def _follow_progress(self, fleet: Fleet) -> None:
        while True:
            await asyncio.gather(*(self._ask_progress(m) for m in fleet.members if m.handle and m.ready is None))
            await asyncio.sleep(PROGRESS_PERIOD_S)

    async def _ask_progress(self, member: Member) -> None:
        try:
            progress = await answer(member.handle.progress.remote(), 1.0)
        except (TimeoutError, RayError):
            return  # still starting; a real failure surfaces in load()
        if member.ready is None:
            member.progress = progress

    # -- watching and healing ------------------------------------------------------------------------------------

    async def _watch(self, fleet: Fleet) -> None:
        """Read every member's report; the dead leave the map at once and are replaced after a pause."""
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            try:
                await self._collect(fleet)
                await fleet.publish()
                for member in fleet.members:
                    if member.is_due:
                        member.renew()
                        member.work = self._spawn(self._start(fleet, member))
                self._autoscale(fleet)
                if self._rebalancer and self._rebalancer.is_due():
                    self._spawn(self._rebalance_unasked())
                self._judge(fleet)
            except Exception:
                logger.exception("watching goes on after an unexpected error")

    async def _start(self, fleet: Fleet, member: Member) -> None:
        """Bring one member up, at any time; if that fails, it is tried again after a pause."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.config.load_timeout_s):
                await fleet.load(member)
                await fleet.join(member)
        except Exception as error:
            fleet.kill(member)
            fleet.bury(member, first_line(error))
            return
        logger.info("%s is ready, %.1f s after its start", member.spec.actor_id, time.monotonic() - started)

    async def _collect(self, fleet: Fleet) -> None:
        await fleet.collect()
        if self._load:
            fronts = {m.spec.actor_id: m.report.expert_counts for m in fleet.of_kind("front") if m.report}
            self._load.update(fronts, time.monotonic())

    def _judge(self, fleet: Fleet) -> None:
        """Fronts can compute without replicas, but nothing without a front."""
        lost = [m.spec.actor_id for m in fleet.members if m.is_lost]
        if not lost:
            self._enter("ready", "ready")
        else:
            has_front = bool(fleet.of_kind("front", "ready"))
            self._enter("degraded" if has_front else "recovering", f"restarting {', '.join(lost)}")

    # -- scaling -------------------------------------------------------------------------------------------------

    async def scale(self, fronts: int | None = None, group: int | None = None, replicas: int | None = None) -> Wanted:
        """Change how many fronts there are, and how many replicas of one group, or of all. Returns at once: new ones
        load first and then enter the map; leaving ones leave the map first and then drain. Limits are the caller's
        business. Raises RuntimeError while the cluster is not up.
        """
        fleet = self._running()
        wanted = fleet.wanted
        if fronts is not None:
            wanted = replace(wanted, fronts=fronts)
        if replicas is not None:
            groups = range(len(wanted.replicas)) if group is None else (group,)
            counts = tuple(replicas if g in groups else n for g, n in enumerate(wanted.replicas))
            wanted = replace(wanted, replicas=counts)
        self._set_wanted(fleet, wanted)
        return wanted

    def _running(self) -> Fleet:
        if self._fleet is None or self._state not in ("ready", "degraded", "recovering"):
            raise RuntimeError(f"the cluster is {self._state}: {self._phase}")
        return self._fleet

    def _set_wanted(self, fleet: Fleet, wanted: Wanted) -> None:
        if wanted == fleet.wanted:
            return
        logger.info(
            "scaling: fronts %d -> %d, replicas %s -> %s",
            fleet.wanted.fronts,
            wanted.fronts,
            fleet.wanted.replicas,
            wanted.replicas,
        )
        added, surplus = fleet.set_wanted(wanted)
        for member in added:
            member.work = self._spawn(self._start(fleet, member))
        for member in surplus:
            if member.work:
                member.work.cancel()
            member.work = self._spawn(fleet.retire(member, self.config.drain_timeout_s))
        self._spawn(fleet.tell_fronts())  # a successor of this supervisor learns it from them

    def _autoscale(self, fleet: Fleet) -> None:
        if self.config.autoscale:
            self._set_wanted(fleet, self._autoscaler.decide(fleet, time.monotonic()))

    # -- rebalancing ---------------------------------------------------------------------------------------------

    async def rebalance(self, dry_run: bool = False, force: bool = False) -> RebalanceReport:
        """See Rebalancer.rebalance. Raises RuntimeError while the cluster is not up."""
        fleet = self._running()
        await self._collect(fleet)
        assert self._rebalancer is not None
        return await self._rebalancer.rebalance(fleet, dry_run, force)

    async def _rebalance_unasked(self) -> None:
        report = await self.rebalance()
        if report.reason or report.error:
            logger.info("no rebalance: %s", report.error or report.reason)

    # -- what others ask -----------------------------------------------------------------------------------------

    def state(self) -> ClusterState:
        fleet = self._fleet
        if fleet is None:
            return ClusterState(self._state, self._phase, self.namespace, error=self._error, started=self.started)  # type: ignore[arg-type]
        lane = next((m.report.lane for m in fleet.of_kind("front") if m.report), self.config.lane)
        version = fleet.expert_map.version
        return ClusterState(
            state=self._state,  # type: ignore[arg-type]
            phase=self._phase,
            namespace=self.namespace,
            map_version=version,
            fronts=tuple(m.spec.actor_id for m in fleet.of_kind("front", "ready")),
            draining=tuple(m.spec.actor_id for m in fleet.of_kind("front", "draining")),
            actors=tuple(member.info(lane, version) for member in fleet.members),
            progress=LoadProgress(
                sum(m.progress.loaded for m in fleet.members), sum(m.progress.total for m in fleet.members)
            ),
            error=self._error,
            started=self.started,
            kv_cache_tokens=sum(m.ready.kv_cache_tokens for m in fleet.members if m.ready),
            max_model_len=fleet.blueprint.engine.max_model_len,
            wanted=fleet.wanted,
        )

    async def experts(self) -> dict[str, Any]:
        """The answer of GET /v1/experts."""
        if self._fleet is None or self._load is None:
            return {}
        await self._collect(self._fleet)
        expert_map = self._fleet.expert_map
        return {
            "layers": len(expert_map.homes),
            "experts": len(expert_map.homes[0]),
            "counts": self._load.counts,
            "recent_counts": self._load.recent,
            "window_seconds": self.config.load_window_s,
            "balancedness": self._load.balancedness(expert_map),
            "map_version": expert_map.version,
            "placement": expert_map.homes,
        }

    async def exposition(self, ingress_id: str, samples: tuple[Sample, ...]) -> bytes:
        """Prometheus text over all processes; the asking ingress brings its own newest samples."""
        self.reports.ingress[ingress_id] = samples
        if self._fleet:
            await self._collect(self._fleet)
        return self.reports.exposition(self._fleet, self._load)

    def push_samples(self, ingress_id: str, samples: tuple[Sample, ...]) -> ClusterState:
        """An ingress reports its metrics and learns the state of the cluster in one call."""
        self.reports.ingress[ingress_id] = samples
        return self.state()


def _new_keys() -> LaneKeys:
    return LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())
