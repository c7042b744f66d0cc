"""The supervisor: brings the cluster up, replaces what dies, scales and rebalances, and reports.

It runs inside a Serve replica of the application (deploy/app.py), on that replica's event loop. It decides; the fleet
acts (cluster/control/fleet.py). A crash of the supervisor leaves the actors alive and its successor keeps them
(cluster/control/takeover.py); stop() ends them.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import zmq

from cluster.config import ClusterConfig
from cluster.control import ray_actors, takeover
from cluster.control.autoscaler import Autoscaler
from cluster.control.bring_up import start_all
from cluster.control.exposition import Reports, describe
from cluster.control.fleet import HUNG_S, Fleet
from cluster.control.members import Member
from cluster.control.ray_actors import first_line
from cluster.control.rebalancing import Rebalancer
from cluster.errors import ConfigError, ModelError, NotRunning
from cluster.messages.actors import FrontSpec, LaneKeys, ReplicaSpec, Sample, Wanted
from cluster.messages.state import ClusterState, RebalanceReport
from cluster.metrics import Metrics
from cluster.models.checkpoint import Checkpoint
from cluster.models.hub import local_copy, resolve_model
from cluster.policy.blueprint import Blueprint, draw_blueprint
from cluster.policy.expert_load import ExpertLoad

logger = logging.getLogger(__name__)
T = TypeVar("T")

WATCH_PERIOD_S = 0.5
# Before the end of the application, requests that are still running get this long.
FINISH_S = 20.0
# Pause before the next attempt to take over; it doubles.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class Supervisor:
    def __init__(self, config: ClusterConfig, namespace: str) -> None:
        self.config = config
        self.namespace = namespace
        self.metrics = Metrics()
        self.reports = Reports(self.metrics)
        self.started = time.time()
        # Requests go on with the fronts that ingresses know, until it is clear that there are none.
        self._state: str = "recovering"
        self._phase = "looking for actors of a predecessor"
        self._error: str | None = None
        self._fleet: Fleet | None = None
        self._load: ExpertLoad | None = None
        self._autoscaler = Autoscaler(config)
        self._rebalancer: Rebalancer | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._collecting: asyncio.Task[None] | None = None
        self._context = contextvars.copy_context()

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the cluster up in the background; state() tells how far it is."""
        self._spawn(self._bring_up())

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """In a context of the supervisor's own: with a request, Ray cancels the calls that were made on its behalf."""
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("%s ended with an unexpected error", task.get_name(), exc_info=error)

    async def finish(self) -> None:
        """Wait, not too long, until the fronts have answered what they have accepted."""
        deadline = time.monotonic() + FINISH_S
        while self._fleet and time.monotonic() < deadline:
            await self._collect(self._fleet)
            if not any(m.report and m.report.num_requests for m in self._fleet.listening()):
                return
            await asyncio.sleep(WATCH_PERIOD_S)

    async def stop(self) -> None:
        """End every actor that was started. Safe to call twice."""
        self._enter("stopping", "stopping")
        for task in tuple(self._tasks):
            if task is not asyncio.current_task():  # bring-up stops what it has started when it fails
                task.cancel()
        if self._fleet:
            await self._fleet.end_all()
        for handle in ray_actors.named_actors(self.namespace).values():  # of a predecessor, not yet taken over
            ray_actors.end(handle)

    async def _bring_up(self) -> None:
        if await self._take_over():
            return
        self._enter("starting", "checking the checkpoint")
        try:
            async with asyncio.timeout(self.config.load_timeout_s):
                fleet = Fleet(await self._draw_blueprint(), self.namespace, self.metrics)
                self._use(fleet)
                await start_all(fleet, lambda phase: self._enter("starting", phase))
                await self._collect(fleet)
        except Exception as error:
            await self._fail(error)
            return
        await self._judge(fleet)
        self._spawn(self._watch(fleet))

    def _use(self, fleet: Fleet) -> None:
        homes = fleet.expert_map.homes
        self._fleet, self._collecting = fleet, None
        self._load = ExpertLoad(len(homes), len(homes[0]), self.config.load_window_s)
        self._rebalancer = Rebalancer(self.config, self._load)

    async def _fail(self, error: Exception) -> None:
        self._error = _told(error)
        if isinstance(error, TimeoutError) and self._fleet:
            waiting = [m.spec.actor_id for m in self._fleet.members if m.state != "ready"]
            self._error = f"not ready after load_timeout_s={self.config.load_timeout_s:g}: {', '.join(waiting)}"
        logger.error("bring-up failed: %s", self._error, exc_info=None if _is_told(error) else error)
        await self.stop()
        self._enter("failed", "failed")

    def _enter(self, state: str, phase: str) -> None:
        if (state, phase) != (self._state, self._phase):
            logger.info("cluster %s: %s: %s", self.namespace, state, phase)
        self._state, self._phase = state, phase

    # -- taking over ---------------------------------------------------------------------------------------------

    async def _take_over(self) -> bool:
        """Keep the actors of a predecessor; False if there are none that could serve. Whatever goes wrong is tried
        again: what lives serves on meanwhile.
        """
        pause, silent_until = FIRST_PAUSE_S, time.monotonic() + HUNG_S
        while True:
            try:
                return await self._adopt_and_check(silent_until)
            except Exception as error:
                self._error = _told(error)
                logger.error("takeover failed: %s", self._error, exc_info=None if _is_told(error) else error)
            self._enter("recovering", f"{self._error}; next attempt in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _adopt_and_check(self, silent_until: float) -> bool:
        if self._fleet is None:
            found = await takeover.find(self.namespace)
            if not any(actor.is_of_use for actor in found):
                takeover.end(found)
                return False
            known = takeover.newest(found)
            blueprint = takeover.recall(known)
            if blueprint is None:
                if any(actor.is_silent for actor in found) and time.monotonic() < silent_until:
                    raise TimeoutError("the predecessor's actors don't answer yet")
                blueprint = await self._draw_blueprint(known.spec if known else None)
            self._adopt(Fleet(blueprint, self.namespace, self.metrics, is_checked=False), found)
        fleet = self._fleet
        assert fleet is not None
        blueprint = await self._draw_blueprint(fleet.blueprint.front(0))
        self._error = None
        if not takeover.check(fleet, blueprint):
            await self._let_go(fleet)
            return False
        for member in self._fill(fleet, fleet.wanted):
            member.bury("lost while nobody watched")
        return True

    def _adopt(self, fleet: Fleet, found: list[takeover.Found]) -> None:
        leaving = takeover.adopt(fleet, found)
        self._use(fleet)
        for member in fleet.members:
            if member in leaving:
                self._retire(fleet, member)
            elif member.state != "ready":
                member.work = self._spawn(self._settle(fleet, member))
        self._spawn(self._watch(fleet))

    async def _settle(self, fleet: Fleet, member: Member) -> None:
        is_leaving = await takeover.settle(fleet, member)
        if member.work is asyncio.current_task():  # else its successor is being started
            member.work = None
        if is_leaving:
            self._retire(fleet, member)

    async def _let_go(self, fleet: Fleet) -> None:
        logger.warning("no actor of the predecessor fits the configuration")
        self._fleet = None
        for member in fleet.members:
            if member.work:
                member.work.cancel()
        await fleet.end_all()

    # -- bring-up ------------------------------------------------------------------------------------------------

    async def _draw_blueprint(self, known: FrontSpec | ReplicaSpec | None = None) -> Blueprint:
        """`known` is of an actor that a predecessor has left and that is kept: others are to fit it, whatever has
        become of the cluster, or of the model on the Hub, since.
        """
        machine = known.resources.machine if known else ray_actors.machine()
        keys = known.lane_keys if known else None
        model_dir = await asyncio.to_thread(resolve_model, self.config.model, known.model_path if known else "")
        here = await asyncio.to_thread(local_copy, str(model_dir))
        checkpoint = await asyncio.to_thread(Checkpoint.open, here)
        if keys is None and self.config.lane in ("auto", "zmq"):
            keys = _new_keys()
        return draw_blueprint(self.config, checkpoint, str(model_dir), machine, keys)

    # -- watching and healing ------------------------------------------------------------------------------------

    async def _watch(self, fleet: Fleet) -> None:
        """Read every member's report; the dead leave the map at once and are replaced after a pause.

        Each part on its own: an error in one must not keep the others from their work.
        """
        parts = (self._collect, self._publish, self._heal, self._autoscale, self._rebalance_if_due, self._judge)
        while self._fleet is fleet:
            for part in parts:
                try:
                    await part(fleet)
                except Exception:
                    logger.exception("watching goes on after an unexpected error")
            await asyncio.sleep(WATCH_PERIOD_S)

    async def _publish(self, fleet: Fleet) -> None:
        """Waits for no front: one that hangs must not hold up the others."""
        late = fleet.late_fronts()
        if fleet.renew_map():
            self._spawn(fleet.tell_fronts())
            return
        for front in late:
            self._spawn(fleet.tell(front))

    async def _heal(self, fleet: Fleet) -> None:
        """Start successors of the dead, and see that there are as many as there should be: a member may have died while
        it left, or one that was silent is one too many now that it is known.
        """
        if not fleet.is_checked:
            return
        self._apply(fleet, fleet.wanted)
        for member in fleet.members:
            if member.is_due:
                member.renew()
                member.work = self._spawn(self._start(fleet, member))

    async def _start(self, fleet: Fleet, member: Member) -> None:
        """Bring one member up, at any time; if that fails, it is tried again after a pause."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.config.load_timeout_s):
                await fleet.load(member)
                await fleet.join(member)
        except Exception as error:
            fleet.replace(member, first_line(error))
            return
        logger.info("%s is ready, %.1f s after its start", member.spec.actor_id, time.monotonic() - started)

    async def _collect(self, fleet: Fleet) -> None:
        """Learn how everyone is. Who asks while somebody does waits for the same reports: however many ask, every
        member is asked once at a time.
        """
        if self._collecting is None or self._collecting.done():
            self._collecting = self._spawn(self._collect_now(fleet))
        collecting = self._collecting
        await asyncio.wait([collecting])  # who leaves does not break it off
        if not collecting.cancelled():  # as it is when the supervisor stops
            collecting.result()

    async def _collect_now(self, fleet: Fleet) -> None:
        await fleet.collect()
        fleet.keep(self.reports.take_gone())
        if self._load:
            fronts = {m.spec.actor_id: m.report.expert_counts for m in fleet.of_kind("front") if m.report}
            self._load.update(fronts, time.monotonic())

    async def _judge(self, fleet: Fleet) -> None:
        """Fronts can compute without replicas, but nothing without a front."""
        if not fleet.is_checked:
            return  # the takeover goes on, and says so
        lost = [m.spec.actor_id for m in fleet.members if m.is_lost]
        silent = [m.spec.actor_id for m in fleet.members if m.is_unknown]
        if not lost and not silent:
            self._enter("ready", "ready")
            return
        doing = [f"{what} {', '.join(ids)}" for what, ids in (("restarting", lost), ("waiting for", silent)) if ids]
        has_front = bool(fleet.of_kind("front", "ready"))
        self._enter("degraded" if has_front else "recovering", "; ".join(doing))

    # -- scaling -------------------------------------------------------------------------------------------------

    async def scale(self, fronts: int | None = None, group: int | None = None, replicas: int | None = None) -> Wanted:
        """Change how many fronts there are, and how many replicas of one group, or of all. Returns at once: new ones
        load first and then enter the map; leaving ones leave the map first and then drain. Limits are the caller's
        business. Raises NotRunning while the cluster is not up.
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
        fleet = self._fleet
        if fleet is None or not fleet.is_checked or self._state not in ("ready", "degraded", "recovering"):
            raise NotRunning(f"the cluster is {self._state}: {self._phase}")
        return fleet

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
        self._apply(fleet, wanted)
        self._spawn(fleet.tell_fronts())  # a successor of this supervisor learns it from them

    def _apply(self, fleet: Fleet, wanted: Wanted) -> None:
        for member in self._fill(fleet, wanted):
            member.work = self._spawn(self._start(fleet, member))

    def _fill(self, fleet: Fleet, wanted: Wanted) -> list[Member]:
        """Retire those that are too many; returns new members, not yet started."""
        added, surplus = fleet.set_wanted(wanted)
        for member in surplus:
            self._retire(fleet, member)
        return added

    def _retire(self, fleet: Fleet, member: Member) -> None:
        if member.work:
            member.work.cancel()
        if member.handle is None:  # dead, or not started yet
            fleet.discard(member)
            return
        is_serving = member.state == "ready"
        member.enter("draining", "leaving")  # at once: who counts members next must not count on it
        member.work = self._spawn(fleet.retire(member, self.config.drain_timeout_s, is_serving))

    async def _autoscale(self, fleet: Fleet) -> None:
        if self.config.autoscale and fleet.is_checked:
            self._set_wanted(fleet, self._autoscaler.decide(fleet, time.monotonic()))

    # -- rebalancing ---------------------------------------------------------------------------------------------

    async def rebalance(self, dry_run: bool = False, force: bool = False) -> RebalanceReport:
        """See Rebalancer.rebalance. A caller that leaves does not break it off: it ends in a map that holds.

        Raises NotRunning while the cluster is not up.
        """
        return await asyncio.shield(self._spawn(self._rebalance(self._running(), dry_run, force)))

    async def _rebalance(self, fleet: Fleet, dry_run: bool, force: bool) -> RebalanceReport:
        await self._collect(fleet)
        assert self._rebalancer is not None
        return await self._rebalancer.rebalance(fleet, dry_run, force)

    async def _rebalance_if_due(self, fleet: Fleet) -> None:
        if fleet.is_checked and self._rebalancer and self._rebalancer.is_due():
            self._spawn(self._rebalance_unasked())

    async def _rebalance_unasked(self) -> None:
        report = await self.rebalance()
        if report.reason or report.error:
            logger.info("no rebalance: %s", report.error or report.reason)

    # -- what others ask -----------------------------------------------------------------------------------------

    def state(self) -> ClusterState:
        state = ClusterState(self._state, self._phase, self.namespace, error=self._error, started=self.started)  # type: ignore[arg-type]
        return describe(state, self._fleet, self.config.lane) if self._fleet else state

    async def experts(self) -> dict[str, Any]:
        """The answer of GET /v1/experts."""
        if self._fleet is None or self._load is None:
            return {}
        await self._collect(self._fleet)
        return self._load.describe(self._fleet.expert_map)

    async def exposition(self, ingress_id: str, samples: tuple[Sample, ...]) -> bytes:
        """Prometheus text over all processes; the asking ingress brings its own newest samples.

        Raises NotRunning while a takeover does not know yet what some actor has counted: a gap does no harm, but a
        counter that falls and comes back looks like so many new events.
        """
        self.reports.hear(ingress_id, samples)
        if self._fleet:
            await self._collect(self._fleet)
        unknown = [m.spec.actor_id for m in self._fleet.members if m.is_unknown] if self._fleet else []
        if unknown or (self._fleet is None and self._state == "recovering"):
            raise NotRunning(f"the cluster is {self._state}: {self._phase}")
        return self.reports.exposition(self._fleet, self._load)

    def push_samples(self, ingress_id: str, samples: tuple[Sample, ...]) -> ClusterState:
        """An ingress reports its metrics and learns the state of the cluster in one call."""
        self.reports.hear(ingress_id, samples)
        return self.state()


def _is_told(error: Exception) -> bool:
    """Whether its text is written for people."""
    return isinstance(error, ConfigError | ModelError)


def _told(error: Exception) -> str:
    return str(error) if _is_told(error) else f"{type(error).__name__}: {error}"


def _new_keys() -> LaneKeys:
    return LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())
