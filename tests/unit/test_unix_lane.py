"""The unix lane between threads of this process: what it lets in, what it drops, what it notices. No Ray."""

import contextlib
import os
import random
import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from actors.kernels import native
from actors.kernels.heads import FRAME, MAX_MESSAGE
from actors.kernels.native import NativeExperts
from actors.kernels.serving import NativeServing, Shape
from actors.lanes import wire
from actors.lanes.auto import AutoLane
from actors.lanes.lane import LaneError, LaneTimeout
from actors.lanes.links import HELLO
from actors.lanes.stream import MAX_PATH, Stream
from actors.lanes.unix_client import UnixLane, UnixLink
from actors.lanes.unix_peers import Peers
from actors.lanes.unix_server import UnixServer
from cluster.expert_map import ReplicaAddress
from tests.unit.test_zmq_lane import MESSAGE, Echo, Everywhere, X, echo  # noqa: F401 - a fixture

LARGE = torch.randn(512, 1024)
# Many times what a socket holds.
LARGE_MESSAGE = wire.pack_dispatch(1, LARGE, torch.ones(512, 2), torch.zeros(512, 2))


class Running:
    """A server and where it is."""

    def __init__(self, name: str, compute: Echo, serving: NativeServing | None = None) -> None:
        self.server = UnixServer(name, compute, "/tmp", serving)
        self.address = ReplicaAddress(name, 0, self.server.start())
        self.path = self.address.endpoint("unix")

    def raw(self) -> sockets.socket:
        """A connection that may send anything."""
        raw = sockets.socket(sockets.AF_UNIX)
        raw.settimeout(5)
        raw.connect(self.path)
        return raw


def stranger() -> NativeServing:
    """The native loop of a model that no message here fits: all that it does is to tell frames apart."""
    rows = torch.randn(1, 2, 32).bfloat16()
    kind = NativeExperts.of(rows, rows[:, :, :1].transpose(1, 2).repeat(1, 32, 1)[:, :32], native.fastest())
    return NativeServing(Shape(1, 1, 32, 1), kind, (0.1,))


@pytest.fixture(params=["python", "native"])
def running(request: pytest.FixtureRequest, echo: Echo) -> Iterator[Running]:  # noqa: F811
    if request.param == "native" and not native.instruction_sets():
        pytest.skip("no native kernels here")
    running = Running("r0", echo, stranger() if request.param == "native" else None)
    yield running
    running.server.stop()


@pytest.fixture
def connect(running: Running) -> Iterator[Callable[[], UnixLane]]:
    lanes = []

    def make() -> UnixLane:
        lane = UnixLane()
        lane.connect([running.address])
        lanes.append(lane)
        return lane

    yield make
    for lane in lanes:
        lane.close()


Connect = Callable[[], UnixLane]


def answered(lane: UnixLane, running: Running, message: bytes = MESSAGE) -> torch.Tensor:
    answer = wire.unpack_partial(lane.receive([lane.send(running.address, message)], 5)[1])
    assert answer.partial_TD is not None
    return answer.partial_TD


def hang_up(lane: UnixLane) -> None:
    """As if the replica had."""
    lane._links["r0"].socket.socket.shutdown(sockets.SHUT_RDWR)


def frame(number: int, body: bytes) -> bytes:
    return FRAME.layout.pack(number, len(body)) + body


def read(raw: sockets.socket, length: int) -> bytes:
    parts = []
    while length:
        parts.append(raw.recv(length))
        length -= len(parts[-1])
    return b"".join(parts)


def read_frame(raw: sockets.socket) -> tuple[int, bytes]:
    number, length = FRAME.layout.unpack(read(raw, FRAME.layout.size))
    return number, read(raw, length)


@pytest.mark.parametrize(("message", "x"), [(MESSAGE, X), (LARGE_MESSAGE, LARGE)])
def test_a_message_comes_back(running: Running, connect: Connect, message: bytes, x: torch.Tensor) -> None:
    lane = connect()
    for _ in range(3):
        assert torch.equal(answered(lane, running, message), x)


def test_the_directory_is_private_and_goes_with_the_server(echo: Echo) -> None:  # noqa: F811
    running = Running("r0", echo)
    directory = Path(running.path).parent
    assert directory.stat().st_mode & 0o777 == 0o700
    assert len(running.path) <= MAX_PATH
    running.server.stop()
    assert not directory.exists()


def test_sockets_are_not_inherited_by_programs_that_are_started(running: Running, connect: Connect) -> None:
    lane = connect()
    assert not os.get_inheritable(lane._links["r0"].socket.fileno())
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the list's own is gone
            is_socket = os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
            assert not (is_socket and os.get_inheritable(int(name)))


