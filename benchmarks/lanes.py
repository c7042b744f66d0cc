"""Engines for benchmarks: one front in this process, and the same experts behind every lane.

The lanes take turns within one run, so that what else the machine does hits all of them alike.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from cluster.expert_map import ExpertMap, ReplicaAddress, contiguous_homes
from cluster.messages.actors import ExpertDtype, LaneKeys, ReadyReport, ReplicaSpec
from cluster.models.checkpoint import Checkpoint
from cluster.models.family import read_spec

NAMESPACE = "bench"
# Experts in int8, behind a lane.
INT8 = "+int8"
LANES = ("local", "object_ref", "unix", "zmq", "unix" + INT8, "tcp")


@dataclass(frozen=True, slots=True)
class Cluster:
    """Expert replicas in processes of their own, as `outcrop serve` starts them; `int8_map` leads to those in int8."""

    expert_map: ExpertMap
    keys: LaneKeys
    int8_map: ExpertMap | None = None

    def dispatcher(self, lane: str, metrics: Any) -> Any:
        """`unix` is stream sockets, `zmq` is zmq over ipc, `tcp` with CURVE, `object_ref` is Ray actor calls."""
        expert_map = self.int8_map if lane.endswith(INT8) else self.expert_map
        assert expert_map is not None
        lane = lane.removesuffix(INT8)
        from actors.dispatch.express import ExpressDispatcher
        from actors.dispatch.remote import RemoteDispatcher
        from actors.lanes.object_ref import ObjectRefLane
        from actors.lanes.unix_client import UnixLane
        from actors.lanes.zmq_client import ZmqLane

        if lane == "unix":
            remote: RemoteDispatcher = ExpressDispatcher(UnixLane(), metrics)
        else:
            remote = RemoteDispatcher(ObjectRefLane(NAMESPACE) if lane == "object_ref" else ZmqLane(self.keys), metrics)
        remote.set_map(without_ipc(expert_map) if lane == "tcp" else expert_map)
        return remote


def without_ipc(expert_map: ExpertMap) -> ExpertMap:
    kept = (
        ReplicaAddress(r.replica_id, r.group, tuple(e for e in r.endpoints if e[0] != "ipc"))
        for r in expert_map.replicas
    )
    return expert_map.with_replicas(tuple(kept))


@contextmanager
def expert_cluster(
    model_dir: Path,
    groups: int,
    replicas: int = 1,
    dtype: str = "bfloat16",
    *,
    with_int8: bool = False,
    threads: int | None = None,
) -> Iterator[Cluster]:
    """Start Ray and the replicas; all are gone afterwards."""
    from deploy.cli.local_ray import own_ray

    if with_int8 and dtype != "bfloat16":
        raise SystemExit(f"int8 experts want the rest in bfloat16, not {dtype}: leave out lanes with {INT8}")
    spec = read_spec(model_dir)
    keys = LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())
    expert_map = ExpertMap(0, groups, contiguous_homes(spec.num_expert_layers, spec.num_experts, groups))

    def started(expert_dtype: ExpertDtype) -> ExpertMap:
        return expert_map.with_replicas(_start(model_dir, expert_map, replicas, dtype, keys, expert_dtype, threads))

    with own_ray():
        yield Cluster(started("auto"), keys, started("int8") if with_int8 else None)


def _start(
    model_dir: Path,
    expert_map: ExpertMap,
    replicas: int,
    dtype: str,
    keys: LaneKeys,
    expert_dtype: ExpertDtype,
    threads: int | None,
) -> tuple[ReplicaAddress, ...]:
    import ray

    from actors.replica.actor import ExpertActor

    threads = threads or max(1, (os.cpu_count() or 1) // (expert_map.num_groups * replicas))
    actor = ray.remote(num_cpus=0, concurrency_groups={"control": 2})(ExpertActor)
    specs = [
        ReplicaSpec(
            actor_id=f"{expert_dtype}-g{g}-r{i}", group=g, model_path=str(model_dir), device="cpu", dtype=dtype,
            experts=expert_map.experts_of(g), num_threads=threads, lane_keys=keys, expert_dtype=expert_dtype,
        )
        for g in range(expert_map.num_groups)
        for i in range(replicas)
    ]  # fmt: skip
    handles = [
        actor.options(name=s.actor_id, namespace=NAMESPACE, lifetime="detached").remote(s, NAMESPACE) for s in specs
    ]
    reports: list[ReadyReport] = ray.get([handle.load.remote() for handle in handles])
    return tuple(
        ReplicaAddress(spec.actor_id, spec.group, (("object_ref", spec.actor_id), *report.endpoints))
        for spec, report in zip(specs, reports, strict=True)
    )


def local_dispatcher(checkpoint: Checkpoint, compute: Any) -> Any:
    """All experts in this process, with all its threads."""
    from actors.dispatch.local import LocalDispatcher
    from actors.experts.loading import load_experts
    from actors.weights import Weights

    return LocalDispatcher(load_experts(Weights(checkpoint, compute), checkpoint.all_experts))


def make_engine(checkpoint: Checkpoint, compute: Any, max_tokens: int, budget: int) -> Any:
    """An engine without experts (set `engine.dispatcher`), with a KV cache of `max_tokens`, no prefix caching."""
    from actors.engine.engine import Engine
    from actors.engine.kv_cache import BlockAllocator
    from actors.engine.scheduler import Scheduler
    from actors.model.loading import load_front
    from actors.model.paged_kv import PagedKV
    from actors.weights import Weights
    from cluster.metrics import Metrics

    num_blocks = max_tokens // 16
    scheduler = Scheduler(
        BlockAllocator(num_blocks, 16, False),
        max_num_batched_tokens=budget,
        max_num_seqs=256,
        max_model_len=checkpoint.spec.max_context,
    )
    kv = PagedKV(checkpoint.spec, num_blocks, 16, compute)
    front = load_front(Weights(checkpoint, compute))
    return Engine(front, kv, None, scheduler, Metrics())  # type: ignore[arg-type]
