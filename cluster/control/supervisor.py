"""The supervisor: takes over or brings up, then watches; answers what others ask of the cluster.

It runs inside a Serve replica of the application (deploy/app.py), on that replica's event loop. A crash of the
supervisor leaves the actors alive and its successor keeps them (cluster/control/takeover.py); stop() ends them.
"""

import asyncio
import logging
import time
from dataclasses import replace

from cluster.config import ClusterConfig
from cluster.control import takeover
from cluster.control.actors import Actors
from cluster.control.bring_up import start_all
from cluster.control.clock import now
from cluster.control.cluster_state import describe
from cluster.control.drawing import draw
from cluster.control.exposition import Exposition
from cluster.control.fleet import Fleet
from cluster.control.lives import end_all
from cluster.control.members import Member
from cluster.control.reports import HUNG_S
from cluster.control.tasks import Tasks
from cluster.control.watch import WATCH_PERIOD_S, Watch
from cluster.errors import ConfigError, ModelError, NotRunning
from cluster.messages.actors import FrontSpec, ReplicaSpec, Sample, Wanted
from cluster.messages.state import ClusterState, ExpertsReport, RebalanceReport, State
from cluster.metrics import Metrics
from cluster.policy.blueprint import Blueprint

logger = logging.getLogger(__name__)