def test_answers_out_of_order_find_their_dispatch(running: Running, connect: Connect) -> None:
    lane = connect()
    tickets = [lane.send(running.address, wire.pack_dispatch(0, X + i, X[:, :2], X[:, :2])) for i in range(5)]
    for i in reversed(range(5)):
        answer = wire.unpack_partial(lane.receive([tickets[i]], 5)[1]).partial_TD
        assert answer is not None
        assert torch.equal(answer, X + i)


def test_fronts_that_wait_for_the_same_layer_share_a_batch(
    running: Running,
    echo: Echo,  # noqa: F811
    connect: Connect,
) -> None:
    lanes = [connect() for _ in range(3)]
    echo.gate.clear()
    blocker = lanes[0].send(running.address, MESSAGE)
    assert echo.entered.wait(5)
    tickets = [lane.send(running.address, MESSAGE) for lane in lanes]
    echo.gate.set()
    for lane, ticket in zip([lanes[0], *lanes], [blocker, *tickets], strict=True):
        assert wire.unpack_partial(lane.receive([ticket], 5)[1]).status == wire.OK
    # The native loop gathers what it computes itself (test_express.py); the rest comes one by one.
    assert echo.batches == ([1, 3] if isinstance(running.server._peers, Peers) else [1, 1, 1, 1])


@pytest.mark.parametrize("running", ["native"], indirect=True)
def test_fronts_that_ask_for_what_is_out_of_the_ordinary_take_turns(
    running: Running,
    echo: Echo,  # noqa: F811
) -> None:
    """The loop in Python takes in all that has come from everybody before it computes."""
    eager, modest = running.raw(), running.raw()
    for raw in (eager, modest):  # both are let in
        raw.sendall(frame(0, HELLO))
        assert read_frame(raw) == (0, b"r0")
    echo.gate.clear()
    for number in range(20):
        eager.sendall(frame(number, MESSAGE))
    assert echo.entered.wait(5)
    modest.sendall(frame(0, wire.pack_dispatch(0, X.repeat(2, 1), X[:, :2].repeat(2, 1), X[:, :2].repeat(2, 1))))
    echo.gate.set()
    assert read_frame(modest)[0] == 0
    assert echo.num_tokens.index(2 * len(X)) < 3, "before most of the others"


def test_a_message_of_any_pieces_is_put_together_and_greetings_between_are_answered(running: Running) -> None:
    stream = b"".join((frame(1, MESSAGE), frame(2, HELLO), frame(3, LARGE_MESSAGE), frame(4, MESSAGE)))
    shuffle, at = random.Random(0), 0
    raw = running.raw()

    def send() -> None:
        nonlocal at
        while at < len(stream):
            size = shuffle.choice((1, 7, 24, 4096, 300_000))
            raw.sendall(stream[at : at + size])
            at += size

    sender = threading.Thread(target=send)
    sender.start()
    answers = [read_frame(raw) for _ in range(4)]
    sender.join()
    assert [number for number, _ in answers] == [1, 2, 3, 4]
    assert answers[1][1] == b"r0"
    assert [wire.unpack_partial(body).status for _, body in (answers[0], *answers[2:])] == [wire.OK] * 3
    raw.close()


@pytest.mark.parametrize("body", [b"", MESSAGE[:-3], b"\xff" * 1000])
def test_what_is_no_dispatch_is_dropped_and_counted_and_the_connection_stays(running: Running, body: bytes) -> None:
    raw = running.raw()
    raw.sendall(frame(1, body) + frame(2, HELLO))
    assert read_frame(raw) == (2, b"r0")
    assert running.server.num_dropped == 1
    raw.close()


def test_a_frame_that_is_too_long_ends_its_connection_and_others_are_served(running: Running, connect: Connect) -> None:
    lane, raw = connect(), running.raw()
    raw.sendall(FRAME.layout.pack(1, MAX_MESSAGE + 1) + b"x" * 100)
    assert raw.recv(1) == b"", "what comes behind it can't be told apart"
    assert running.server.num_dropped == 1
    assert torch.equal(answered(lane, running), X)


@pytest.mark.parametrize("size", [0, 5, 16, 30, len(MESSAGE) + 15])
def test_a_front_that_goes_in_mid_message_leaves_nothing_behind(running: Running, connect: Connect, size: int) -> None:
    lane, raw = connect(), running.raw()
    raw.sendall(frame(1, MESSAGE)[:size])
    raw.close()
    assert torch.equal(answered(lane, running), X)
    deadline = time.monotonic() + 5
    while running.server._peers.num_connected > 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert running.server.num_dropped == 0


def test_a_front_that_does_not_read_costs_one_answer_and_holds_up_nobody(running: Running, connect: Connect) -> None:
    lane, raw = connect(), running.raw()
    raw.settimeout(0.2)
    with pytest.raises(TimeoutError):  # in the end nothing more is taken
        raw.sendall(b"".join(frame(number, LARGE_MESSAGE) for number in range(20)))
    for _ in range(3):
        assert torch.equal(answered(lane, running), X)
    if isinstance(running.server._peers, Peers):
        kept = [len(stream.unsent) for stream in running.server._peers._streams.values()]
        assert 0 < max(kept) < 2 * len(LARGE_MESSAGE)
    raw.close()


