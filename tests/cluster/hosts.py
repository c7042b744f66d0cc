"""Expert replicas in processes that outlive a test: the real ExpertActor, told again and again what to hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import zmq

from actors.dispatch.remote import RemoteDispatcher
from actors.lanes.lane import Lane
from actors.lanes.object_ref import ObjectRefLane
from actors.lanes.unix_client import UnixLane
from actors.lanes.zmq_client import ZmqLane
from actors.replica.actor import ExpertActor
from cluster.expert_map import ExpertMap, ReplicaAddress, contiguous_homes
from cluster.messages.actors import ActorReport, ExpertDtype, LaneKeys, LoadProgress, ReadyReport, ReplicaSpec
from cluster.metrics import Metrics
from cluster.models.family import read_spec

NAMESPACE = "hosts"
KEYS = LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())


@ray.remote(num_cpus=0)
class _Host:
    replica: ExpertActor | None = None

    def hold(self, spec: ReplicaSpec) -> ReadyReport:
        if self.replica:
            self.replica.stop()
        self.replica = ExpertActor(spec, NAMESPACE)
        return self.replica.load()

    def run_experts(self, frame: bytes) -> bytes:
        assert self.replica
        return self.replica.run_experts(frame)

    def progress(self) -> LoadProgress:
        assert self.replica
        return self.replica.progress()

    def report(self) -> ActorReport:
        assert self.replica
        return self.replica.report()


class ExpertHost:
    def __init__(self, name: str) -> None:
        self.name = name
        self.handle: Any = _Host.options(name=name, namespace=NAMESPACE).remote()  # type: ignore[attr-defined]


def place(
    hosts: list[ExpertHost],
    model_dir: Path,
    num_groups: int,
    dtype: str = "float32",
    expert_dtype: ExpertDtype = "auto",
) -> ExpertMap:
    """Spread all groups over all hosts: host i serves group i modulo num_groups."""
    spec = read_spec(model_dir)
    homes = contiguous_homes(spec.num_layers, spec.num_experts, num_groups)
    expert_map = ExpertMap(0, num_groups, homes)
    loads = []
    for i, host in enumerate(hosts):
        group = i % num_groups
        replica = ReplicaSpec(host.name, group, str(model_dir), "cpu", dtype, expert_map.experts_of(group), 1, KEYS)
        loads.append(host.handle.hold.remote(replace(replica, expert_dtype=expert_dtype)))
    reports: list[ReadyReport] = ray.get(loads)
    return expert_map.with_replicas(
        tuple(
            ReplicaAddress(host.name, i % num_groups, (("object_ref", host.name), *report.endpoints))
            for i, (host, report) in enumerate(zip(hosts, reports, strict=True))
        )
    )


def make_lane(name: str) -> Lane:
    if name == "unix":
        return UnixLane()
    return ObjectRefLane(NAMESPACE) if name == "object_ref" else ZmqLane(KEYS)


def connect(expert_map: ExpertMap, lane: str = "object_ref") -> RemoteDispatcher:
    """A dispatcher over `object_ref`, `unix`, `zmq` (ipc, since all is on one host) or `tcp`."""
    if lane == "tcp":
        expert_map = without(expert_map, "ipc")
    dispatcher = RemoteDispatcher(make_lane(lane), Metrics())
    dispatcher.set_map(expert_map)
    return dispatcher


def without(expert_map: ExpertMap, endpoint: str) -> ExpertMap:
    kept = (
        ReplicaAddress(r.replica_id, r.group, tuple(e for e in r.endpoints if e[0] != endpoint))
        for r in expert_map.replicas
    )
    return expert_map.with_replicas(tuple(kept))
