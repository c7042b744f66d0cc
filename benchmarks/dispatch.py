"""Round trip of one dispatch and combine, by lane and payload: experts that only answer, no arithmetic.

    python -m benchmarks.dispatch [--groups 2] [--repeat 2000]

Each group's replica is a process of its own that sends the hidden states back (over unix, where the native loop
answers, zeros in their place); all groups get all tokens. The lanes over sockets stand beside their floor: bare sockets
that exchange as many bytes in the same run.
"""

import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import typer
import zmq

from benchmarks.floor import BareSockets, BareStreams, bare_sockets, bare_streams
from benchmarks.lanes import NAMESPACE, Cluster
from benchmarks.report import save, table
from cluster.expert_map import ExpertMap, ReplicaAddress
from cluster.messages.actors import LaneKeys

TOKENS = 16
TOP_K = 8
# Lanes over sockets, and the name of their floor.
FLOORS = {"unix": "floor (streams)", "zmq": "floor (ipc)", "tcp": "floor (tcp)"}
# What p50 is to be at most, at AIM_KIB: as a multiple of another contender's of the same run.
AIMS = {"unix": (("floor (streams)", 2.0), ("zmq", 0.25))}
AIM_KIB = 32


@dataclass(frozen=True, slots=True)
class Figure:
    kib: int
    lane: str
    p50_us: float
    p95_us: float
    p99_us: float


class EchoReplica:
    """Answers a dispatch with its own hidden states, on every lane."""

    def __init__(self, replica_id: str, keys: LaneKeys) -> None:
        from actors.lanes.zmq_server import ZmqServer
        from actors.probe.echo import echo

        self.replica_id = replica_id
        self._answer = echo
        self.servers: list[Any] = [ZmqServer(replica_id, echo, keys, "127.0.0.1", "/tmp")]

    def start(self, num_experts: int, kibs: list[int]) -> tuple[tuple[str, str], ...]:
        """Endpoints; those of the unix lane by payload, as its loop knows one hidden size."""
        from actors.lanes.unix_server import UnixServer
        from actors.probe.echo import without_arithmetic

        endpoints = self.servers[0].start()
        for kib in kibs:
            server = UnixServer(self.replica_id, self._answer, "/tmp", without_arithmetic(num_experts, hidden(kib)))
            self.servers.append(server)
            endpoints += ((f"unix {kib}", dict(server.start())["unix"]),)
        return endpoints

    def run_experts(self, frame: bytes) -> bytes:
        from actors.lanes import wire

        return self._answer([wire.unpack_dispatch(frame)])[0]

    def stop(self) -> None:
        for server in self.servers:
            server.stop()


def hidden(kib: int) -> int:
    return kib * 1024 // TOKENS // 2


def start_echo(groups: int, keys: LaneKeys, kibs: list[int]) -> tuple[Cluster, list[Any]]:
    import ray

    actor = ray.remote(num_cpus=0)(EchoReplica)
    names = [f"echo-{g}" for g in range(groups)]
    handles = [actor.options(name=name, namespace=NAMESPACE).remote(name, keys) for name in names]
    endpoints = ray.get([handle.start.remote(groups, kibs) for handle in handles])
    homes = (tuple((g,) for g in range(groups)),)
    addresses = tuple(ReplicaAddress(name, g, (("object_ref", name), *endpoints[g])) for g, name in enumerate(names))
    return Cluster(ExpertMap(1, groups, homes, addresses), keys), handles


def measure(dispatcher: Any, x_TD: Any, ids_TK: Any, gates_TK: Any, repeat: int) -> list[float]:
    """Seconds of each round trip."""
    taken = []
    for _ in range(repeat):
        started = time.perf_counter()
        dispatcher.exchange(0, x_TD, ids_TK, gates_TK)
        taken.append(time.perf_counter() - started)
    return taken


