"""The watch over a fleet: how everyone is, and what follows from it."""

import asyncio
import logging
from collections.abc import Callable

from cluster.config import ClusterConfig
from cluster.control.autoscaler import Autoscaler
from cluster.control.clock import now
from cluster.control.cluster_state import judge
from cluster.control.exposition import Exposition
from cluster.control.fleet import Fleet
from cluster.control.rebalancing import Rebalancer
from cluster.control.reports import collect
from cluster.control.staffing import Staffing
from cluster.control.tasks import Tasks
from cluster.messages.state import ExpertsReport, RebalanceReport, State
from cluster.policy.expert_load import ExpertLoad

logger = logging.getLogger(__name__)

WATCH_PERIOD_S = 0.5


class Watch:
    """Reads every member's report; the dead leave the map at once and are replaced after a pause.

    `enter` hears of each state and phase.
    """

    def __init__(
        self,
        config: ClusterConfig,
        fleet: Fleet,
        tasks: Tasks,
        exposition: Exposition,
        enter: Callable[[State, str], None],
    ) -> None:
        homes = fleet.expert_map.homes
        self.fleet = fleet
        self.staffing = Staffing(config, fleet, tasks)
        self.expert_load = ExpertLoad(len(homes), len(homes[0]), config.load_window_s)
        self.autoscaler = Autoscaler(config)
        self.rebalancer = Rebalancer(config, self.expert_load)
        self._config = config
        self._tasks = tasks
        self._exposition = exposition
        self._enter = enter
        self._collecting: asyncio.Task[None] | None = None
        self._is_over = False
        self._num_collected = 0
        self._experts: tuple[tuple[int, int], ExpertsReport] | None = None  # and what it was made of

    async def run(self) -> None:
        while not self._is_over:
            await self.round()
            await asyncio.sleep(WATCH_PERIOD_S)

    async def round(self) -> None:
        """Each part on its own: an error in one must not keep the others from their work."""
        for part in (self.collect, self._publish, self._heal, self._autoscale, self._rebalance_if_due, self.judge):
            try:
                await part()
            except Exception:
                logger.exception("watching goes on after an unexpected error")

    def end(self) -> None:
        self._is_over = True

    async def collect(self) -> None:
        """Learn how everyone is. Who asks while somebody does waits for the same reports: however many ask, every
        member is asked once at a time.
        """
        if self._collecting is None or self._collecting.done():
            self._collecting = self._tasks.spawn(self._collect_now())
        collecting = self._collecting
        await asyncio.wait([collecting])  # who leaves does not break it off
        if not collecting.cancelled():  # as it is when the supervisor stops
            collecting.result()

    async def _collect_now(self) -> None:
        await collect(self.fleet)
        self.fleet.keep(self._exposition.take_gone())
        fronts = {m.spec.actor_id: m.report.expert_counts for m in self.fleet.of_kind("front") if m.report}
        self.expert_load.update(fronts, now())
        self._num_collected += 1

    async def experts(self) -> ExpertsReport:
        """Load and placement by the newest reports; made once for all who have waited for the same ones."""
        await self.collect()
        made_of = (self._num_collected, self.fleet.expert_map.version)
        if self._experts is None or self._experts[0] != made_of:
            self._experts = made_of, self.expert_load.report(self.fleet.expert_map)
        return self._experts[1]

    async def _publish(self) -> None:
        """Waits for no front: one that hangs must not hold up the others."""
        late = self.fleet.late_fronts()
        if self.fleet.renew_map():
            self._tasks.spawn(self.fleet.tell_fronts())
            return
        for front in late:
            self._tasks.spawn(self.fleet.tell(front))

    async def _heal(self) -> None:
        if self.fleet.is_checked:
            self.staffing.heal()

    async def _autoscale(self) -> None:
        if self._config.autoscale and self.fleet.is_checked:
            self.staffing.scale(self.autoscaler.decide(self.fleet, now()))

    async def _rebalance_if_due(self) -> None:
        if self.fleet.is_checked and self.rebalancer.is_due:
            self.rebalancer.wait_for_next()
            self._tasks.spawn(self._rebalance_unasked())

    async def _rebalance_unasked(self) -> None:
        report = await self.rebalance(dry_run=False, force=False)
        if report.reason or report.error:
            logger.info("no rebalance: %s", report.error or report.reason)

    async def rebalance(self, dry_run: bool, force: bool) -> RebalanceReport:
        """See Rebalancer.rebalance."""
        await self.collect()
        return await self.rebalancer.rebalance(self.fleet, dry_run, force)

    async def judge(self) -> None:
        if self.fleet.is_checked:  # else the takeover goes on, and says so
            self._enter(*judge(self.fleet))
