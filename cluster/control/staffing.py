"""Sees to it that there are as many members as there should be: starts, restarts and retires them."""

import asyncio
import logging

from cluster.config import ClusterConfig
from cluster.control.actors import first_line
from cluster.control.clock import now
from cluster.control.fleet import Fleet
from cluster.control.lives import join, load, retire
from cluster.control.members import Member
from cluster.control.tasks import Tasks
from cluster.messages.actors import Wanted

logger = logging.getLogger(__name__)


class Staffing:
    """Nothing here waits: what takes long goes on in the background."""

    def __init__(self, config: ClusterConfig, fleet: Fleet, tasks: Tasks) -> None:
        self._config = config
        self._fleet = fleet
        self._tasks = tasks

    def scale(self, wanted: Wanted) -> None:
        """New members load first and then enter the map; leaving ones leave the map first and then drain."""
        before = self._fleet.wanted
        if wanted == before:
            return
        logger.info(
            "scaling: fronts %d -> %d, replicas %s -> %s",
            *(before.fronts, wanted.fronts, before.replicas, wanted.replicas),
        )
        self._apply(wanted)
        self._tasks.spawn(self._fleet.tell_fronts())  # a successor of the supervisor learns it from them

    def heal(self) -> None:
        """Start successors of the dead, and see that there are as many as there should be: a member may have died while
        it left, or one that was silent is one too many now that it is known.
        """
        self._apply(self._fleet.wanted)
        for member in self._fleet.members:
            if member.is_due:
                member.renew()
                member.work = self._tasks.spawn(self._start(member))

    def _apply(self, wanted: Wanted) -> None:
        for member in self.fill(wanted):
            member.work = self._tasks.spawn(self._start(member))

    def fill(self, wanted: Wanted) -> list[Member]:
        """Retire those that are too many; returns new members, not yet started."""
        added, surplus = self._fleet.set_wanted(wanted)
        for member in surplus:
            self.retire(member)
        return added

    def retire(self, member: Member) -> None:
        if member.work:
            member.work.cancel()
        if member.handle is None:  # dead, or not started yet
            self._fleet.discard(member)
            return
        is_serving = member.state == "ready"
        member.enter("draining", "leaving")  # at once: who counts members next must not count on it
        member.work = self._tasks.spawn(retire(self._fleet, member, self._config.drain_timeout_s, is_serving))

    async def _start(self, member: Member) -> None:
        """Bring one member up, at any time; if that fails, it is tried again after a pause."""
        started = now()
        try:
            async with asyncio.timeout(self._config.load_timeout_s):
                await load(self._fleet, member)
                await join(self._fleet, member)
        except Exception as error:
            self._fleet.replace(member, first_line(error))
            return
        logger.info("%s is ready, %.1f s after its start", member.spec.actor_id, now() - started)