def main(
    groups: int = 2,
    repeat: int = 2000,
    payloads: Annotated[str, typer.Option(help="KiB of hidden states per group, comma-separated.")] = "4,32,128,512",
    lanes: Annotated[str, typer.Option(help="Comma-separated: object_ref, unix, zmq (ipc), tcp.")] = ",".join(
        ("object_ref", "unix", "zmq", "tcp")
    ),
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure the round trip of dispatch and combine."""
    from deploy.cli.local_ray import own_ray

    keys = LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())
    names, kibs = lanes.split(","), [int(kib) for kib in payloads.split(",")]
    with ExitStack() as stack:
        floors: dict[str, Any] = {
            FLOORS[lane]: stack.enter_context(
                bare_streams(groups) if lane == "unix" else bare_sockets(groups, keys if lane == "tcp" else None)
            )
            for lane in names
            if lane in FLOORS
        }
        stack.enter_context(own_ray())
        from actors.process.limits import limit_threads

        limit_threads(1)
        from cluster.metrics import Metrics

        cluster, handles = start_echo(groups, keys, kibs)
        remotes = {lane: cluster.dispatcher(lane, Metrics()) for lane in names if lane != "unix"}
        figures = []
        for kib in kibs:
            here = {"unix": over_unix(cluster, kib)} if "unix" in names else {}
            figures += run(remotes | here | floors, kib, groups, repeat)
            for remote in here.values():
                remote.lane.close()
        for remote in remotes.values():
            remote.lane.close()
        import ray

        ray.get([handle.stop.remote() for handle in handles])
    columns = ("payload", "lane", "p50 us", "p95 us", "p99 us", "p50 of floor", "aim")
    table(columns, [_row(f, figures) for f in figures])
    if out:
        save(out, figures, groups=groups)


def over_unix(cluster: Cluster, kib: int) -> Any:
    """A dispatcher to the loops that answer this payload."""
    from cluster.metrics import Metrics

    expert_map = cluster.expert_map
    replicas = tuple(
        ReplicaAddress(r.replica_id, r.group, (("unix", r.endpoint(f"unix {kib}")),)) for r in expert_map.replicas
    )
    return Cluster(expert_map.with_replicas(replicas), cluster.keys).dispatcher("unix", Metrics())


def run(contenders: dict[str, Any], kib: int, groups: int, repeat: int) -> list[Figure]:
    """Times of one payload. The contenders take turns."""
    import torch

    from actors.lanes import wire

    x_TD = torch.zeros(TOKENS, hidden(kib), dtype=torch.bfloat16)
    ids_TK = torch.arange(TOP_K).remainder(groups).expand(TOKENS, TOP_K).contiguous()
    gates_TK = torch.full((TOKENS, TOP_K), 1 / TOP_K, dtype=torch.bfloat16)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(10):
        for name, contender in contenders.items():
            if isinstance(contender, (BareSockets, BareStreams)):
                contender.body = wire.pack_dispatch(0, x_TD, gates_TK, ids_TK)
            taken[name] += measure(contender, x_TD, ids_TK, gates_TK, max(1, repeat // 10))
    return [_figure(kib, name, seconds) for name, seconds in taken.items()]


def _figure(kib: int, name: str, seconds: list[float]) -> Figure:
    cuts = statistics.quantiles(seconds, n=100)
    p50, p95, p99 = (1e6 * cuts[q - 1] for q in (50, 95, 99))
    return Figure(kib, name, p50, p95, p99)


def _row(figure: Figure, figures: list[Figure]) -> tuple[str, ...]:
    floors = [f.p50_us for f in figures if f.kib == figure.kib and f.lane == FLOORS.get(figure.lane)]
    numbers = (f"{us:.0f}" for us in (figure.p50_us, figure.p95_us, figure.p99_us))
    of_floor = f"{figure.p50_us / floors[0]:.2f}" if floors else ""
    return f"{figure.kib} KiB", figure.lane, *numbers, of_floor, _aims(figure, figures)


def _aims(figure: Figure, figures: list[Figure]) -> str:
    """What is aimed at, beside what is so."""
    p50 = {f.lane: f.p50_us for f in figures if f.kib == figure.kib}
    aims = AIMS.get(figure.lane, ()) if figure.kib == AIM_KIB else ()
    return ", ".join(f"{figure.p50_us / p50[other]:.2f} of {other}, aim {aim:g}" for other, aim in aims if other in p50)


if __name__ == "__main__":
    typer.run(main)
