"""Where dispatches go: the newest expert map, as tables that a dispatch reads. Taken in by any thread, read by one."""

import logging
import threading
from collections import defaultdict

from actors.dispatch.dispatcher import DispatchError
from actors.dispatch.parts import HomeTable
from actors.lanes.lane import Lane
from cluster.expert_map import ExpertMap, ReplicaAddress

logger = logging.getLogger(__name__)

# How long a front waits for a newer map after a replica refused.
MAP_WAIT_S = 2.0


class Routes:
    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._connecting = threading.Lock()
        self._changed = threading.Condition()
        self._map: ExpertMap | None = None
        self._homes: list[HomeTable] = []
        self._by_group: dict[int, list[ReplicaAddress]] = {}
        self._stale = 0  # the version after which no newer one came, though a replica refused

    @property
    def version(self) -> int:
        return self._map.version if self._map else 0

    def set_map(self, expert_map: ExpertMap) -> None:
        """Route by this map from the next dispatch on. May be called from any thread; older maps are ignored.

        A map is taken even if not all of its replicas can be reached: by an older one, less would be.
        """
        with self._connecting:
            if expert_map.version <= self.version:
                return
            known, tables = self._map, self._homes
            expert_map.check_integrity(known)
            try:
                self._lane.connect(expert_map.replicas)  # may wait for a handshake: dispatches go on meanwhile
            except Exception:
                logger.exception("map %d is taken, though its replicas could not be connected", expert_map.version)
            # Most layers stay where they are: their tables are kept.
            old = {id(layer): table for layer, table in zip(known.homes, tables, strict=True)} if known else {}
            homes = [old.get(id(layer)) or HomeTable(layer) for layer in expert_map.homes]
            by_group: dict[int, list[ReplicaAddress]] = defaultdict(list)
            for replica in expert_map.replicas:
                by_group[replica.group].append(replica)
            with self._changed:
                self._homes, self._by_group = homes, dict(by_group)
                self._map = expert_map
                self._changed.notify_all()

    def of_layer(self, layer: int) -> tuple[int, HomeTable]:
        """(version of the map, the layer's homes). Raises DispatchError as long as there is no map."""
        with self._changed:
            if self._map is None:
                raise DispatchError("no expert map has been published yet")
            return self._map.version, self._homes[layer]

    def now(self) -> tuple[int, list[HomeTable], dict[int, list[ReplicaAddress]]]:
        """(version of the map, all layers' homes, replicas by group), of one map. Raises DispatchError without one."""
        with self._changed:
            if self._map is None:
                raise DispatchError("no expert map has been published yet")
            return self._map.version, self._homes, self._by_group

    def of_group(self, group: int) -> list[ReplicaAddress]:
        return self._by_group.get(group, [])

    def everyone(self) -> tuple[ReplicaAddress, ...]:
        return self._map.replicas if self._map else ()

    def wait_for_newer(self, version: int) -> bool:
        """Whether there is a newer map, or comes soon. For one that did not come nobody waits twice."""
        with self._changed:
            timeout = MAP_WAIT_S if version != self._stale else 0.0
            if self._changed.wait_for(lambda: self.version > version, timeout):
                return True
            self._stale = version
            return False
