"""The native way of dispatches against the same in Python: replicas in threads, real sockets, real kernels."""

import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.compute import Compute
from actors.dispatch.dispatcher import Dispatcher
from actors.dispatch.express import ExpressDispatcher
from actors.dispatch.failover import DEADLINE_FLOOR_S
from actors.dispatch.local import LocalDispatcher
from actors.dispatch.remote import RemoteDispatcher
from actors.dispatch.step import Step
from actors.experts.fallback import CheckpointExperts
from actors.experts.loading import load_experts, read_layer_experts
from actors.experts.store import ExpertStore
from actors.kernels import native
from actors.kernels.heads import FRAME
from actors.lanes import wire
from actors.lanes.step_id import StepId
from actors.lanes.unix_client import UnixLane
from actors.lanes.unix_server import UnixServer
from actors.replica.replica import Replica
from actors.weights import Weights
from cluster.expert_map import ExpertMap, ReplicaAddress, contiguous_homes
from cluster.messages.actors import ReplicaSpec
from cluster.messages.requests import SamplingParams
from cluster.metrics import Metrics
from cluster.models.checkpoint import Checkpoint
from tests.checkpoints import MODELS, write_checkpoint
from tests.engines import make_engine, run

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="no native kernels here: not built, or no AVX2")

DTYPES = ("float32", "bfloat16")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
REQUESTS = {str(n): ([(11 * i + 5 * n) % 250 for i in range(length)], GREEDY) for n, length in enumerate((6, 19, 1))}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("model"))


@dataclass
class Group:
    """Replicas of one group in threads of this process."""

    name: str
    replica: Replica
    server: UnixServer
    address: ReplicaAddress


@dataclass
class Groups:
    """Replicas by model, group and number; all end with the test."""

    model_dir: Path
    dtype: str
    running: list[Group] = field(default_factory=list)

    @property
    def weights(self) -> Weights:
        return Weights(Checkpoint.open(self.model_dir), Compute.choose("cpu", self.dtype))

    def start(self, num_groups: int, num_replicas: int = 1, *, is_native: bool = True) -> ExpertMap:
        spec = self.weights.spec
        expert_map = ExpertMap(0, num_groups, contiguous_homes(spec.num_layers, spec.num_experts, num_groups))
        here = [self._one(expert_map, g, r, is_native) for g in range(num_groups) for r in range(num_replicas)]
        self.running += here
        return expert_map.with_replicas(tuple(one.address for one in here))

    def _one(self, expert_map: ExpertMap, group: int, number: int, is_native: bool) -> Group:
        name, weights = f"expert-g{group}-r{number}", self.weights
        held = expert_map.experts_of(group)
        spec = ReplicaSpec(name, group, str(self.model_dir), "cpu", self.dtype, held, 1)
        read = lambda layer, ids: read_layer_experts(weights, layer, ids)  # noqa: E731
        replica = Replica(spec, load_experts(weights, held), read, Metrics())
        server = UnixServer(name, replica.answer_batch, "/tmp", replica.serving if is_native else None)
        return Group(name, replica, server, ReplicaAddress(name, group, server.start()))

    def local(self) -> ExpertStore:
        weights = self.weights
        return load_experts(weights, weights.checkpoint.all_experts)

    def fallback(self) -> CheckpointExperts:
        return CheckpointExperts(self.weights)


native_only = pytest.mark.parametrize("groups", ["bfloat16"], indirect=True)


@pytest.fixture(params=DTYPES)
def groups(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Groups]:
    groups = Groups(model_dir, request.param)
    yield groups
    for one in groups.running:
        one.server.stop()


Connect = Callable[..., RemoteDispatcher]


@pytest.fixture
def connect() -> Iterator[Connect]:
    made: list[RemoteDispatcher] = []

    def make(
        expert_map: ExpertMap, kind: type[RemoteDispatcher] = ExpressDispatcher, **options: object
    ) -> RemoteDispatcher:
        made.append(kind(UnixLane(), Metrics(), **options))
        made[-1].set_map(expert_map)
        return made[-1]

    yield make
    for dispatcher in made:
        dispatcher.lane.close()


def tokens(model_dir: Path, dtype: str, dispatcher: Dispatcher) -> list[list[int]]:
    results = run(make_engine(model_dir, dispatcher=dispatcher, budget=16, dtype=dtype), REQUESTS)
    return [result.token_ids for result in results.values()]


