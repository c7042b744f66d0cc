"""Expert replicas in processes that outlive a test: the real ExpertActor, told again and again what to hold."""

from pathlib import Path
from typing import Any

import ray

from actors.expert import ExpertActor
from actors.lanes.object_ref import ObjectRefLane
from actors.lanes.remote import RemoteDispatcher
from cluster.expert_map import ExpertMap, ReplicaAddress, contiguous_homes
from cluster.messages import ActorReport, ReplicaSpec
from cluster.metrics import Metrics
from cluster.model_config import read_model_config

NAMESPACE = "hosts"


@ray.remote(num_cpus=0)
class _Host:
    def hold(self, spec: ReplicaSpec) -> None:
        self.replica = ExpertActor(spec)
        self.replica.load()

    def run_experts(self, frame: bytes) -> bytes:
        return self.replica.run_experts(frame)

    def report(self) -> ActorReport:
        return self.replica.report()


class ExpertHost:
    def __init__(self, name: str) -> None:
        self.name = name
        self.handle: Any = _Host.options(name=name, namespace=NAMESPACE).remote()  # type: ignore[attr-defined]

    def address(self, group: int) -> ReplicaAddress:
        return ReplicaAddress(self.name, group, (("object_ref", self.name),))


def place(hosts: list[ExpertHost], model_dir: Path, num_groups: int) -> ExpertMap:
    """Spread all groups over all hosts: host i serves group i modulo num_groups."""
    config = read_model_config(model_dir)
    homes = contiguous_homes(config.num_hidden_layers, config.num_local_experts, num_groups)
    expert_map = ExpertMap(0, num_groups, homes)
    loads = []
    for i, host in enumerate(hosts):
        group = i % num_groups
        spec = ReplicaSpec(host.name, group, str(model_dir), "cpu", "float32", expert_map.experts_of(group), 1)
        loads.append(host.handle.hold.remote(spec))
    ray.get(loads)
    return expert_map.with_replicas(tuple(host.address(i % num_groups) for i, host in enumerate(hosts)))


def connect(expert_map: ExpertMap) -> RemoteDispatcher:
    dispatcher = RemoteDispatcher(ObjectRefLane(NAMESPACE), Metrics())
    dispatcher.set_map(expert_map)
    return dispatcher
