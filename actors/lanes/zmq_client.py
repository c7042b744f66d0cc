"""The lane between hosts, the front's end: a zmq connection per replica that stays open, no Ray on the way."""

import logging
import os
from collections.abc import Iterable

import zmq

from actors.lanes.links import LinkedLane
from actors.lanes.zmq_link import SLICE_MS, ZmqLink, new_socket
from cluster.expert_map import ReplicaAddress
from cluster.messages.actors import LaneKeys

logger = logging.getLogger(__name__)


class ZmqLane(LinkedLane[ZmqLink]):
    """Endpoints `ipc` (used where its socket file exists, that is, on the same host) and `tcp` (CURVE)."""

    name = "zmq"

    def __init__(self, keys: LaneKeys) -> None:
        super().__init__()
        self._keys = keys
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))

    def has_endpoint(self, replica: ReplicaAddress) -> bool:
        return usable_endpoint(replica) is not None

    def _open(self, replica: ReplicaAddress) -> ZmqLink | None:
        endpoint = usable_endpoint(replica)
        if endpoint is None:
            return None
        try:
            return ZmqLink(new_socket(self._context, endpoint, self._keys), endpoint)
        except zmq.ZMQError as error:
            logger.error("no connection to replica %s at %s: %s", replica.replica_id, endpoint, error)
            return None

    def _ready(self, links: Iterable[ZmqLink], timeout_s: float) -> list[ZmqLink]:
        by_socket = {link.socket: link for link in links}
        poller = zmq.Poller()
        for socket in by_socket:
            poller.register(socket, zmq.POLLIN)
        return [by_socket[socket] for socket, _ in poller.poll(1 + int(timeout_s * 1000) if timeout_s else 0)]

    def _read(self, links: list[ZmqLink], timeout_s: float) -> None:
        """Waits for a slice at most, and looks at all: zmq does not tell of a loss by itself."""
        if len(links) == 1 and 1000 * timeout_s >= SLICE_MS:
            links[0].take_in(wait=True)
            return
        self._ready(links, min(SLICE_MS / 1000, timeout_s))
        for link in links:
            link.take_in()

    def close(self) -> None:
        super().close()
        self._context.term()


def usable_endpoint(replica: ReplicaAddress) -> str | None:
    """The replica's ipc socket if it is on this host, else its tcp endpoint, else None."""
    endpoints = dict(replica.endpoints)
    ipc = endpoints.get("ipc")
    if ipc and os.path.exists(ipc.removeprefix("ipc://")):
        return ipc
    return endpoints.get("tcp")
