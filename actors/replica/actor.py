"""ExpertActor: a thin Ray class around Replica and its lane servers. Stateless towards requests.

torch is imported when an actor starts, so that the supervisor can name this class without loading it.
"""

import tempfile
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import ray

from actors.process.limits import gently, limit_threads, release_free_memory, use_threads
from actors.process.orphan import watch_for_orphanhood
from actors.process.place import where_am_i
from actors.process.readiness import show_ready
from actors.replica.peers import Peers
from cluster.logs import set_up_logs
from cluster.messages.actors import ActorReport, Identity, LoadProgress, ReadyReport, ReplicaSpec
from cluster.metrics import Metrics

if TYPE_CHECKING:
    from actors.lanes.server import LaneServer
    from actors.replica.replica import Replica

# A socket's path may have 107 characters.
MAX_DIRECTORY = 80


class ExpertActor:
    """Computes one message at a time; calls of the group "control" are answered meanwhile."""

    def __init__(self, spec: ReplicaSpec, namespace: str) -> None:
        gently(lambda: limit_threads(spec.num_threads))
        set_up_logs(spec.actor_id, spec.logs.style, spec.logs.level)
        self.spec = spec
        self.metrics = Metrics()
        self.replica: Replica | None = None
        self.servers: list[LaneServer] = []
        self.ready: ReadyReport | None = None
        self._peers = Peers(namespace)
        self._loaded = 0
        self._total = 0
        self.supervision = watch_for_orphanhood(namespace, self._close)

    def load(self) -> ReadyReport:
        """Read this replica's experts, and nothing else, from the checkpoint; then listen on the fast lanes."""
        started = time.monotonic()
        self.replica = gently(self._read)
        endpoints = self._listen(self.replica)
        seconds = time.monotonic() - started
        self.ready = ReadyReport(self.spec.actor_id, *where_am_i(), self._total, seconds, endpoints=endpoints)
        show_ready(self.spec.actor_id)
        return self.ready

    def _read(self) -> "Replica":
        from actors.compute import Compute, told_if_out_of_memory
        from actors.experts.loading import load_experts, read_layer_experts
        from actors.replica.replica import Replica
        from actors.weights import Weights
        from cluster.models.checkpoint import Checkpoint
        from cluster.models.hub import local_copy

        spec = self.spec
        checkpoint = Checkpoint.open(local_copy(spec.model_path))
        compute = Compute.choose(spec.device, spec.dtype, spec.kernels, spec.expert_dtype)
        self._total = checkpoint.bytes_per_expert * sum(len(layer) for layer in spec.experts)
        with told_if_out_of_memory("a replica's share of the experts", "raise groups or gpus_per_replica"):
            store = load_experts(Weights(checkpoint, compute, self._advance), spec.experts)
        if compute.experts == "native" and spec.native_threads:
            use_threads(spec.native_threads)
        release_free_memory()
        read = partial(read_layer_experts, Weights(checkpoint, compute))
        replica = Replica(spec, store, read, self.metrics)
        replica.warm_up()
        return replica

    def _advance(self, num_bytes: int) -> None:
        self._loaded += num_bytes

    def _listen(self, replica: "Replica") -> tuple[tuple[str, str], ...]:
        from actors.lanes.unix_server import UnixServer
        from actors.lanes.zmq_server import ZmqServer

        session = ray._private.worker._global_node.get_session_dir_path()  # type: ignore[attr-defined]
        directory = next(path for path in (session, tempfile.gettempdir(), "/tmp") if len(path) <= MAX_DIRECTORY)
        name, compute, spec = self.spec.actor_id, replica.answer_batch, self.spec
        if spec.lane in ("auto", "unix"):
            self.servers.append(UnixServer(name, compute, directory, replica.serving))
        if spec.lane_keys is not None:
            host = ray.util.get_node_ip_address()
            self.servers.append(ZmqServer(name, compute, spec.lane_keys, host, directory))
        return tuple(endpoint for server in self.servers for endpoint in server.start())

    def run_experts(self, frame: bytes) -> bytes:
        """The object_ref lane: answer a packed dispatch with a packed partial, or with the reason why not."""
        if self.replica is None:
            from actors.lanes import wire

            return wire.pack_refusal(wire.FAILED, f"{self.spec.actor_id} has not loaded its experts yet")
        return self.replica.answer(frame)

    @ray.method(concurrency_group="control")
    def set_experts(self, layer: int, ids: tuple[int, ...]) -> int:
        """See Replica.set_experts. The supervisor loads first, publishes second, retires third."""
        assert self.replica is not None
        replica = self.replica
        return gently(lambda: replica.set_experts(layer, ids), while_serving=True)

    @ray.method(concurrency_group="control")
    def identity(self) -> Identity | None:
        """For a supervisor that has not started this actor; None while it can't serve."""
        if self.replica is None or self.ready is None:
            return None
        return Identity(replace(self.spec, experts=self.replica.store.held), self.ready)

    @ray.method(concurrency_group="control")
    def progress(self) -> LoadProgress:
        return LoadProgress(self._loaded, self._total)

    @ray.method(concurrency_group="control")
    def report(self) -> ActorReport:
        self.supervision.hear()
        tokens, stuck = (self.replica.num_tokens, self.replica.stuck_seconds) if self.replica else (0, 0.0)
        if self.replica:
            self.replica.publish_counters()
        self.metrics.raise_to("lane_dropped_messages_total", sum(server.num_dropped for server in self.servers))
        return ActorReport(self.spec.actor_id, 0, tokens, self.metrics.recorded(), stuck_seconds=stuck)

    @ray.method(concurrency_group="control")
    def reports(self, names: tuple[str, ...]) -> tuple[ActorReport | None, ...]:
        """Those of other replicas on this node: see Peers.reports."""
        return self._peers.reports(names)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Close sockets and remove their files; the supervisor kills the process afterwards."""
        self._close()

    def _close(self) -> None:
        for server in self.servers:
            server.stop()
        self.servers = []