def message(groups: Groups, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    spec, generator = groups.weights.spec, torch.Generator().manual_seed(seed)
    dtype = groups.weights.compute.dtype
    x_TD = torch.randn(num_tokens, spec.hidden_size, generator=generator).to(dtype)
    order = torch.rand(num_tokens, spec.num_experts, generator=generator).argsort(1)
    return x_TD, order[:, : spec.top_k].contiguous(), torch.rand(num_tokens, spec.top_k, generator=generator).to(dtype)


def went_native(dispatcher: RemoteDispatcher) -> bool:
    return isinstance(dispatcher, ExpressDispatcher) and dispatcher._native is not None


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("is_native", [True, False], ids=["native replica", "replica in Python"])
def test_partial_sums_are_the_same_bits_with_and_without_the_native_way(
    groups: Groups, connect: Connect, num_groups: int, is_native: bool
) -> None:
    expert_map = groups.start(num_groups, is_native=is_native)
    express, plain = connect(expert_map), connect(expert_map, RemoteDispatcher)
    for num_tokens in (1, 2, 7, 200):
        for layer in range(groups.weights.spec.num_layers):
            routed = message(groups, num_tokens, layer)
            assert torch.equal(express.exchange(layer, *routed), plain.exchange(layer, *routed))
    assert went_native(express)
    assert express.step.compute_seconds > 0
    for one in groups.running:
        assert one.replica.num_tokens > 0


def test_tokens_are_those_of_all_experts_in_one_process(groups: Groups, connect: Connect) -> None:
    expected = tokens(groups.model_dir, groups.dtype, LocalDispatcher(groups.local()))
    expert_map = groups.start(1)
    express = connect(expert_map)
    assert tokens(groups.model_dir, groups.dtype, express) == expected
    assert went_native(express)
    if groups.dtype == "float32":  # with bfloat16 partial sums are rounded once per group
        assert tokens(groups.model_dir, groups.dtype, connect(groups.start(2))) == expected


def test_a_whole_step_counts_and_routes_as_layers_one_by_one(groups: Groups, connect: Connect) -> None:
    expert_map = groups.start(2)
    engines = [
        make_engine(groups.model_dir, dispatcher=connect(expert_map, kind), budget=16, dtype=groups.dtype)
        for kind in (ExpressDispatcher, RemoteDispatcher)
    ]
    params = SamplingParams(max_tokens=8, temperature=0.0, return_routed_experts=True)
    results = [run(engine, {"a": ([5, 6, 7, 8, 9], params)})["a"] for engine in engines]
    assert results[0].token_ids == results[1].token_ids
    routed = [b"".join(o.routed_experts.data for o in r.outputs if o.routed_experts) for r in results]
    assert routed[0] == routed[1]
    assert torch.equal(engines[0].expert_counts, engines[1].expert_counts)
    assert int(engines[0].expert_counts.sum()) > 0


def samples(metrics: Metrics, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    return {labels: value for sample, labels, value in metrics.samples() if sample == f"outcrop_{name}"}


def test_metrics_are_the_same_as_without(groups: Groups, connect: Connect) -> None:
    expert_map = groups.start(2)
    seen = []
    for kind in (ExpressDispatcher, RemoteDispatcher):
        dispatcher = connect(expert_map, kind)
        tokens(groups.model_dir, groups.dtype, dispatcher)
        dispatcher.publish_counters()
        bytes_ = samples(dispatcher.metrics, "lane_bytes_total")
        seen.append((bytes_, samples(dispatcher.metrics, "dispatch_seconds_count"), +dispatcher._num_sent))
    assert seen[0] == seen[1]
    for one in groups.running:
        one.replica.publish_counters()
        labels = (("group", str(one.replica.spec.group)), ("replica", one.name))
        assert samples(one.replica.metrics, "expert_tokens_total")[labels] == one.replica.num_tokens
        counted = samples(one.replica.metrics, "expert_compute_seconds_count")
        assert counted[(("group", str(one.replica.spec.group)),)] > 0


class OddReplica(threading.Thread):
    """Speaks for itself on a stream socket: greets as a replica does, then does `behave` with the first dispatch."""

    def __init__(self, name: str, path: Path, behave: Callable[["OddReplica", int, bytes], None]) -> None:
        super().__init__(daemon=True)
        self.address = ReplicaAddress(name, 0, (("unix", str(path)),))
        self.behave = behave
        self.go_on = threading.Event()
        self.ended = threading.Event()
        self.listener = sockets.socket(sockets.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.start()

    def run(self) -> None:
        self.front, _ = self.listener.accept()
        number, _ = self.read_frame()
        self.send(number, self.address.replica_id.encode())
        self.behave(self, *self.read_frame())
        self.ended.set()

    def read(self, length: int) -> bytes:
        parts = []
        while length:
            parts.append(self.front.recv(length))
            length -= len(parts[-1])
            if not parts[-1]:
                raise EOFError
        return b"".join(parts)

    def read_frame(self) -> tuple[int, bytes]:
        number, length = FRAME.layout.unpack(self.read(FRAME.layout.size))
        return number, self.read(length)

    def send(self, number: int, body: bytes) -> None:
        self.front.sendall(FRAME.layout.pack(number, len(body)) + body)

    def stop(self) -> None:
        self.go_on.set()
        self.listener.close()
        if hasattr(self, "front"):
            self.front.close()


def partial_of(body: bytes, factor: float = 1.0) -> bytes:
    return wire.pack_partial(wire.unpack_dispatch(body).x_TD * factor, 0.0)


def hang(odd: OddReplica, number: int, body: bytes) -> None:
    odd.go_on.wait(20)


def end(odd: OddReplica, number: int, body: bytes) -> None:
    odd.front.close()


def end_in_mid_answer(odd: OddReplica, number: int, body: bytes) -> None:
    answer = partial_of(body)
    odd.front.sendall(FRAME.layout.pack(number, len(answer)) + answer[: len(answer) // 2])
    odd.front.close()


def stop_in_mid_answer(odd: OddReplica, number: int, body: bytes) -> None:
    answer = partial_of(body)
    odd.front.sendall(FRAME.layout.pack(number, len(answer)) + answer[: len(answer) // 2])
    odd.go_on.wait(20)


def answer_in_nan(odd: OddReplica, number: int, body: bytes) -> None:
    odd.send(number, partial_of(body, float("nan")))


def answer_with_fewer_tokens(odd: OddReplica, number: int, body: bytes) -> None:
    odd.send(number, wire.pack_partial(wire.unpack_dispatch(body).x_TD[1:], 0.0))


def answer_in_another_type(odd: OddReplica, number: int, body: bytes) -> None:
    odd.send(number, wire.pack_partial(wire.unpack_dispatch(body).x_TD.half(), 0.0))


def answer_garbage(odd: OddReplica, number: int, body: bytes) -> None:
    odd.send(number, b"\xff" * 300)


def announce_too_much(odd: OddReplica, number: int, body: bytes) -> None:
    odd.front.sendall(FRAME.layout.pack(number, 1 << 60) + b"x" * 300)
    odd.go_on.wait(20)


def fail(odd: OddReplica, number: int, body: bytes) -> None:
    odd.send(number, wire.pack_refusal(wire.FAILED, "out of memory"))


def answer_another_message_first(odd: OddReplica, number: int, body: bytes) -> None:
    odd.send(number + 5, partial_of(body))
    odd.go_on.wait(20)


ODD = {
    hang: "timeout",
    end: "disconnected",
    end_in_mid_answer: "disconnected",
    stop_in_mid_answer: "timeout",
    answer_in_nan: "corrupt",
    answer_with_fewer_tokens: "corrupt",
    answer_in_another_type: "corrupt",
    answer_garbage: "corrupt",
    announce_too_much: "disconnected",
    fail: "corrupt",
    answer_another_message_first: "timeout",
}


def failovers(dispatcher: RemoteDispatcher) -> dict[str, float]:
    found = samples(dispatcher.metrics, "failovers_total")
    return {dict(labels)["reason"]: value for labels, value in found.items() if value}


def with_first(expert_map: ExpertMap, address: ReplicaAddress) -> ExpertMap:
    """This one is asked first in group 0."""
    return expert_map.with_replicas((address, *expert_map.replicas))


def watched(dispatcher: RemoteDispatcher, step: int = 1) -> Step:
    dispatcher.step = Step(StepId(0, step), ("r",))
    return dispatcher.step


@pytest.mark.parametrize("behave", ODD, ids=lambda behave: behave.__name__)
def test_a_replica_that_is_out_of_the_ordinary_is_given_up_as_without_the_native_way(
    groups: Groups, connect: Connect, tmp_path: Path, behave: Callable[[OddReplica, int, bytes], None]
) -> None:
    expert_map, routed = groups.start(2), message(groups, 7)
    expected = connect(expert_map, RemoteDispatcher).exchange(0, *routed)
    odd = OddReplica("odd", tmp_path / "odd", behave)
    dispatcher = connect(with_first(expert_map, odd.address))
    dispatcher._latency.observe("odd", 7, 0.001)
    step, started = watched(dispatcher), time.monotonic()
    assert torch.equal(dispatcher.exchange(0, *routed), expected)
    assert failovers(dispatcher).get(ODD[behave]) == 1
    assert step.num_failovers == 1
    assert time.monotonic() - started < DEADLINE_FLOOR_S + 1.0
    dispatcher._breaker._due["odd"] = float("inf")  # it is not probed: that is another story
    for number in range(3):
        watched(dispatcher, 2 + number)
        assert torch.equal(dispatcher.exchange(0, *routed), expected)
    assert went_native(dispatcher), "with those that are left"
    assert failovers(dispatcher).get(ODD[behave]) == 1
    assert not any(dispatcher._outstanding.values())
    odd.stop()


def test_a_message_that_is_not_taken_is_handed_over_in_the_middle(
    groups: Groups, connect: Connect, tmp_path: Path
) -> None:
    """The replica that was given up finds the whole of it when it reads on."""
    taken: list[tuple[int, bytes]] = []

    class Slow(OddReplica):
        def run(self) -> None:
            self.front, _ = self.listener.accept()
            number, _ = self.read_frame()
            self.send(number, b"odd")
            self.go_on.wait(20)
            taken.append(self.read_frame())
            self.send(taken[0][0], partial_of(taken[0][1]))
            self.ended.set()

    expert_map, routed = groups.start(2), message(groups, 6_000)
    expected = connect(expert_map, RemoteDispatcher).exchange(0, *routed)
    odd = Slow("odd", tmp_path / "odd", hang)
    dispatcher = connect(with_first(expert_map, odd.address))
    dispatcher._latency.observe("odd", 6_000, 0.001)
    watched(dispatcher)
    assert torch.equal(dispatcher.exchange(0, *routed), expected)
    assert failovers(dispatcher) == {"timeout": 1}
    link = dispatcher.lane._links["odd"]  # type: ignore[attr-defined]
    assert link.socket.unsent
    odd.go_on.set()
    deadline, small = time.monotonic() + 30, message(groups, 3)
    while not odd.ended.is_set() or link.waiting:
        assert time.monotonic() < deadline
        watched(dispatcher)
        assert torch.isfinite(dispatcher.exchange(0, *small)).all()
    (part,) = dispatcher.dispatch(0, *routed).parts[:1]
    assert taken[0][1] == wire.pack_dispatch(0, part.x_PD, part.gates_PK, part.ids_PK, StepId(0, 1))
    odd.stop()


def test_a_step_goes_on_behind_the_layer_that_a_replica_has_ended_in(groups: Groups, connect: Connect) -> None:
    expert_map = groups.start(2, num_replicas=2)
    expected = tokens(groups.model_dir, groups.dtype, connect(expert_map, RemoteDispatcher))
    dispatcher = connect(expert_map)
    victim = groups.running[0]
    engine = make_engine(groups.model_dir, dispatcher=dispatcher, budget=16, dtype=groups.dtype)
    forward, steps = engine.model.forward, []

    def end_before_the_third_step(*arguments: object) -> object:
        steps.append(1)
        if len(steps) == 3:
            victim.server.stop()
        return forward(*arguments)  # type: ignore[arg-type]

    engine.model.forward = end_before_the_third_step  # type: ignore[method-assign, assignment]
    results = run(engine, REQUESTS)
    assert [result.token_ids for result in results.values()] == expected
    assert failovers(dispatcher).get("disconnected") == 1
    groups.running.remove(victim)


def test_experts_that_have_moved_are_found_by_the_next_map(groups: Groups, connect: Connect) -> None:
    expert_map, routed = groups.start(2), message(groups, 7)
    dispatcher = connect(expert_map)
    expected = dispatcher.exchange(0, *routed)
    first, second = groups.running
    everything = tuple(range(groups.weights.spec.num_experts))
    second.replica.set_experts(0, everything)
    first.replica.set_experts(0, ())
    newer = expert_map.with_homes(0, ((1,),) * len(everything))
    threading.Timer(0.2, lambda: dispatcher.set_map(newer)).start()
    moved = dispatcher.exchange(0, *routed)
    torch.testing.assert_close(moved, expected, atol=0.02, rtol=0.05)
    assert failovers(dispatcher).get("not_held") == 1
    torch.testing.assert_close(dispatcher.exchange(0, *routed), expected, atol=0.02, rtol=0.05)
    assert failovers(dispatcher).get("not_held") == 1
    assert went_native(dispatcher)
    for number in range(groups.weights.spec.num_layers - 1):
        assert torch.isfinite(dispatcher.exchange(number + 1, *routed)).all(), "other layers are where they were"


def test_experts_are_exchanged_while_others_are_computed(groups: Groups, connect: Connect) -> None:
    """Under load: nothing is computed by memory that was given back, and every answer is one of the two."""
    expert_map, routed = groups.start(1), message(groups, 7)
    dispatcher = connect(expert_map, fallback=groups.fallback().run)
    expected, (one,) = dispatcher.exchange(0, *routed), groups.running
    everything, is_over = one.replica.store.held[0], threading.Event()

    def exchange() -> None:
        while not is_over.is_set():
            one.replica.set_experts(0, tuple(reversed(everything)))
            one.replica.set_experts(0, everything)

    thread = threading.Thread(target=exchange)
    thread.start()
    for _ in range(300):
        assert torch.equal(dispatcher.exchange(0, *routed), expected)
    is_over.set()
    thread.join()
    assert went_native(dispatcher)


def test_a_replica_that_joins_shares_the_messages_and_one_that_leaves_gets_none(
    groups: Groups, connect: Connect
) -> None:
    both, routed = groups.start(1, num_replicas=2), message(groups, 4)
    alone = both.with_replicas(both.replicas[:1])
    dispatcher = connect(alone)

    def computed(times: int) -> list[int]:
        before = [one.replica.num_tokens for one in groups.running]
        for _ in range(times):
            dispatcher.exchange(0, *routed)
        return [(one.replica.num_tokens - b) // 4 for one, b in zip(groups.running, before, strict=True)]

    assert computed(20) == [20, 0]
    dispatcher.set_map(ExpertMap(7, 1, both.homes, both.replicas))
    assert computed(20) == [10, 10]
    dispatcher.set_map(ExpertMap(8, 1, both.homes, both.replicas[1:]))
    assert computed(20) == [0, 20]
    assert went_native(dispatcher)
    dispatcher.lane.close_retired()
    assert groups.running[0].server._peers.num_connected <= 1


def busy_kernels() -> threading.Thread:
    """One call of the kernels computes at a time: while this one lasts, others wait."""
    nothing = torch.zeros(1 << 31, dtype=torch.uint8)  # pages that are only read take no memory
    busy = threading.Thread(target=lambda: native.loaded().outcrop_read(1, nothing.data_ptr(), len(nothing)))
    busy.start()
    return busy


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@native_only
def test_a_replica_says_since_when_it_computes(groups: Groups, connect: Connect) -> None:
    expert_map = groups.start(1)
    dispatcher, (one,) = connect(expert_map, RemoteDispatcher), groups.running
    assert one.replica.stuck_seconds == 0
    busy = busy_kernels()
    pending = dispatcher.dispatch(0, *message(groups, 3))
    wait_until(lambda: one.replica.stuck_seconds > 0.005)
    busy.join()
    dispatcher.combine(pending)
    wait_until(lambda: one.replica.stuck_seconds == 0)


@native_only
@pytest.mark.parametrize(("num_tokens", "computations"), [(3, 2), (3000, 3)])
def test_fronts_that_wait_for_the_same_layer_share_a_computation(
    groups: Groups, connect: Connect, num_tokens: int, computations: int
) -> None:
    """As many as make sense in one: what is gathered takes memory."""
    expert_map = groups.start(1)
    (one,), fronts = groups.running, [connect(expert_map, RemoteDispatcher) for _ in range(4)]
    expected = [front.exchange(0, *message(groups, num_tokens, number)) for number, front in enumerate(fronts)]
    before = samples_of(one)
    busy = busy_kernels()
    blocker = fronts[0].dispatch(0, *message(groups, 3))
    wait_until(lambda: one.replica.stuck_seconds)
    pending = [front.dispatch(0, *message(groups, num_tokens, number)) for number, front in enumerate(fronts[1:], 1)]
    assert busy.is_alive(), "or they did not have to wait"
    fronts[0].combine(blocker)
    for front, open_, sum_TD in zip(fronts[1:], pending, expected[1:], strict=True):
        assert torch.equal(front.combine(open_), sum_TD), "a token's sum does not depend on the tokens beside it"
    assert samples_of(one) - before == computations


def samples_of(one: Group) -> float:
    """Computations so far."""
    one.replica.publish_counters()
    return sum(samples(one.replica.metrics, "expert_compute_seconds_count").values())
