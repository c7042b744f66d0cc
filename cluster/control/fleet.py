"""The fleet: the actors that are there and the expert map that tells of them.

It knows its members, buries those that are lost, and tells fronts of each new map. How one comes and goes is told in
cluster/control/lives.py; what there should be, and when, is not its business.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterator

from cluster.control.actors import ActorError, Actors, DeadActorError, Handle, first_line
from cluster.control.clock import now
from cluster.control.members import Member
from cluster.expert_map import ExpertMap, MapChange, change_between
from cluster.messages.actors import ActorKind, FrontSpec, Legacy, ReplicaSpec, Sample, Wanted
from cluster.metrics import Metrics, cumulative, merge
from cluster.policy.blueprint import Blueprint

logger = logging.getLogger(__name__)

MAP_TIMEOUT_S = 5.0
SETTLE_TIMEOUT_S = 35.0


class Fleet:
    """`is_checked`: the blueprint is what configuration and checkpoint ask for, not only what live actors remember.
    Until then nobody is started, retired or moved.
    """

    def __init__(self, blueprint: Blueprint, actors: Actors, metrics: Metrics, is_checked: bool = True) -> None:
        self.blueprint = blueprint
        self.is_checked = is_checked
        self.actors = actors
        self.metrics = metrics
        self.members: list[Member] = []
        self.expert_map = blueprint.expert_map
        self.wanted = blueprint.wanted
        self._change: MapChange | None = None  # from the version before
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

    def ready_by_group(self) -> dict[int, list[Member]]:
        """Of expert replicas; in one pass, however many groups there are."""
        found: dict[int, list[Member]] = {group: [] for group in range(self.expert_map.num_groups)}
        for member in self.of_kind("expert", "ready"):
            found.setdefault(member.group or 0, []).append(member)
        return found

    def set_wanted(self, wanted: Wanted) -> tuple[list[Member], list[Member]]:
        """Add members that are missing, without starting them; returns (added, surplus)."""
        self.wanted = wanted
        staying: dict[int | None, list[Member]] = {}
        for member in self.members:
            if not member.is_leaving:
                staying.setdefault(member.group, []).append(member)
        used = {m.slot for m in self.members}
        added, surplus = list[Member](), list[Member]()
        for group, count in ((None, wanted.fronts), *enumerate(wanted.replicas)):
            here = staying.get(group, [])
            added += self._missing(group, count - len(here), used)
            surplus += _surplus(here, count)
        self.members += added
        return added, surplus

    def _missing(self, group: int | None, count: int, used: set[str]) -> list[Member]:
        free = (spec for spec in self._specs(group) if spec.actor_id not in used)
        return [Member(next(free), "front" if group is None else "expert") for _ in range(count)]

    def _specs(self, group: int | None) -> Iterator[FrontSpec | ReplicaSpec]:
        return (self.spec(group, index) for index in itertools.count())

    def spec(self, group: int | None, index: int = 0) -> FrontSpec | ReplicaSpec:
        """Of a front (group None) or of a replica, as the blueprint and the map want it."""
        return self.blueprint.front(index) if group is None else self.blueprint.replica(group, index, self.expert_map)

    def discard(self, member: Member) -> None:
        """End a member's actor, and forget the member but for what it has counted."""
        self.kill(member)
        self._keep_counters(member)
        if member in self.members:
            self.members.remove(member)
        logger.info("%s has left", member.spec.actor_id)

    def kill(self, member: Member) -> None:
        if member.handle is not None:
            self.actors.end(member.handle)

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
        self._change_map(self.expert_map.with_replicas(live))
        logger.info("expert map version %d: %d replicas", self.expert_map.version, len(live))
        return True

    async def publish_homes(self, layer: int, homes: tuple[tuple[int, ...], ...]) -> None:
        """The next version of the map, with other homes for a layer; returns when no front uses an older one."""
        self._change_map(self.expert_map.with_homes(layer, homes))
        logger.info("expert map version %d: layer %d has moved", self.expert_map.version, layer)
        await self.tell_fronts()
        await self.settle()

    def listening(self) -> list[Member]:
        """Fronts that compute."""
        return [*self.of_kind("front", "ready"), *self.of_kind("front", "draining")]

    def _change_map(self, new: ExpertMap) -> None:
        new.check_integrity(self.expert_map)
        self._change = change_between(self.expert_map, new)
        self.expert_map = new

    async def tell_fronts(self) -> None:
        await asyncio.gather(*(self.tell(front) for front in self.listening()))

    async def tell(self, front: Member) -> None:
        """Bring a front's map to the newest version, and hand it the legacy. If that fails, it is late: see
        late_fronts.
        """
        async with front.telling:
            await self._tell(front)

    async def _tell(self, front: Member) -> None:
        front.told_at, legacy, handle = now(), self.legacy, front.handle
        if handle is None:  # it has died meanwhile
            return
        try:
            await self._hand_over(front, handle, None if front.told == legacy else legacy)
            front.told = legacy
        except (TimeoutError, ActorError) as error:
            logger.warning("%s did not take the expert map: %s", front.spec.actor_id, first_line(error))

    async def _hand_over(self, front: Member, handle: Handle, legacy: Legacy | None) -> None:
        """What has changed, to a front that has the version before; the whole map to any other. Raises as call."""
        whole, change = self.expert_map, self._change
        if change and (change.base, change.version) == (front.map_version, whole.version):
            try:
                held = await self.actors.call(handle, "set_expert_map", change, legacy, timeout=MAP_TIMEOUT_S)
                front.map_version = held
                return
            except DeadActorError:
                raise
            except ActorError as error:  # its map is not the one that it was thought to have
                logger.info("%s gets the whole expert map: %s", front.spec.actor_id, first_line(error))
        held = await self.actors.call(handle, "set_expert_map", whole, legacy, timeout=MAP_TIMEOUT_S)
        # A newer one is not ours: of a supervisor before this one. Until ours is as new, it is told whole maps.
        front.map_version = held if held == whole.version else 0

    def late_fronts(self) -> list[Member]:
        """Fronts that report an older map, or have an older legacy, although the newest has had the time to arrive. A
        successor of the supervisor learns both from them.
        """
        version, legacy = self.expert_map.version, self.legacy
        late = [m for m in self.listening() if m.report and (m.report.map_version < version or m.told != legacy)]
        return [m for m in late if now() - m.told_at >= MAP_TIMEOUT_S]

    async def settle(self) -> None:
        """Wait until the step that each front was in has ended. Fronts that die or hang don't count."""
        waiting = (self.actors.call(m.handle, "settle", timeout=SETTLE_TIMEOUT_S) for m in self.listening())
        await asyncio.gather(*waiting, return_exceptions=True)


def _surplus(staying: list[Member], count: int) -> list[Member]:
    """Those that leave for there to be `count`."""
    # Those that are silent stay until they have answered: nobody who serves leaves for one that may never do.
    known = [m for m in reversed(staying) if not m.is_unknown]
    # Those that don't serve go first, then the youngest slots.
    return sorted(known, key=lambda m: m.state == "ready")[: max(0, len(known) - count)]
