"""What the dispatcher does when replicas are late, gone or wrong: a scripted lane, no sockets, no Ray."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from actors.dispatch.dispatcher import DispatchError
from actors.dispatch.failover import (
    DEADLINE_FACTOR,
    DEADLINE_FLOOR_S,
    FIRST_DEADLINE_S,
    GUESSED_DEADLINE_S,
    HEDGE_BURST,
    HEDGE_SHARE,
    RELAPSE_S,
    REPROBE_S,
    Breaker,
    HedgeBudget,
    Latency,
)
from actors.dispatch.remote import RemoteDispatcher
from actors.dispatch.routes import MAP_WAIT_S
from actors.dispatch.step import Step
from actors.lanes import wire
from actors.lanes.lane import Lane, LaneError, LaneTimeout
from actors.lanes.step_id import StepId
from cluster.expert_map import ExpertMap, ReplicaAddress, contiguous_homes
from cluster.metrics import Metrics

X = torch.arange(12.0).view(3, 4)
IDS = torch.tensor([[0, 3], [1, 2], [0, 1]])  # experts 0, 1: group 0; 2, 3: group 1
GATES = torch.ones(3, 2)


def echo(frame: bytes) -> bytes:
    """A replica whose partial sum is the number of choices that it was given, times x."""
    dispatch = wire.unpack_dispatch(frame)
    weight = (dispatch.ids_TK >= 0).sum(dim=1, keepdim=True)
    return wire.pack_partial(dispatch.x_TD * weight, 0.0)


EXPECTED = 2 * X


@dataclass(eq=False)
class Ticket:
    replica: str
    frame: bytes


Behaviour = Callable[[bytes], bytes]


class ScriptedLane(Lane):
    """`behaviour[replica]` computes an answer; None hangs; an exception is a lost connection."""

    name = "scripted"

    def __init__(self, **behaviour: Behaviour | type[Exception] | None) -> None:
        self.behaviour = behaviour
        self.sent: list[str] = []
        self.forgotten: list[Ticket] = []

    def connect(self, replicas: Iterable[ReplicaAddress]) -> None:
        self.replicas = {r.replica_id for r in replicas}

    def send(self, replica: ReplicaAddress, message: bytes) -> Ticket:
        if replica.replica_id not in self.behaviour:
            raise LaneError("unreachable")
        self.sent.append(replica.replica_id)
        return Ticket(replica.replica_id, message)

    def receive(self, tickets: Sequence[Ticket], timeout_s: float) -> tuple[Ticket, bytes]:
        for ticket in tickets:
            behaviour = self.behaviour[ticket.replica]
            if isinstance(behaviour, type):
                raise LaneError("disconnected", ticket)
            if behaviour is not None:
                return ticket, behaviour(ticket.frame)
        raise LaneTimeout("late")

    def forget(self, ticket: Ticket) -> None:
        self.forgotten.append(ticket)

    def probe(self, replica: ReplicaAddress) -> Ticket:
        return Ticket(replica.replica_id, b"")

    def is_alive(self, ticket: Ticket) -> bool:
        return callable(self.behaviour[ticket.replica]) and not isinstance(self.behaviour[ticket.replica], type)


def make(lane: ScriptedLane, fallback: bool = False) -> RemoteDispatcher:
    """Replicas a and b serve group 0, c and d group 1."""
    computed_here = (lambda layer, x, ids, gates: x * (ids >= 0).sum(1, keepdim=True)) if fallback else None
    dispatcher = RemoteDispatcher(lane, Metrics(), computed_here)
    replicas = tuple(ReplicaAddress(r, g, ((lane.name, r),)) for r, g in (("a", 0), ("b", 0), ("c", 1), ("d", 1)))
    dispatcher.set_map(ExpertMap(1, 2, contiguous_homes(2, 4, 2), replicas))
    return dispatcher


def compute(dispatcher: RemoteDispatcher) -> Tensor:
    return dispatcher.combine(dispatcher.dispatch(0, X, IDS, GATES))


def counted(dispatcher: RemoteDispatcher, name: str) -> dict[str, float]:
    return {
        dict(labels).get("reason", ""): value
        for sample, labels, value in dispatcher.metrics.samples()
        if sample == f"outcrop_{name}" and value
    }


def nan(frame: bytes) -> bytes:
    return wire.pack_partial(wire.unpack_dispatch(frame).x_TD * float("nan"), 0.0)


def wrong_shape(frame: bytes) -> bytes:
    return wire.pack_partial(X[:1], 0.0)


def failed(frame: bytes) -> bytes:
    return wire.pack_refusal(wire.FAILED, "out of memory")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (None, "timeout"),
        (LaneError, "disconnected"),
        (nan, "corrupt"),
        (wrong_shape, "corrupt"),
        (failed, "corrupt"),
        (lambda frame: b"garbage", "corrupt"),
    ],
)
def test_a_part_goes_to_another_replica_and_the_broken_one_is_left_alone(
    broken: Behaviour | type[Exception] | None, reason: str
) -> None:
    lane = ScriptedLane(a=broken, b=echo, c=echo, d=echo)
    dispatcher = make(lane)
    dispatcher._breaker = Breaker(lambda: 0.0)  # no time passes, however busy the machine: nobody is probed
    assert torch.equal(compute(dispatcher), EXPECTED)
    assert counted(dispatcher, "failovers_total") == {reason: 1}
    lane.sent.clear()
    for _ in range(5):
        assert torch.equal(compute(dispatcher), EXPECTED)
    assert "a" not in lane.sent
    assert not any(dispatcher._outstanding.values()), "nothing may count as outstanding for ever"


def named(dispatcher: RemoteDispatcher, number: int, *request_ids: str) -> Step:
    dispatcher.step = Step(StepId(256 + 2, number), request_ids)
    return dispatcher.step


def test_a_step_knows_what_its_experts_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(frame: bytes) -> bytes:
        assert wire.unpack_dispatch(frame).step == (258, 7)
        return wire.pack_partial(wire.unpack_dispatch(frame).x_TD, 0.25)

    dispatcher = make(ScriptedLane(a=None, b=slow, c=nan, d=LaneError), fallback=True)
    step = named(dispatcher, 7, "r-0")
    compute(dispatcher)
    assert (step.compute_seconds, step.num_failovers, step.num_local_tokens) == (0.25, 3, 2)


def test_a_step_that_is_sent_anew_does_not_wait_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr("actors.dispatch.remote.time.monotonic", lambda: float(next(now)))
    dispatcher = make(ScriptedLane(a=echo, b=echo, c=echo, d=echo))
    step = named(dispatcher, 1)
    part = dispatcher.dispatch(0, X, IDS, GATES).parts[0]
    before = step.wait_seconds
    dispatcher._routes._changed.wait_for = lambda *args, **options: True  # type: ignore[method-assign]
    dispatcher._reroute(part)
    assert step.wait_seconds == before, "combine(), which it is a part of, counts it"


def test_log_lines_name_the_step_and_its_requests(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = make(ScriptedLane(a=nan, b=LaneError, c=echo, d=echo), fallback=True)
    named(dispatcher, 7, "r-0", "s-0")
    compute(dispatcher)
    assert [record.message for record in caplog.records] == [
        "replica a: partial sums are not finite",
        "replica a of group 0 is given up: corrupt",
        "replica b of group 0 is given up: disconnected",
        "experts of group 0 are computed here",
    ]
    for record in caplog.records:
        assert vars(record)["step"] == "front-1.2:7"
        assert vars(record)["request_ids"] == ["r-0", "s-0"]


def test_a_request_is_told_once_that_its_experts_are_computed_here(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = make(ScriptedLane(a=LaneError, b=LaneError, c=echo, d=echo), fallback=True)
    for number, requests in enumerate([("r",), ("r",), ("r", "s"), ("s",), ("s",)]):
        named(dispatcher, number, *requests)
        compute(dispatcher)
    told = [vars(record)["step"] for record in caplog.records if "computed here" in record.message]
    assert told == ["front-1.2:0", "front-1.2:2"]


def test_a_step_that_fails_leaves_nothing_outstanding() -> None:
    dispatcher = make(ScriptedLane(a=LaneError, b=LaneError, c=echo, d=echo))
    with pytest.raises(DispatchError):
        compute(dispatcher)
    assert not any(dispatcher._outstanding.values()), "the part of group 1 is given up as well"


def test_an_unreachable_replica_is_skipped_at_once() -> None:
    dispatcher = make(ScriptedLane(b=echo, c=echo, d=echo))
    assert torch.equal(compute(dispatcher), EXPECTED)
    assert counted(dispatcher, "failovers_total") == {"unreachable": 1}


def test_a_part_whose_experts_have_moved_is_sent_by_the_newer_map_and_counted() -> None:
    def moved(frame: bytes) -> bytes:
        old = dispatcher._routes._map
        assert old
        dispatcher.set_map(replace(old, version=2, replicas=old.replicas[1:]))
        return wire.pack_refusal(wire.NOT_HELD, "expert 0 is not here", 0)

    dispatcher = make(ScriptedLane(a=moved, b=echo, c=echo, d=echo))
    assert torch.equal(compute(dispatcher), EXPECTED)
    assert counted(dispatcher, "failovers_total") == {"not_held": 1}


def test_a_refusal_waits_once_for_a_map_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(frame: bytes) -> bytes:
        return wire.pack_refusal(wire.NOT_HELD, "expert 0 is not here", 0)

    dispatcher = make(ScriptedLane(a=moved, b=moved, c=echo, d=echo), fallback=True)
    waits: list[float] = []

    def wait_in_vain(is_newer: Callable[[], bool], timeout: float) -> bool:
        waits.append(timeout)
        return False

    monkeypatch.setattr(dispatcher._routes._changed, "wait_for", wait_in_vain)
    for _ in range(5):
        assert torch.equal(compute(dispatcher), EXPECTED)
    assert waits == [MAP_WAIT_S, 0, 0, 0, 0]
    assert dispatcher._routes._map
    dispatcher.set_map(replace(dispatcher._routes._map, version=2))
    compute(dispatcher)
    assert waits[-1] == MAP_WAIT_S, "a newer map that is wrong as well"


def test_a_map_is_taken_even_if_its_replicas_cannot_be_connected(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(replicas: Iterable[ReplicaAddress]) -> None:
        raise OSError("too many open files")

    lane = ScriptedLane(a=echo, b=echo, c=echo, d=echo)
    dispatcher = make(lane)
    monkeypatch.setattr(lane, "connect", fail)
    assert dispatcher._routes._map
    dispatcher.set_map(dispatcher._routes._map.with_replicas(dispatcher._routes._map.replicas[1:]))
    assert dispatcher.map_version == 2
    assert "map 2 is taken" in caplog.text
    assert torch.equal(compute(dispatcher), EXPECTED)
    assert "a" not in lane.sent


@pytest.mark.parametrize("broken", [None, LaneError, nan])
def test_without_a_live_replica_the_front_computes_itself(broken: Behaviour | type[Exception] | None) -> None:
    lane = ScriptedLane(a=broken, b=broken, c=echo, d=echo)
    dispatcher = make(lane, fallback=True)
    assert torch.equal(compute(dispatcher), EXPECTED)
    assert counted(dispatcher, "local_fallback_tokens_total") == {"": 3}
    assert sum(counted(dispatcher, "failovers_total").values()) == 2, "replicas given up, though nothing moved"
    lane.sent.clear()
    compute(dispatcher)
    assert not {"a", "b"} & set(lane.sent)


def test_without_replica_and_fallback_the_step_fails_with_the_group() -> None:
    with pytest.raises(DispatchError, match="no replica of expert group 1 answers"):
        compute(make(ScriptedLane(a=echo, b=echo, c=None, d=LaneError)))


def test_a_fallback_that_fails_says_so_with_the_group() -> None:
    def unreadable(*_: object) -> torch.Tensor:
        raise OSError("it is gone")

    dispatcher = make(ScriptedLane(a=echo, b=echo, c=None, d=LaneError))
    dispatcher._fallback = unreadable
    with pytest.raises(DispatchError, match="no replica of expert group 1 answers, and here: it is gone"):
        compute(dispatcher)


def test_a_replica_that_answers_a_probe_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = ScriptedLane(a=None, b=echo, c=echo, d=echo)
    dispatcher = make(lane)
    now = [0.0]
    dispatcher._breaker = Breaker(lambda: now[0])
    compute(dispatcher)
    lane.behaviour["a"] = echo
    compute(dispatcher)
    lane.sent.clear()
    now[0] += REPROBE_S[0]
    compute(dispatcher)  # sends the probe
    compute(dispatcher)  # sees its answer
    assert "a" in lane.sent
    assert not dispatcher._breaker


def test_a_new_map_ends_the_wait_for_replicas_that_left() -> None:
    lane = ScriptedLane(a=None, b=echo, c=echo, d=echo)
    dispatcher = make(lane)
    compute(dispatcher)
    assert dispatcher._routes._map
    dispatcher.set_map(dispatcher._routes._map.with_replicas(dispatcher._routes._map.replicas[1:]))
    assert torch.equal(compute(dispatcher), EXPECTED)
    assert not dispatcher._breaker


def test_a_probe_of_a_replica_that_left_is_forgotten() -> None:
    """A connection that has left the map is closed once nothing is expected over it."""
    lane = ScriptedLane(a=None, b=echo, c=echo, d=echo)
    dispatcher = make(lane)
    now = [0.0]
    dispatcher._breaker = Breaker(lambda: now[0])
    compute(dispatcher)
    now[0] += REPROBE_S[0]
    compute(dispatcher)
    assert "a" in dispatcher._probes
    assert dispatcher._routes._map
    dispatcher.set_map(dispatcher._routes._map.with_replicas(dispatcher._routes._map.replicas[1:]))
    compute(dispatcher)
    assert [(ticket.replica, ticket.frame) for ticket in lane.forgotten] == [("a", b"")]


def test_a_replica_that_joins_does_not_get_all_messages_until_it_has_caught_up() -> None:
    lane = ScriptedLane(a=echo, b=echo, c=echo, d=echo)
    dispatcher = make(lane)
    both = dispatcher._routes._map
    assert both
    dispatcher.set_map(both.with_replicas(both.replicas[1:]))
    for _ in range(20):
        compute(dispatcher)
    dispatcher.set_map(replace(both, version=3))
    lane.sent.clear()
    for _ in range(10):
        compute(dispatcher)
    assert (lane.sent.count("a"), lane.sent.count("b")) == (5, 5)


def test_a_free_replica_is_found_without_looking_at_all_of_them() -> None:
    names = [f"r{n}" for n in range(256)]
    lane = ScriptedLane(**dict.fromkeys(names, echo))
    dispatcher = RemoteDispatcher(lane, Metrics())
    replicas = tuple(ReplicaAddress(name, 0, ((lane.name, name),)) for name in names)
    dispatcher.set_map(ExpertMap(1, 1, contiguous_homes(2, 4, 1), replicas))
    looked_at: list[str] = []
    dispatcher._breaker.is_open = looked_at.append  # type: ignore[assignment, method-assign]
    for _ in range(256):
        compute(dispatcher)
    assert sorted(lane.sent) == sorted(names), "they take turns"
    assert len(looked_at) < 256 * 40


def test_deadlines_follow_what_was_observed() -> None:
    latency = Latency()
    assert latency.deadline("a", 1) == FIRST_DEADLINE_S
    latency.observe("a", 4, 0.001)
    assert latency.deadline("a", 4) == DEADLINE_FLOOR_S
    for _ in range(50):
        latency.observe("a", 4, 0.05)
    assert latency.deadline("a", 4) == pytest.approx(0.4, rel=0.01)
    assert latency.deadline("a", 1) == latency.deadline("a", 4), "a smaller batch is not expected to be faster"
    assert latency.deadline("a", 8) == pytest.approx(0.8, rel=0.01), "a larger one may take longer in proportion"
    assert latency.deadline("a", 512) == GUESSED_DEADLINE_S, "but this is a guess: a replica that hangs costs no more"
    assert latency.deadline("b", 4) == latency.deadline("a", 4), "of a replica that is new, the best guess"
    latency.observe("b", 4, 0.02)
    assert latency.deadline("ab", 4) == pytest.approx(0.16, rel=0.01), "of several, the fastest counts"
    latency.keep_only({"a"})
    assert latency.deadline("ab", 4) == pytest.approx(0.4, rel=0.01)
    for _ in range(50):
        latency.observe("a", 4, 0.5)
    assert latency.deadline("a", 512) == pytest.approx(4.0, rel=0.01), "a larger batch is not expected to be faster"


def test_what_was_not_answered_in_time_raises_the_deadline_by_steps() -> None:
    latency = Latency()
    latency.observe("a", 4, 0.05)
    latency.at_least("a", 4, 0.04)
    assert latency.deadline("a", 4) == pytest.approx(0.4), "nothing new: 0.05 is at least 0.04"
    latency.at_least("a", 4, 0.4)
    once = latency.deadline("a", 4)
    assert once > 0.8
    latency.at_least("a", 4, 60.0)
    assert latency.deadline("a", 4) < DEADLINE_FACTOR * once, "it was frozen; it is not that slow"


def test_bounds_of_an_answers_time_move_what_is_expected_no_further_than_into_them() -> None:
    latency = Latency()
    latency.between("a", 4, 0.05, 0.3)
    assert latency.deadline("a", 4) == pytest.approx(0.4), "nothing is known: what the replica says that it computed"
    latency.between("a", 4, 0.01, 60.0)
    assert latency.deadline("a", 4) == pytest.approx(0.4), "0.05 may be right"
    for _ in range(50):
        latency.between("a", 4, 0.01, 0.04)
    assert latency.deadline("a", 4) == pytest.approx(0.32, rel=0.01)
    for _ in range(50):
        latency.between("a", 4, 0.06, 0.09)
    assert latency.deadline("a", 4) == pytest.approx(0.48, rel=0.01)


def test_hedges_are_a_share_of_all_messages() -> None:
    budget = HedgeBudget()
    num_hedges = 0
    for _ in range(1000):
        budget.earn()
        if budget:
            budget.spend()
            num_hedges += 1
    assert num_hedges == pytest.approx(1000 * HEDGE_SHARE + HEDGE_BURST, abs=1)


def test_a_replica_that_is_given_up_again_and_again_is_left_alone_for_longer() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0])

    def pause() -> float:
        """Until the first probe, which succeeds at once."""
        breaker.open("a")
        opened = now[0]
        while not breaker.take_due():
            now[0] += 0.05
        breaker.close("a")
        return now[0] - opened

    pauses = [pause() for _ in range(5)]
    assert pauses == sorted(pauses)
    assert pauses[0] == pytest.approx(REPROBE_S[0], abs=0.1)
    assert pauses[-1] == pytest.approx(REPROBE_S[1], abs=0.1)
    now[0] += RELAPSE_S
    assert pause() == pytest.approx(REPROBE_S[0], abs=0.1)


def test_probes_come_at_growing_pauses() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0])
    assert breaker.open("a")
    assert not breaker.open("a")
    times = []
    while now[0] < 20:
        now[0] += 0.05
        if breaker.take_due():
            times.append(now[0])
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(REPROBE_S[1], abs=0.1)
    breaker.close("a")
    assert not breaker.is_open("a")


class SlowLane(ScriptedLane):
    """Replicas that take `seconds` for a message, one after the other, by a clock that only waiting moves."""

    def __init__(self, seconds: float) -> None:
        super().__init__(a=echo, b=echo, c=echo, d=echo)
        self.seconds = dict.fromkeys("abcd", seconds)
        self.now = 0.0
        self.free_at = dict.fromkeys("abcd", 0.0)
        self.done_at: dict[Ticket, float] = {}
        self.lost: Sequence[str] = ()

    def send(self, replica: ReplicaAddress, message: bytes) -> Ticket:
        ticket = super().send(replica, message)
        started = max(self.now, self.free_at[ticket.replica])
        self.done_at[ticket] = self.free_at[ticket.replica] = started + self.seconds[ticket.replica]
        return ticket

    def receive(self, tickets: Sequence[Ticket], timeout_s: float) -> tuple[Ticket, bytes]:
        for ticket in tickets:
            if ticket.replica in self.lost:
                raise LaneError("disconnected", ticket)
        first = min(tickets, key=self.done_at.__getitem__)
        if self.done_at[first] > self.now + timeout_s:
            self.now += timeout_s
            raise LaneTimeout("late")
        self.now = max(self.now, self.done_at[first])
        return first, echo(first.frame)

    def is_alive(self, ticket: Ticket) -> bool:
        return self.seconds[ticket.replica] < 1000  # a probe costs nothing, however slow the replica


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowLane:
    lane = SlowLane(0.005)
    monkeypatch.setattr("actors.dispatch.remote.time.monotonic", lambda: lane.now)
    return lane


def make_slow(lane: SlowLane) -> RemoteDispatcher:
    dispatcher = make(lane, fallback=True)
    dispatcher._breaker = Breaker(lambda: lane.now)
    for _ in range(50):
        compute(dispatcher)
    assert not dispatcher._breaker
    return dispatcher


def local_and_failovers(dispatcher: RemoteDispatcher) -> tuple[float, float]:
    local, failovers = (counted(dispatcher, name) for name in ("local_fallback_tokens_total", "failovers_total"))
    return sum(local.values()), sum(failovers.values())


@pytest.mark.parametrize("seconds", [20 * DEADLINE_FLOOR_S, 50 * DEADLINE_FLOOR_S])
def test_when_all_replicas_are_slower_than_the_deadline_the_deadline_gives_way(slow: SlowLane, seconds: float) -> None:
    dispatcher = make_slow(slow)
    slow.seconds = dict.fromkeys("abcd", seconds)
    while slow.now < 60:
        assert torch.equal(compute(dispatcher), EXPECTED)
        slow.now += 0.1
    before = local_and_failovers(dispatcher)
    slow.sent.clear()
    for _ in range(60):
        compute(dispatcher)
        slow.now += 0.1
    assert local_and_failovers(dispatcher) == before, "nobody is given up any more, nothing is computed here"
    assert len(slow.sent) == 2 * 60, "nothing is sent twice"


def test_a_replica_that_hangs_is_given_up_at_once(slow: SlowLane) -> None:
    dispatcher = make_slow(slow)
    slow.seconds["a"] = float("inf")
    started = slow.now
    for _ in range(50):
        assert torch.equal(compute(dispatcher), EXPECTED)
    assert slow.now - started < DEADLINE_FLOOR_S + 50 * 2 * 0.005
    assert local_and_failovers(dispatcher) == (0, 1)


def test_whoever_takes_over_from_a_lost_replica_has_all_the_time_that_it_needs(slow: SlowLane) -> None:
    """The loss may be noticed late: other parts have used the lost one's time up."""
    dispatcher = make_slow(slow)
    pending = dispatcher.dispatch(0, X, IDS, GATES)
    slow.lost = [pending.parts[1].sent[0].replica.replica_id]
    slow.now += 10 * DEADLINE_FLOOR_S
    assert torch.equal(dispatcher.combine(pending), EXPECTED)
    assert local_and_failovers(dispatcher) == (0, 1)


