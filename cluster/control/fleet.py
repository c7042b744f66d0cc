"""The fleet: the actors that are there and the expert map that tells of them.

It starts and ends actors, lets them join and leave the map, and tells fronts of each new map. What there should be,
and when, is the supervisor's business.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import replace

from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from cluster.control import ray_actors
from cluster.control.members import Member
from cluster.control.ray_actors import answer, first_line
from cluster.messages.actors import ActorKind, ActorReport, FrontSpec, Legacy, ReplicaSpec, Sample, Wanted
from cluster.metrics import Metrics, cumulative, merge
from cluster.policy.blueprint import Blueprint

logger = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 2.0
MAP_TIMEOUT_S = 5.0
SETTLE_TIMEOUT_S = 35.0
LOAD_LAYER_S = 120.0
# A process that says nothing for this long is replaced.
HUNG_S = 15.0
# So is a front whose engine does not get on. A step in which it computes experts itself may take long.
STUCK_S = 120.0
STOP_S = 3.0
DRAIN_PERIOD_S = 0.2
# Ingresses learn within a second that a front takes no more requests, and have fetched its last outputs by then.
DRAIN_GRACE_S = 1.5


class Fleet:
    """`is_checked`: the blueprint is what configuration and checkpoint ask for, not only what live actors remember.
    Until then nobody is started, retired or moved.
    """

    def __init__(self, blueprint: Blueprint, namespace: str, metrics: Metrics, is_checked: bool = True) -> None:
        self.blueprint = blueprint
        self.is_checked = is_checked
        self.namespace = namespace
        self.metrics = metrics
        self.members: list[Member] = []
        self.expert_map = blueprint.expert_map
        self.wanted = blueprint.wanted
        self.gone: tuple[Sample, ...] = ()  # what those that are no more have counted
        # Held while a replica enters the map or a layer moves: nobody joins with experts that have just moved on.
        self.placing = asyncio.Lock()

    def of_kind(self, kind: ActorKind, state: str | None = None) -> list[Member]:
        return [m for m in self.members if m.kind == kind and state in (None, m.state)]

    @property
    def legacy(self) -> Legacy:
        return Legacy(self.wanted, self.gone)

    def replicas(self, group: int, state: str | None = None) -> list[Member]:
        return [m for m in self.of_kind("expert", state) if m.group == group]

    # -- what there should be ------------------------------------------------------------------------------------

    def set_wanted(self, wanted: Wanted) -> tuple[list[Member], list[Member]]:
        """Add members that are missing, without starting them; returns (added, surplus)."""
        self.wanted = wanted
        added, surplus = self._fill("front", None, wanted.fronts)
        for group, count in enumerate(wanted.replicas):
            more, less = self._fill("expert", group, count)
            added, surplus = added + more, surplus + less
        self.members += added
        return added, surplus

    def _fill(self, kind: ActorKind, group: int | None, count: int) -> tuple[list[Member], list[Member]]:
        staying = [m for m in self.members if m.kind == kind and m.group == group and not m.is_leaving]
        used = {m.slot for m in self.members}
        free = (spec for spec in self._specs(group) if spec.actor_id not in used)
        added = [Member(next(free), kind) for _ in range(count - len(staying))]
        # Those that are silent stay until they have answered: nobody who serves leaves for one that may never do.
        known = [m for m in reversed(staying) if not m.is_unknown]
        # Those that don't serve go first, then the youngest slots.
        leaving = sorted(known, key=lambda m: m.state == "ready")
        return added, leaving[: max(0, len(known) - count)]

    def _specs(self, group: int | None) -> Iterator[FrontSpec | ReplicaSpec]:
        return (self.spec(group, index) for index in itertools.count())

    def spec(self, group: int | None, index: int = 0) -> FrontSpec | ReplicaSpec:
        """Of a front (group None) or of a replica, as the blueprint and the map want it."""
        return self.blueprint.front(index) if group is None else self.blueprint.replica(group, index, self.expert_map)

    # -- one member's life ---------------------------------------------------------------------------------------

    async def load(self, member: Member) -> None:
        """Start the member's actor and let it load. Raises its own ConfigError or ModelError, or a RayError."""
        member.spec = replace(member.spec, lane_keys=self.blueprint.lane_keys)
        if isinstance(member.spec, ReplicaSpec):  # experts may have moved since the spec was written
            experts = self.expert_map.experts_of(member.spec.group)
            member.spec = replace(member.spec, experts=experts)
        member.handle = ray_actors.create(member, self.blueprint.resources, self.namespace)
        started = time.time()
        member.enter("loading", member.detail)
        try:
            member.ready = await member.handle.load.remote()
        except RayError as error:
            raise ray_actors.cause(error) from None
        seconds = time.time() - started
        if member.kind == "expert":
            self.metrics.observe("replica_start_seconds", seconds)
        logger.info("%s has loaded %d bytes in %.1f s", member.spec.actor_id, member.ready.weight_bytes, seconds)

    async def join(self, member: Member) -> None:
        """Let a member that has loaded serve: a replica enters the map, a front takes the map."""
        assert member.ready is not None
        if member.kind == "front":
            await self._start_front(member)
            return
        await self._align(member)  # what takes long holds up nobody else who joins
        async with self.placing:
            await self._align(member)
            member.become_ready(member.ready)
            await self.publish()

    async def _start_front(self, member: Member) -> None:
        version, legacy = self.expert_map.version, self.legacy
        assert member.ready is not None
        fronts = [m.ready for m in self.of_kind("front") if m is not member and m.handle and m.ready]
        others = tuple(ready.kv_cache_bytes for ready in fronts if ready.node == member.ready.node)
        try:
            ready = await member.handle.start.remote(self.expert_map, legacy, others)
        except RayError as error:
            raise ray_actors.cause(error) from None
        member.become_ready(ready)
        member.told = legacy
        if (self.expert_map.version, self.legacy) != (version, legacy):  # it was not among those that heard of the new
            await self.tell(member)

    async def _align(self, member: Member) -> None:
        """Have a replica hold what the map has at home in its group."""
        assert isinstance(member.spec, ReplicaSpec)
        for layer, experts in enumerate(self.expert_map.experts_of(member.spec.group)):
            if experts != member.spec.experts[layer]:
                await answer(member.handle.set_experts.remote(layer, experts), LOAD_LAYER_S)
                member.hold(layer, experts)

    async def retire(self, member: Member, drain_timeout_s: float, is_serving: bool) -> None:
        """End a member that leaves; one that serves leaves without a failed request."""
        if is_serving:
            try:
                await (self._drain_front(member, drain_timeout_s) if member.kind == "front" else self._leave_map())
            except Exception as error:  # it may die while it leaves
                logger.warning("%s did not drain: %s", member.spec.actor_id, first_line(error))
        try:
            await self.close_lanes([member])
        finally:
            self.discard(member)

    async def _leave_map(self) -> None:
        self.renew_map()
        await self.tell_fronts()  # whoever has made that version: only when fronts have it does nobody send here
        await self.settle()

    async def _drain_front(self, member: Member, timeout_s: float) -> None:
        """Wait until its last request has ended. What has not by then is replayed on another front."""
        await answer(member.handle.drain.remote(), HUNG_S)
        await asyncio.sleep(DRAIN_GRACE_S)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            await self._ask(member)
            if member.state != "draining" or member.report is None or member.report.num_requests == 0:
                break
            member.detail = f"{member.report.num_requests} requests left"
            await asyncio.sleep(DRAIN_PERIOD_S)
        await asyncio.sleep(DRAIN_GRACE_S)

    def discard(self, member: Member) -> None:
        """End a member's actor, and forget the member but for what it has counted."""
        self.kill(member)
        self._keep_counters(member)
        if member in self.members:
            self.members.remove(member)
        logger.info("%s has left", member.spec.actor_id)

    def kill(self, member: Member) -> None:
        if member.handle is not None:
            ray_actors.end(member.handle)

    async def end_all(self) -> None:
        await self.close_lanes(self.of_kind("expert", "ready"))
        for member in self.members:
            self.kill(member)
            member.enter("dead", "stopped")

    def bury(self, member: Member, why: str) -> None:
        """Note that a member's actor is dead."""
        self._keep_counters(member)
        member.bury(why)
        self.metrics.inc("actor_restarts_total", kind=member.kind)
        logger.warning("%s is lost: %s", member.spec.actor_id, member.detail)

    def replace(self, member: Member, why: str) -> None:
        """End a member's actor, and have another one started."""
        self.kill(member)
        self.bury(member, why)

    def _keep_counters(self, member: Member) -> None:
        if member.report:
            self.keep(cumulative(member.report.samples))

    def keep(self, counted: tuple[Sample, ...]) -> None:
        """Of an actor or an ingress that is gone."""
        if counted:
            self.gone = merge((self.gone, counted))

    async def close_lanes(self, members: list[Member]) -> None:
        """Let replicas remove the files of their sockets; a killed process can't."""
        there = [m for m in members if m.kind == "expert" and m.handle and m.ready]
        closing = [answer(m.handle.stop.remote(), STOP_S) for m in there]
        for result in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(result, TimeoutError):
                logger.warning("a replica did not close its lane in %g s", STOP_S)

    # -- expert map ----------------------------------------------------------------------------------------------

    async def publish(self) -> None:
        """If the live replicas are not those of the map: next version, to every front that serves."""
        if self.renew_map():
            await self.tell_fronts()

    def renew_map(self) -> bool:
        """Whether there is a next version, because the live replicas are not those of the map. One that has not yet
        told a new supervisor who it is keeps its place.
        """
        places = {address.replica_id: address for address in self.expert_map.replicas}
        replicas = self.of_kind("expert")
        found = [places.get(m.spec.actor_id) if m.is_unknown else m.address for m in replicas]
        live = tuple(address for address in found if address)
        if self.expert_map.version and live == self.expert_map.replicas:
            return False
        self.expert_map = self.expert_map.with_replicas(live)
        logger.info("expert map version %d: %d replicas", self.expert_map.version, len(live))
        return True

    async def publish_homes(self, layer: int, homes: tuple[tuple[int, ...], ...]) -> None:
        """The next version of the map, with other homes for a layer; returns when no front uses an older one."""
        self.expert_map = self.expert_map.with_homes(layer, homes)
        logger.info("expert map version %d: layer %d has moved", self.expert_map.version, layer)
        await self.tell_fronts()
        await self.settle()

    def listening(self) -> list[Member]:
        """Fronts that compute."""
        return [*self.of_kind("front", "ready"), *self.of_kind("front", "draining")]

    async def tell_fronts(self) -> None:
        self.expert_map.check_integrity()
        await asyncio.gather(*(self.tell(front) for front in self.listening()))

    async def tell(self, front: Member) -> None:
        """Hand a front the newest map, and the legacy. If that fails, it is late: see late_fronts."""
        front.told_at, legacy, handle = time.monotonic(), self.legacy, front.handle
        if handle is None:  # it has died meanwhile
            return
        try:
            await answer(handle.set_expert_map.remote(self.expert_map, legacy), MAP_TIMEOUT_S)
            front.told = legacy
        except (TimeoutError, RayError) as error:
            logger.warning("%s did not take the expert map: %s", front.spec.actor_id, first_line(error))

    def late_fronts(self) -> list[Member]:
        """Fronts that report an older map, or have an older legacy, although the newest has had the time to arrive. A
        successor of the supervisor learns both from them.
        """
        version, legacy, now = self.expert_map.version, self.legacy, time.monotonic()
        late = [m for m in self.listening() if m.report and (m.report.map_version < version or m.told != legacy)]
        return [m for m in late if now - m.told_at >= MAP_TIMEOUT_S]

    async def settle(self) -> None:
        """Wait until the step that each front was in has ended. Fronts that die or hang don't count."""
        waiting = (answer(m.handle.settle.remote(), SETTLE_TIMEOUT_S) for m in self.listening())
        await asyncio.gather(*waiting, return_exceptions=True)

    # -- reports -------------------------------------------------------------------------------------------------

    async def collect(self) -> None:
        """Ask every member that serves for its report; bury those that are dead."""
        await asyncio.gather(*(self._ask(m) for m in self.members if m.state in ("ready", "draining")))

    async def _ask(self, member: Member) -> None:
        handle = member.handle
        if handle is None:  # it has died meanwhile
            return
        try:
            report = await answer(handle.report.remote(), REPORT_TIMEOUT_S)
        except (TimeoutError, GetTimeoutError, ActorUnavailableError):
            report = None
        except RayActorError as error:
            if member.handle is handle:
                self._lose(member, first_line(error))
            return
        except RayError as error:  # it lives, though it can't say how it is
            member.detail = f"no report: {first_line(error)}"
            return
        if member.handle is handle:  # else it has been replaced meanwhile
            self._hear(member, report)

    def _hear(self, member: Member, report: ActorReport | None) -> None:
        silent = member.hear(report)
        if report is None:
            member.detail = f"no answer for {silent:.0f} s"
            if silent > HUNG_S:
                self._give_up(member, "hung")
        elif report.stuck_seconds > STUCK_S:
            self._give_up(member, f"stuck: what it computes has not ended for {report.stuck_seconds:.0f} s")
        elif member.state == "ready":
            member.detail = ""

    def _give_up(self, member: Member, why: str) -> None:
        """End a member that lives and does not work; it is replaced unless it was leaving."""
        self.kill(member)
        self._lose(member, why)

    def _lose(self, member: Member, why: str) -> None:
        if member.state == "draining":
            member.enter("dead", why)  # whoever drains it sees that, and discards it
        elif member.state == "ready":
            self.bury(member, why)
