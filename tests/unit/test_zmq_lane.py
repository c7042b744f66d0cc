"""The zmq lane between threads of this process: what it lets in, what it drops, what it notices. No Ray."""

import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq

from actors.lanes import wire
from actors.lanes.lane import LaneError, LaneTimeout
from actors.lanes.zmq_client import HELLO, NUMBER, ZmqLane
from actors.lanes.zmq_server import ZmqServer
from cluster.expert_map import ReplicaAddress
from cluster.messages import LaneKeys

KEYS = LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())
STRANGER = LaneKeys(KEYS.server_public, b"", *zmq.curve_keypair())
X = torch.arange(32.0).view(4, 8)
MESSAGE = wire.pack_dispatch(3, X, torch.ones(4, 2), torch.zeros(4, 2))


class Echo:
    """Answers with x itself, and remembers which dispatches it got together."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, dispatches: list[wire.Dispatch]) -> list[bytes]:
        self.gate.wait(5)
        self.batches.append(len(dispatches))
        return [wire.pack_partial(d.x_TD, 0.0) for d in dispatches]


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def server(echo: Echo, tmp_path: Path) -> Iterator[ZmqServer]:
    server = ZmqServer("r0", echo, KEYS, "127.0.0.1", "/tmp")
    server.endpoints = server.start()  # type: ignore[attr-defined]
    yield server
    server.stop()


Connect = Callable[..., ZmqLane]


def address(server: ZmqServer, kind: str) -> ReplicaAddress:
    endpoints = dict(server.endpoints)  # type: ignore[attr-defined]
    return ReplicaAddress("r0", 0, ((kind, endpoints[kind]),))


@pytest.fixture
def connect(server: ZmqServer) -> Iterator[Connect]:
    lanes = []

    def make(kind: str = "ipc", keys: LaneKeys = KEYS) -> ZmqLane:
        lane = ZmqLane(keys)
        lane.connect([address(server, kind)])
        lanes.append(lane)
        return lane

    yield make
    for lane in lanes:
        lane.close()


def ask(lane: ZmqLane, server: ZmqServer, kind: str = "ipc") -> torch.Tensor:
    answer = wire.unpack_partial(lane.receive([lane.send(address(server, kind), MESSAGE)], 5)[1])
    assert answer.partial_TD is not None
    return answer.partial_TD


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_message_comes_back(server: ZmqServer, connect: Connect, kind: str) -> None:
    assert torch.equal(ask(connect(kind), server, kind), X)


def test_the_ipc_directory_is_private_and_goes_with_the_server(echo: Echo) -> None:
    server = ZmqServer("r0", echo, KEYS, "127.0.0.1", "/tmp")
    path = Path(dict(server.start())["ipc"].removeprefix("ipc://"))
    assert path.parent.stat().st_mode & 0o777 == 0o700
    server.stop()
    assert not path.parent.exists()


def test_answers_out_of_order_find_their_dispatch(server: ZmqServer, connect: Connect) -> None:
    lane = connect()
    tickets = [lane.send(address(server, "ipc"), wire.pack_dispatch(0, X + i, X[:, :2], X[:, :2])) for i in range(5)]
    for i in reversed(range(5)):
        answer = wire.unpack_partial(lane.receive([tickets[i]], 5)[1]).partial_TD
        assert answer is not None
        assert torch.equal(answer, X + i)


def test_fronts_that_wait_for_the_same_layer_share_a_batch(server: ZmqServer, echo: Echo, connect: Connect) -> None:
    lanes = [connect("ipc"), connect("tcp"), connect("ipc")]
    echo.gate.clear()
    blocker = lanes[0].send(address(server, "ipc"), MESSAGE)
    time.sleep(0.2)
    kinds = ["ipc", "tcp", "ipc"]
    tickets = [lane.send(address(server, kind), MESSAGE) for lane, kind in zip(lanes, kinds, strict=True)]
    time.sleep(0.2)
    echo.gate.set()
    for lane, ticket in zip([lanes[0], *lanes], [blocker, *tickets], strict=True):
        assert wire.unpack_partial(lane.receive([ticket], 5)[1]).status == wire.OK
    assert echo.batches == [1, 3]


def test_a_stranger_with_another_key_is_not_let_in(server: ZmqServer, connect: Connect) -> None:
    lane = connect("tcp", STRANGER)
    assert not lane.is_connected("r0")
    with pytest.raises(LaneError, match="not connected"):
        lane.send(address(server, "tcp"), MESSAGE)


def test_a_replica_that_does_not_shake_hands_is_not_connected(tmp_path: Path) -> None:
    lane = ZmqLane(KEYS)
    lane.connect([ReplicaAddress("r0", 0, (("tcp", "tcp://127.0.0.1:9"),)), ReplicaAddress("r1", 0, ())])
    assert not lane.is_connected("r0")
    assert not lane.is_connected("r1")
    lane.close()


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"short", MESSAGE],
        [NUMBER.pack(1)],
        [NUMBER.pack(1), MESSAGE, b"extra"],
        [NUMBER.pack(1), b""],
        [NUMBER.pack(1), MESSAGE[:-3]],
        [NUMBER.pack(1), b"\xff" * 1000],
    ],
)
def test_garbage_is_dropped_and_counted_and_others_are_served(
    server: ZmqServer, connect: Connect, frames: list[bytes]
) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(address(server, "ipc").endpoint("ipc"))
    socket.send_multipart(frames)
    socket.send_multipart([NUMBER.pack(2), HELLO])
    assert socket.recv_multipart() == [NUMBER.pack(2), b"r0"]
    assert server.num_dropped == 1
    assert torch.equal(ask(connect(), server), X)
    socket.close()
    context.term()


def test_plain_tcp_and_raw_bytes_do_no_harm(server: ZmqServer, connect: Connect) -> None:
    host, port = address(server, "tcp").endpoint("tcp").removeprefix("tcp://").split(":")
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b""):
        with sockets.create_connection((host, int(port))) as raw:
            raw.sendall(junk)
    context = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.linger = 0
    plain.connect(f"tcp://{host}:{port}")
    plain.send_multipart([NUMBER.pack(1), HELLO])
    assert not plain.poll(500), "a peer without CURVE gets no answer"
    plain.close()
    context.term()
    assert torch.equal(ask(connect("tcp"), server, "tcp"), X)


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_lost_connection_is_noticed_at_once(echo: Echo, kind: str) -> None:
    server = ZmqServer("r0", echo, KEYS, "127.0.0.1", "/tmp")
    server.endpoints = server.start()  # type: ignore[attr-defined]
    target = address(server, kind)
    lane = ZmqLane(KEYS)
    lane.connect([target])
    echo.gate.clear()
    ticket = lane.send(target, MESSAGE)
    threading.Timer(0.3, lambda: (echo.gate.set(), server.stop())).start()
    started = time.monotonic()

    def ask_for_ever() -> None:
        lane.receive([ticket], 30)
        while True:
            lane.receive([lane.send(target, MESSAGE)], 30)

    with pytest.raises(LaneError, match=r"disconnected|not connected"):
        ask_for_ever()
    assert time.monotonic() - started < 20, "the time-out of 30 s must not be needed"
    assert not lane.is_connected("r0")
    lane.close()


def test_a_late_answer_is_ignored(server: ZmqServer, echo: Echo, connect: Connect) -> None:
    lane = connect()
    echo.gate.clear()
    ticket = lane.send(address(server, "ipc"), MESSAGE)
    with pytest.raises(LaneTimeout, match=r"no answer within 0\.2"):
        lane.receive([ticket], 0.2)
    lane.forget(ticket)
    echo.gate.set()
    assert torch.equal(ask(lane, server), X)


def test_without_time_left_an_answer_that_has_come_still_counts(server: ZmqServer, connect: Connect) -> None:
    """The wait for an earlier part, or for another micro-batch, has used the time of this one up."""
    lane = connect()
    ticket = lane.send(address(server, "ipc"), MESSAGE)
    assert lane._links["r0"].socket.poll(5000), "the answer has come"
    assert lane.receive([ticket], 0.0)[0] == ticket
    with pytest.raises(LaneTimeout):
        lane.receive([ticket], 0.0)


def test_the_first_of_several_replicas_to_answer_wins(server: ZmqServer, echo: Echo, connect: Connect) -> None:
    """Hedging: the same dispatch to a replica that hangs and to one that does not."""
    other = ZmqServer("r1", Echo(), KEYS, "127.0.0.1", "/tmp")
    second = ReplicaAddress("r1", 0, tuple(e for e in other.start() if e[0] == "ipc"))
    lane = connect()
    lane.connect([address(server, "ipc"), second])
    echo.gate.clear()
    slow, fast = lane.send(address(server, "ipc"), MESSAGE), lane.send(second, MESSAGE)
    assert lane.receive([slow, fast], 5)[0] == fast
    echo.gate.set()
    assert lane.receive([slow], 5)[0] == slow
    other.stop()


def test_a_probe_is_answered_when_the_replica_is_free_again(server: ZmqServer, echo: Echo, connect: Connect) -> None:
    lane = connect()
    echo.gate.clear()
    lane.forget(lane.send(address(server, "ipc"), MESSAGE))
    time.sleep(0.2)  # now the server computes; a greeting that came with the message would be answered before it
    probe = lane.probe(address(server, "ipc"))
    time.sleep(0.2)
    assert not lane.is_alive(probe)
    echo.gate.set()
    deadline = time.monotonic() + 5
    while not lane.is_alive(probe):
        assert time.monotonic() < deadline
        time.sleep(0.01)