def test_a_replica_that_does_not_read_does_not_block_the_front(
    running: Running,
    echo: Echo,  # noqa: F811
    connect: Connect,
) -> None:
    lane, other = connect(), Running("r1", Echo())
    lane.connect([running.address, other.address])
    echo.gate.clear()
    stuck = [lane.send(running.address, LARGE_MESSAGE) for _ in range(4)]
    assert torch.equal(answered(lane, other, LARGE_MESSAGE), LARGE)
    assert lane._links["r0"].socket.unsent
    with pytest.raises(LaneTimeout):
        lane.receive(stuck, 0.05)
    echo.gate.set()
    assert torch.equal(answered(lane, other, LARGE_MESSAGE), LARGE), "what is owed to another is sent on meanwhile"
    for ticket in stuck:
        assert lane.receive([ticket], 5)[0] == ticket
    other.server.stop()


def test_a_replica_that_ends_is_noticed_at_once(echo: Echo) -> None:  # noqa: F811
    running = Running("r0", echo)
    lane = UnixLane()
    lane.connect([running.address])
    echo.gate.clear()
    ticket = lane.send(running.address, MESSAGE)
    assert echo.entered.wait(5)
    threading.Timer(0.1, lambda: hang_up(lane)).start()
    started = time.monotonic()
    with pytest.raises(LaneError, match="disconnected"):
        lane.receive([ticket], 30)
    assert time.monotonic() - started < 5
    assert not lane.is_connected("r0")
    echo.gate.set()
    lane.close()
    running.server.stop()


def test_a_late_answer_is_ignored(running: Running, echo: Echo, connect: Connect) -> None:  # noqa: F811
    lane = connect()
    echo.gate.clear()
    ticket = lane.send(running.address, MESSAGE)
    with pytest.raises(LaneTimeout, match=r"no answer within 0\.2"):
        lane.receive([ticket], 0.2)
    lane.forget(ticket)
    echo.gate.set()
    assert torch.equal(answered(lane, running), X)


def test_a_lost_connection_comes_back_by_a_probe_and_only_to_the_replica_itself(
    running: Running, connect: Connect
) -> None:
    lane, impostor = connect(), Running("r1", Echo())
    hang_up(lane)
    lane._ready([lane._links["r0"]], 5)
    with pytest.raises(LaneError, match="disconnected"):
        answered(lane, running)
    elsewhere = ReplicaAddress("r0", 0, (("unix", impostor.path),))
    for address, is_it in ((elsewhere, False), (running.address, True)):
        ticket = lane.probe(address)
        lane._ready([lane._links["r0"]], 5)
        assert lane.is_alive(ticket) == is_it
    assert torch.equal(answered(lane, running), X)
    impostor.server.stop()


def test_a_socket_whose_owner_was_killed_and_a_path_that_is_none_are_not_connected(tmp_path: Path) -> None:
    stale = sockets.socket(sockets.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    lane = UnixLane()
    lane.connect([ReplicaAddress("r0", 0, (("unix", str(tmp_path / "stale")),)), ReplicaAddress("r1", 0, ())])
    assert not lane.is_connected("r0")
    assert not lane.is_connected("r1")
    lane.close()


def test_a_process_of_another_user_is_not_let_in(
    running: Running, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.lanes.stream.Stream.peer_uid", lambda self: os.geteuid() + 1)
    raw = running.raw()
    assert raw.recv(1) == b""
    lane = connect()
    assert not lane.is_connected("r0"), "nor does a front talk to one"


def test_auto_goes_over_unix_on_this_host(running: Running) -> None:
    lane = AutoLane((UnixLane(),), Everywhere())
    elsewhere = ReplicaAddress("r1", 0, (("unix", "/somewhere/else"),))
    lane.connect([running.address, elsewhere])
    assert [lane.name_for(replica) for replica in (running.address, elsewhere)] == ["unix", "everywhere"]
    ticket, _ = lane.receive([lane.send(running.address, MESSAGE)], 5)
    assert ticket[0] is lane.fast[0]
    lane.close()


def test_what_a_replica_has_not_taken_is_sent_on_by_the_thread_that_exchanges() -> None:
    """While another thread shakes hands, a stream must not be written twice."""
    ours, theirs = sockets.socketpair()
    lane, link = UnixLane(), UnixLink(Stream(ours), "")
    link.is_connected = True
    lane._links["expert-g0-r0"] = link
    link.socket.unsent += b"abc"
    assert lane._ready([], 0) == []
    assert link.socket.unsent == b"abc"
    lane._read([], 0)
    assert not link.socket.unsent
    assert theirs.recv(9) == b"abc"
    link.close()
    theirs.close()