# Before the end of the application, requests that are still running get this long.
FINISH_S = 20.0
# Pause before the next attempt to take over; it doubles.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class Supervisor:
    def __init__(self, config: ClusterConfig, actors: Actors) -> None:
        self.config = config
        self.actors = actors
        self.metrics = Metrics()
        self.started = time.time()
        # Requests go on with the fronts that ingresses know, until it is clear that there are none.
        self._state: State = "recovering"
        self._phase = "looking for actors of a predecessor"
        self._error: str | None = None
        self._tasks = Tasks()
        self._exposition = Exposition(self.metrics)
        self._watch: Watch | None = None

    def start(self) -> None:
        """Bring the cluster up in the background; state() tells how far it is."""
        self._tasks.spawn(self._bring_up())

    async def finish(self) -> None:
        """Wait, not too long, until the fronts have answered what they have accepted."""
        deadline = now() + FINISH_S
        while self._watch and now() < deadline:
            await self._watch.collect()
            if not any(m.report and m.report.num_requests for m in self._watch.fleet.listening()):
                return
            await asyncio.sleep(WATCH_PERIOD_S)

    async def stop(self) -> None:
        """End every actor that was started. Safe to call twice."""
        self._enter("stopping", "stopping")
        self._tasks.cancel_others()  # bring-up stops what it has started when it fails
        if self._watch:
            await end_all(self._watch.fleet)
        for handle in self.actors.named().values():  # of a predecessor, not yet taken over
            self.actors.end(handle)

    async def _bring_up(self) -> None:
        if await self._take_over():
            return
        self._enter("starting", "checking the checkpoint")
        try:
            async with asyncio.timeout(self.config.load_timeout_s):
                watch = self._oversee(Fleet(await self._draw(), self.actors, self.metrics))
                await start_all(watch.fleet, lambda phase: self._enter("starting", phase))
                await watch.collect()
        except Exception as error:
            await self._fail(error)
            return
        await watch.judge()
        self._tasks.spawn(watch.run())

    async def _draw(self, known: FrontSpec | ReplicaSpec | None = None) -> Blueprint:
        machine = known.resources.machine if known else self.actors.machine()
        return await draw(self.config, machine, known)

    def _oversee(self, fleet: Fleet) -> Watch:
        self._watch = Watch(self.config, fleet, self._tasks, self._exposition, self._enter)
        return self._watch

    async def _fail(self, error: Exception) -> None:
        self._error = _told(error)
        if isinstance(error, TimeoutError) and self._watch:
            waiting = [m.spec.actor_id for m in self._watch.fleet.members if m.state != "ready"]
            self._error = f"not ready after load_timeout_s={self.config.load_timeout_s:g}: {', '.join(waiting)}"
        logger.error("bring-up failed: %s", self._error, exc_info=None if _is_told(error) else error)
        await self.stop()
        self._enter("failed", "failed")

    def _enter(self, state: State, phase: str) -> None:
        if (state, phase) != (self._state, self._phase):
            logger.info("cluster %s: %s: %s", self.actors.namespace, state, phase)
        self._state, self._phase = state, phase

    async def _take_over(self) -> bool:
        """Keep the actors of a predecessor; False if there are none that could serve. Whatever goes wrong is tried
        again: what lives serves on meanwhile.
        """
        pause, silent_until = FIRST_PAUSE_S, now() + HUNG_S
        while True:
            try:
                watch = self._watch or await self._adopt(silent_until)
                return watch is not None and await self._check(watch)
            except Exception as error:
                self._error = _told(error)
                logger.error("takeover failed: %s", self._error, exc_info=None if _is_told(error) else error)
            self._enter("recovering", f"{self._error}; next attempt in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _adopt(self, silent_until: float) -> Watch | None:
        """Watch over what a predecessor has left, going by what that remembers; None if nothing there could serve."""
        found = await takeover.find(self.actors)
        if not any(actor.is_of_use for actor in found):
            takeover.end(self.actors, found)
            return None
        known = takeover.newest(found)
        blueprint = takeover.recall(known)
        if blueprint is None:
            if any(actor.is_silent for actor in found) and now() < silent_until:
                raise TimeoutError("the predecessor's actors don't answer yet")
            blueprint = await self._draw(known.spec if known else None)
        fleet = Fleet(blueprint, self.actors, self.metrics, is_checked=False)
        leaving = takeover.adopt(fleet, found)
        watch = self._oversee(fleet)
        for member in fleet.members:
            if member in leaving:
                watch.staffing.retire(member)
            elif member.state != "ready":
                member.work = self._tasks.spawn(self._settle(watch, member))
        self._tasks.spawn(watch.run())
        return watch

    async def _settle(self, watch: Watch, member: Member) -> None:
        is_leaving = await takeover.settle(watch.fleet, member)
        if member.work is asyncio.current_task():  # else its successor is being started
            member.work = None
        if is_leaving:
            watch.staffing.retire(member)

    async def _check(self, watch: Watch) -> bool:
        """Go on by what configuration and checkpoint ask for; False if nobody fits that."""
        fleet = watch.fleet
        blueprint = await self._draw(fleet.blueprint.front(0))
        self._error, restarts = None, takeover.restarts(fleet.blueprint.expert_map)
        if not takeover.check(fleet, blueprint):
            await self._let_go(watch)
            return False
        for member in watch.staffing.fill(fleet.wanted):
            member.num_restarts = restarts.get(member.slot, 0)
            member.bury("lost while nobody watched")
        return True

    async def _let_go(self, watch: Watch) -> None:
        logger.warning("no actor of the predecessor fits the configuration")
        watch.end()
        self._watch = None
        for member in watch.fleet.members:
            if member.work:
                member.work.cancel()
        await end_all(watch.fleet)

    async def scale(self, fronts: int | None = None, group: int | None = None, replicas: int | None = None) -> Wanted:
        """Change how many fronts there are, and how many replicas of one group, or of all. Returns at once, see
        Staffing.scale. Limits are the caller's business. Raises NotRunning while the cluster is not up.
        """
        watch = self._running()
        wanted = watch.fleet.wanted
        if fronts is not None:
            wanted = replace(wanted, fronts=fronts)
        if replicas is not None:
            groups = range(len(wanted.replicas)) if group is None else (group,)
            counts = tuple(replicas if g in groups else n for g, n in enumerate(wanted.replicas))
            wanted = replace(wanted, replicas=counts)
        watch.staffing.scale(wanted)
        return wanted

    async def rebalance(self, dry_run: bool = False, force: bool = False) -> RebalanceReport:
        """See Rebalancer.rebalance. A caller that leaves does not break it off: it ends in a map that holds.

        Raises NotRunning while the cluster is not up.
        """
        return await asyncio.shield(self._tasks.spawn(self._running().rebalance(dry_run, force)))

    def _running(self) -> Watch:
        if self._watch is None or not self._watch.fleet.is_checked or not self._bare_state.is_serving:
            raise NotRunning(f"the cluster is {self._state}: {self._phase}")
        return self._watch

    def state(self) -> ClusterState:
        state = self._bare_state
        return describe(state, self._watch.fleet, self.config.lane) if self._watch else state

    @property
    def _bare_state(self) -> ClusterState:
        return ClusterState(self._state, self._phase, self.actors.namespace, error=self._error, started=self.started)

    async def experts(self) -> ExpertsReport | None:
        """None while it is not known who holds which experts."""
        return await self._watch.experts() if self._watch else None

    async def exposition(self, ingress_id: str, samples: tuple[Sample, ...]) -> bytes:
        """Prometheus text over all processes; the asking ingress brings its own newest samples.

        Raises NotRunning while a takeover does not know yet what some actor has counted: a gap does no harm, but a
        counter that falls and comes back looks like so many new events.
        """
        self._exposition.hear(ingress_id, samples)
        if self._watch:
            await self._watch.collect()
        watch = self._watch
        is_unknown = any(m.is_unknown for m in watch.fleet.members) if watch else self._state == "recovering"
        if is_unknown:
            raise NotRunning(f"the cluster is {self._state}: {self._phase}")
        return self._exposition.text(watch.fleet, watch.expert_load) if watch else self._exposition.text(None, None)

    def push_samples(self, ingress_id: str, samples: tuple[Sample, ...]) -> ClusterState:
        """An ingress reports its metrics and learns the state of the cluster in one call."""
        self._exposition.hear(ingress_id, samples)
        return self.state()


def _is_told(error: Exception) -> bool:
    """Whether its text is written for people."""
    return isinstance(error, ConfigError | ModelError)


def _told(error: Exception) -> str:
    return str(error) if _is_told(error) else f"{type(error).__name__}: {error}"
