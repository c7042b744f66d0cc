"""The zmq lane between threads of this process: what it lets in, what it drops, what it notices. No Ray."""

import os
import socket as sockets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from actors.lanes import wire
from actors.lanes.auto import AutoLane
from actors.lanes.lane import Lane, LaneError, LaneTimeout
from actors.lanes.links import HANDSHAKE_S, HELLO, Link
from actors.lanes.server import DIRECTORY
from actors.lanes.zmq_client import ZmqLane
from actors.lanes.zmq_link import NUMBER, new_socket
from actors.lanes.zmq_server import ZmqServer
from cluster.expert_map import ReplicaAddress
from cluster.leftovers import OwnedDirectory
from cluster.messages.actors import LaneKeys

KEYS = LaneKeys(*zmq.curve_keypair(), *zmq.curve_keypair())
STRANGER = LaneKeys(KEYS.server_public, b"", *zmq.curve_keypair())
X = torch.arange(32.0).view(4, 8)
MESSAGE = wire.pack_dispatch(3, X, torch.ones(4, 2), torch.zeros(4, 2))


class Echo:
    """Answers with x itself, and remembers which dispatches it got together."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.num_tokens: list[int] = []  # of each dispatch
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, dispatches: list[wire.Dispatch]) -> list[bytes]:
        self.entered.set()
        self.gate.wait(5)
        self.batches.append(len(dispatches))
        self.num_tokens += [len(d.x_TD) for d in dispatches]
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


def test_the_directory_of_a_killed_replica_goes_with_the_next_one(echo: Echo, tmp_path: Path) -> None:
    killed = OwnedDirectory(DIRECTORY, str(tmp_path))
    other = ZmqServer("r0", echo, KEYS, "127.0.0.1", str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2, "its owner lives"
    assert killed._lock
    os.close(killed._lock)  # what the kernel does when the owner ends
    ZmqServer("r1", echo, KEYS, "127.0.0.1", str(tmp_path))
    assert not Path(killed.path).exists()
    assert Path(other._directory.path).exists()


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
    assert echo.entered.wait(5)
    kinds = ["ipc", "tcp", "ipc"]
    tickets = [lane.send(address(server, kind), MESSAGE) for lane, kind in zip(lanes, kinds, strict=True)]
    time.sleep(1.0)  # on their way, by threads of their own
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

    def ask_for_ever() -> None:
        lane.receive([ticket], 30)
        while True:
            lane.receive([lane.send(target, MESSAGE)], 30)

    with pytest.raises(LaneError, match=r"disconnected|not connected"):  # not "no answer within 30 s"
        ask_for_ever()
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


def test_without_time_left_an_answer_that_has_come_still_counts(
    server: ZmqServer, echo: Echo, connect: Connect
) -> None:
    """The wait for an earlier part has used the time of this one up."""
    lane = connect()
    ticket = lane.send(address(server, "ipc"), MESSAGE)
    assert lane._links["r0"].socket.poll(5000), "the answer has come"
    assert lane.receive([ticket], 0.0)[0] == ticket
    echo.gate.clear()
    with pytest.raises(LaneTimeout):
        lane.receive([lane.send(address(server, "ipc"), MESSAGE)], 0.0)
    echo.gate.set()


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
    assert echo.entered.wait(5), "a greeting that came with the message would be answered before it"
    probe = lane.probe(address(server, "ipc"))
    time.sleep(0.2)
    assert not lane.is_alive(probe)
    echo.gate.set()
    deadline = time.monotonic() + 5
    while not lane.is_alive(probe):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def lane() -> Iterator[ZmqLane]:
    lane = ZmqLane(KEYS)
    yield lane
    lane.close()


# More than zmq has sockets for if nobody asks for more, at three for each connection.
MANY = 350


class Greeters:
    """Replicas that do nothing but shake hands, each at a path of its own; those without a name don't."""

    def __init__(self, directory: Path, names: list[str]) -> None:
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 4 * MANY)
        self.poller = zmq.Poller()
        self.names: dict[zmq.Socket[bytes], bytes] = {}
        self.silent: list[zmq.Socket[bytes]] = []
        self.replicas: list[ReplicaAddress] = []
        for i, name in enumerate(names):
            socket = self.context.socket(zmq.ROUTER)
            endpoint = f"ipc://{directory}/{i}"
            socket.bind(endpoint)
            self.replicas.append(ReplicaAddress(f"r{i}", 0, (("ipc", endpoint),)))
            if not name:
                self.silent.append(socket)
                continue
            self.names[socket] = name.encode()
            self.poller.register(socket, zmq.POLLIN)
        self.is_over = False
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> "Greeters":
        self.thread.start()
        return self

    def run(self) -> None:
        while not self.is_over:
            for socket, _ in self.poller.poll(50):
                peer, number, body = socket.recv_multipart()
                if body == HELLO:
                    socket.send_multipart([peer, number, self.names[socket]])

    def __exit__(self, *error: object) -> None:
        self.is_over = True
        self.thread.join()
        self.context.destroy(linger=0)