def test_what_a_front_waits_for_others_does_not_count_as_the_time_of_an_answer(slow: SlowLane) -> None:
    """Parts are read in the order of groups: those of group 1 lie there meanwhile."""
    dispatcher = make_slow(slow)
    slow.seconds |= {"a": 0.3, "b": 0.3}
    for _ in range(100):
        compute(dispatcher)
    assert dispatcher._latency.deadline("ab", 3) == pytest.approx(DEADLINE_FACTOR * 0.3, rel=0.01)
    assert dispatcher._latency.deadline("cd", 3) == DEADLINE_FLOOR_S


def test_a_replica_that_is_slow_among_fast_ones_is_left_alone(slow: SlowLane) -> None:
    dispatcher = make_slow(slow)
    slow.seconds["a"] = 3 * DEADLINE_FLOOR_S
    started = slow.now
    for _ in range(2000):
        compute(dispatcher)
    local, failovers = local_and_failovers(dispatcher)
    assert local == 0
    assert failovers < 10, "tried again now and then"
    assert slow.now - started < 2000 * 0.01 + failovers * 2 * DEADLINE_FLOOR_S


def test_a_replica_that_was_frozen_is_used_again_when_it_has_answered_what_it_owes(slow: SlowLane) -> None:
    dispatcher = make_slow(slow)
    slow.seconds["a"] = 8.0
    while not dispatcher._breaker.is_open("a"):
        compute(dispatcher)
    woken = slow.now + 8.0
    slow.seconds["a"] = 0.005
    while dispatcher._breaker.is_open("a"):
        compute(dispatcher)
        slow.now += 0.02
    assert woken - 0.2 < slow.now < woken + REPROBE_S[1] + 0.2
    started = slow.now
    for _ in range(100):
        compute(dispatcher)
    assert slow.now - started == pytest.approx(100 * 0.005, rel=0.1)
    assert not dispatcher._late
    assert not dispatcher._breaker
