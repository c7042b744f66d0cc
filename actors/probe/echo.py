"""Replicas that only answer, in processes of their own, and what a round trip to them takes: the lanes as they are."""

import multiprocessing
import multiprocessing.connection
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
import zmq

from actors.dispatch.express import ExpressDispatcher
from actors.dispatch.remote import RemoteDispatcher
from actors.kernels import native
from actors.kernels.serving import NativeServing, Shape
from actors.lanes import wire
from actors.lanes.unix_client import UnixLane
from actors.lanes.unix_server import UnixServer
from actors.lanes.zmq_client import ZmqLane
from actors.lanes.zmq_server import ZmqServer
from actors.probe.stopwatch import usual_seconds
from cluster.expert_map import ExpertMap, ReplicaAddress
from cluster.messages.actors import LaneKeys
from cluster.metrics import Metrics
from cluster.planning.hardware import LaneSpeed

TOP_K = 8
HIDDEN = 1024
FEW, MANY = 8, 512  # tokens
GROUPS = 2


def without_arithmetic(num_experts: int, hidden_size: int) -> NativeServing | None:
    """The native loop with experts that are said to be here and have no weights: what they yield is zero."""
    if not native.instruction_sets():
        return None
    gate_up, down = torch.empty(0, 2, hidden_size).bfloat16(), torch.empty(0, hidden_size, 1).bfloat16()
    nothing = native.NativeExperts.of(gate_up, down, native.fastest())
    serving = NativeServing(Shape(1, num_experts, hidden_size, TOP_K), nothing, (1.0,))
    serving.set_layer(0, range(num_experts), nothing)
    return serving


def echo(dispatches: list[wire.Dispatch]) -> list[bytes]:
    """The hidden states themselves."""
    return [wire.pack_partial(dispatch.x_TD, 0.0) for dispatch in dispatches]


def lane_speeds(budget_s: float) -> dict[Literal["unix", "zmq"], LaneSpeed]:
    """Of both lanes over sockets: between the hosts of a cluster, zmq also waits for the network, which is not here."""
    with _replicas() as (keys, endpoints):
        return {
            "unix": _speed(ExpressDispatcher(UnixLane(), Metrics()), endpoints, ("unix",), budget_s / 2),
            "zmq": _speed(RemoteDispatcher(ZmqLane(keys), Metrics()), endpoints, ("tcp",), budget_s / 2),
        }


def _speed(
    remote: RemoteDispatcher, endpoints: list[dict[str, str]], kinds: tuple[str, ...], budget_s: float
) -> LaneSpeed:
    homes = (tuple((group,) for group in range(GROUPS)),)
    addresses = tuple(
        ReplicaAddress(f"echo-{group}", group, tuple((kind, found[kind]) for kind in kinds))
        for group, found in enumerate(endpoints)
    )
    remote.set_map(ExpertMap(1, GROUPS, homes, addresses))
    one, both = (_seconds(remote, FEW, groups, budget_s / 3) for groups in (1, GROUPS))
    many = _seconds(remote, MANY, GROUPS, budget_s / 3)
    remote.lane.close()
    message = 2 * HIDDEN * 2 + TOP_K * 4
    speed = max(1e-3, (MANY - FEW) * GROUPS * message / max(many - both, 1e-9) / 1e9)
    first = one - FEW * message / speed / 1e9
    hop = both - one - FEW * message / speed / 1e9
    return LaneSpeed(round_trip_us=max(1.0, 1e6 * first), hop_us=max(0.0, 1e6 * hop), gb_per_second=speed)


def _seconds(remote: RemoteDispatcher, tokens: int, groups: int, budget_s: float) -> float:
    """Of a dispatch to so many groups and its combine."""
    x_TD = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    ids_TK = torch.arange(TOP_K).remainder(groups).expand(tokens, TOP_K).contiguous()
    gates_TK = torch.full((tokens, TOP_K), 1 / TOP_K, dtype=torch.bfloat16)
    return usual_seconds(lambda: remote.exchange(0, x_TD, ids_TK, gates_TK), budget_s)


@contextmanager
def _replicas() -> Iterator[tuple[LaneKeys, list[dict[str, str]]]]:
    """One for each group; yields where each lane reaches them."""
    spawn = multiprocessing.get_context("spawn")
    keys = LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())
    pipes, processes = [], []
    for group in range(GROUPS):
        ours, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=_serve, args=(f"echo-{group}", keys, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    try:
        yield keys, [pipe.recv() for pipe in pipes]
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            with suppress(OSError):
                pipe.send(None)
            process.join(10)
            process.kill()


def _serve(replica_id: str, keys: LaneKeys, pipe: "multiprocessing.connection.Connection") -> None:
    """Until the other end says so, or is gone."""
    torch.set_num_threads(1)
    servers: list[Any] = [
        UnixServer(replica_id, echo, "/tmp", without_arithmetic(GROUPS, HIDDEN)),
        ZmqServer(replica_id, echo, keys, "127.0.0.1", "/tmp"),
    ]
    pipe.send(dict(endpoint for server in servers for endpoint in server.start()))
    with suppress(EOFError):
        pipe.recv()
    for server in servers:
        server.stop()