def test_hundreds_of_replicas_shake_hands_side_by_side(lane: ZmqLane, tmp_path: Path) -> None:
    with Greeters(tmp_path, [""] * 20 + [f"r{i}" for i in range(20, MANY)]) as greeters:
        started = time.monotonic()
        lane.connect(greeters.replicas)
        waits = (time.monotonic() - started) / HANDSHAKE_S
        assert waits < 20 / 2, "one wait for all 20 that are silent, not one for each"
        connected = [lane.is_connected(r.replica_id) for r in greeters.replicas]
        assert connected == [False] * 20 + [True] * (MANY - 20)


def test_replicas_for_which_no_socket_is_left_are_left_out(lane: ZmqLane, tmp_path: Path) -> None:
    lane._context.set(zmq.MAX_SOCKETS, 50)
    with Greeters(tmp_path, [f"r{i}" for i in range(80)]) as greeters:
        lane.connect(greeters.replicas)
        assert 40 < sum(lane.is_connected(r.replica_id) for r in greeters.replicas) <= 50
        with pytest.raises(LaneError, match="not connected"):
            lane.send(greeters.replicas[-1], MESSAGE)


def test_a_replica_that_hangs_up_at_once_does_not_keep_others_from_being_connected(
    lane: ZmqLane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_link = lane._open

    def hang_up_on_r0(replica: ReplicaAddress) -> Link | None:
        link = open_link(replica)
        if link and replica.replica_id == "r0":
            link.socket.disconnect(link.endpoint)
        return link

    monkeypatch.setattr(lane, "_open", hang_up_on_r0)
    with Greeters(tmp_path, ["r0", "r1"]) as greeters:
        lane.connect(greeters.replicas)
        assert [lane.is_connected(r.replica_id) for r in greeters.replicas] == [False, True]


def greets(lane: ZmqLane, target: ReplicaAddress) -> bool:
    """Whether a probe is answered well; an answer of any kind comes."""
    ticket = lane.probe(target)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if lane.is_alive(ticket):
            return True
        if ticket.number not in lane._links[target.replica_id].waiting:
            return False
        time.sleep(0.01)
    raise AssertionError("nobody answers")


def test_a_connection_that_was_lost_comes_back_by_a_probe_and_only_to_the_replica_itself(
    lane: ZmqLane, tmp_path: Path
) -> None:
    with Greeters(tmp_path, ["r0"]) as greeters:
        (target,) = greeters.replicas
        lane.connect([target])
        assert lane.is_connected("r0")
        ticket = lane.send(target, MESSAGE)
    with pytest.raises(LaneError, match="disconnected"):
        lane.receive([ticket], 5)
    Path(target.endpoint("ipc").removeprefix("ipc://")).unlink(missing_ok=True)
    with sockets.socket(sockets.AF_UNIX) as successor:
        successor.bind(target.endpoint("ipc").removeprefix("ipc://"))
        successor.listen()
        successor.settimeout(1.0)
        with pytest.raises(TimeoutError):
            successor.accept()
    Path(target.endpoint("ipc").removeprefix("ipc://")).unlink()
    with Greeters(tmp_path, ["r1"]):
        assert not greets(lane, target), "whoever has its port now"
        assert not lane.is_connected("r0")
    with Greeters(tmp_path, ["r0"]):
        assert greets(lane, target)
        lane.send(target, MESSAGE)


def test_a_ticket_of_a_connection_that_was_replaced_is_lost_at_once(lane: ZmqLane, tmp_path: Path) -> None:
    with Greeters(tmp_path, ["r0"]) as greeters:
        (target,) = greeters.replicas
        lane.connect([target])
        ticket = lane.send(target, MESSAGE)
    with pytest.raises(LaneError, match="disconnected"):
        lane.receive([ticket], 5)
    with Greeters(tmp_path, ["r0"]):
        assert greets(lane, target)
        lane.forget(lane.send(target, MESSAGE))  # closes what was lost
        with pytest.raises(LaneError, match="left the map"):
            lane.receive([ticket], 5)


def test_a_connection_that_is_replaced_while_a_map_is_taken_stays(
    lane: ZmqLane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that sends goes on while connect() waits for replicas to shake hands."""
    with Greeters(tmp_path, ["r0"]) as greeters:
        (target,) = greeters.replicas
        lane.connect([target])
        ticket = lane.send(target, MESSAGE)
    probes = []

    def notice_the_loss(new: object) -> None:
        with pytest.raises(LaneError, match="disconnected"):
            lane.receive([ticket], 5)
        probes.append(lane.probe(target))

    with Greeters(tmp_path, ["r0"]):
        monkeypatch.setattr(lane, "_shake_hands", notice_the_loss)
        lane.connect([target])
        assert lane._links["r0"].socket.poll(5000), "the probe is answered"
        assert lane.is_alive(probes[0])
        lane.send(target, MESSAGE)


def test_of_two_connections_that_are_opened_at_a_time_one_is_used_and_one_closed(
    lane: ZmqLane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links: list[Link] = []

    def probe_as_well(new: dict[str, Link]) -> None:
        lane.probe(target)
        links.extend([new["r0"], lane._links["r0"]])

    with Greeters(tmp_path, ["r0"]) as greeters:
        (target,) = greeters.replicas
        monkeypatch.setattr(lane, "_shake_hands", probe_as_well)
        lane.connect([target])
    assert [link.socket.closed for link in links] == [True, False]
    assert lane._links == {"r0": links[1]}


def test_a_socket_that_is_closed_counts_as_a_lost_connection(server: ZmqServer, connect: Connect) -> None:
    lane = connect()
    ticket = lane.send(address(server, "ipc"), MESSAGE)
    lane._links["r0"].close()
    with pytest.raises(LaneError, match="disconnected"):
        lane.receive([ticket], 5)
    lane._links["r0"].take_in()
    assert not lane.is_connected("r0")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[zmq.Socket[bytes]]:
    """All sockets that lanes open."""
    sockets: list[zmq.Socket[bytes]] = []

    def remember(*where: Any) -> zmq.Socket[bytes]:
        sockets.append(new_socket(*where))
        return sockets[-1]

    monkeypatch.setattr("actors.lanes.zmq_client.new_socket", remember)
    return sockets


def num_open(opened: list[zmq.Socket[bytes]]) -> int:
    return sum(not socket.closed for socket in opened)


def test_maps_and_probes_in_vain_leave_no_sockets_behind(
    lane: ZmqLane, tmp_path: Path, opened: list[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent over zmq meanwhile: all replicas are given up, or reached by another lane."""
    monkeypatch.setattr("actors.lanes.links.HANDSHAKE_S", 0.01)
    with Greeters(tmp_path, [""]) as silent:
        for _ in range(5):
            lane.connect(silent.replicas)
        assert (len(opened), num_open(opened)) == (5, 0)
        for _ in range(5):
            lane.probe(silent.replicas[0])
        assert (len(opened), num_open(opened)) == (10, 2), "the last, and the one that it replaced"


class Everywhere(Lane):
    """Reaches every replica, and nobody answers."""

    name = "everywhere"

    replicas: tuple[ReplicaAddress, ...] = ()

    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        self.replicas = tuple(replicas)

    def send(self, replica: ReplicaAddress, message: bytes) -> object:
        return object()

    def receive(self, tickets: Sequence[object], timeout_s: float) -> tuple[object, bytes]:
        raise LaneTimeout("nobody answers")

    def forget(self, ticket: object) -> None:
        pass

    def probe(self, replica: ReplicaAddress) -> object:
        return object()

    def is_alive(self, ticket: object) -> bool:
        return True


def test_auto_probes_over_the_lane_that_gets_through_and_returns_to_zmq_when_that_does(
    lane: ZmqLane, tmp_path: Path
) -> None:
    auto = AutoLane((lane,), Everywhere())
    with Greeters(tmp_path, ["someone else"]) as greeters:
        (target,) = greeters.replicas
        auto.connect([target])
        assert auto.name_for(target) == "everywhere"
        assert auto.is_alive(auto.probe(target)), "or it would never be used again"
        auto.send(target, MESSAGE)
        assert auto.name_for(target) == "everywhere"
    with Greeters(tmp_path, ["r0"]):
        auto.probe(target)
        deadline = time.monotonic() + 5
        while auto.name_for(target) != "zmq":
            assert time.monotonic() < deadline
            auto.send(target, MESSAGE)


def test_auto_greets_again_though_nobody_probes(lane: ZmqLane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that answers over the other lane is not given up, so that nobody has a reason to probe it."""
    monkeypatch.setattr("actors.lanes.auto.GREET_AGAIN_S", 0.05)
    auto = AutoLane((lane,), Everywhere())
    with Greeters(tmp_path, ["someone else"]) as greeters:
        (target,) = greeters.replicas
        auto.connect([target])
        auto.send(target, MESSAGE)
        assert auto.name_for(target) == "everywhere"
    with Greeters(tmp_path, ["r0"]):
        deadline = time.monotonic() + 5
        while auto.name_for(target) != "zmq":
            assert time.monotonic() < deadline
            auto.send(target, MESSAGE)


def test_auto_connects_the_other_lane_even_if_zmq_fails(lane: ZmqLane, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(replicas: Iterable[ReplicaAddress]) -> None:
        raise OSError("too many open files")

    auto = AutoLane((lane,), Everywhere())
    monkeypatch.setattr(lane, "connect", fail)
    target = ReplicaAddress("r0", 0, ())
    with pytest.raises(OSError, match="too many open files"):
        auto.connect([target])
    assert auto.fallback.replicas == (target,)  # type: ignore[attr-defined]


def test_auto_closes_connections_to_replicas_that_have_left_whichever_lane_it_uses(
    lane: ZmqLane, tmp_path: Path, opened: list[zmq.Socket[bytes]]
) -> None:
    auto = AutoLane((lane,), Everywhere())
    elsewhere = ReplicaAddress("r1", 0, ())
    with Greeters(tmp_path, ["r0"]) as greeters:
        auto.connect([*greeters.replicas, elsewhere])
        auto.connect([elsewhere])
        assert num_open(opened) == 1, "connect() runs in another thread, and a socket is closed by the one that uses it"
        auto.send(elsewhere, MESSAGE)
        assert num_open(opened) == 0


def test_auto_looks_at_both_lanes_even_without_time_left(server: ZmqServer, connect: Connect) -> None:
    lane = connect()
    auto = AutoLane((lane,), Everywhere())
    target = address(server, "ipc")
    answered = auto.send(target, MESSAGE)
    assert lane._links["r0"].socket.poll(5000), "the answer has come"
    other = (auto.fallback, auto.fallback.send(target, MESSAGE))
    assert auto.receive([other, answered], 0.0)[0] == answered
