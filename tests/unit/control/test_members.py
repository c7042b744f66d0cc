"""Restarts and their pauses, on a clock of the test's own."""

import time

import pytest

from cluster.control.clock import now as control_time
from cluster.control.members import FIRST_PAUSE_S, LONGEST_PAUSE_S, STABLE_S, Member
from cluster.messages.actors import ActorReport, EngineOptions, FrontSpec, LaneKeys, ReadyReport, ReplicaSpec

SPEC = ReplicaSpec("expert-g0-r1", 0, "/m", "cpu", "float32", ((0,),), 1)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def member(clock: Clock) -> Member:
    return Member(SPEC, "expert", clock)


def ready(member: Member) -> None:
    member.become_ready(ReadyReport(member.spec.actor_id, "n", 1, "", 5, 0.1))


def test_a_restarted_actor_has_a_name_of_its_own_in_the_same_slot(member: Member, clock: Clock) -> None:
    ready(member)
    member.bury("killed")
    assert not member.is_due
    clock.now += FIRST_PAUSE_S
    assert member.is_due
    member.renew()
    assert (member.spec.actor_id, member.slot, member.state) == ("expert-g0-r1.1", "expert-g0-r1", "starting")
    assert not member.is_due


def test_pauses_double_in_a_crash_loop_and_start_anew_after_a_long_life(member: Member, clock: Clock) -> None:
    pauses = []
    for _ in range(12):
        ready(member)
        member.bury("crashed")
        assert member.restart_at is not None
        pauses.append(member.restart_at - clock.now)
        member.renew()
    assert pauses[:3] == pytest.approx([FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S])
    assert pauses[-1] == LONGEST_PAUSE_S
    assert "crashed; restart 12 in 30.0 s" in member.detail or member.num_restarts == 12
    ready(member)
    clock.now += STABLE_S
    member.bury("crashed")
    assert member.restart_at == pytest.approx(clock.now + FIRST_PAUSE_S)


def test_specs_fit_whatever_the_actor_is_called() -> None:
    keys = LaneKeys(b"a", b"b", b"c", b"d")
    assert ReplicaSpec("expert-g0-r1.7", 0, "/m", "cpu", "float32", ((0,),), 1, keys).fits(SPEC)
    assert not ReplicaSpec("expert-g0-r1", 0, "/m", "cpu", "bfloat16", ((0,),), 1).fits(SPEC)


def test_a_replica_fits_with_other_experts_since_it_can_be_told_to_hold_some() -> None:
    assert ReplicaSpec("expert-g0-r1", 0, "/m", "cpu", "float32", ((1,),), 1).fits(SPEC)


def test_fronts_fit_fronts() -> None:
    keys = LaneKeys(b"a", b"b", b"c", b"d")
    engine = EngineOptions("/m", "cpu", "float32", 8, 4, None, 0.9, 8, 2, 2, True, "auto", "auto", "auto", False, 1)
    assert not FrontSpec("front-0", engine, "zmq").fits(SPEC)
    assert FrontSpec("front-0.1", engine, "zmq", keys).fits(FrontSpec("front-0", engine, "zmq"))


def test_a_new_member_is_not_lost_while_it_loads_but_a_successor_is(member: Member, clock: Clock) -> None:
    member.enter("loading")
    assert not member.is_lost
    ready(member)
    member.bury("killed")
    assert member.is_lost
    member.renew()
    assert member.is_lost
    ready(member)
    assert not member.is_lost


def test_silence_is_timed_from_the_first_report_that_did_not_come(member: Member, clock: Clock) -> None:
    assert member.hear(None) == 0
    clock.now += 4
    assert member.hear(None) == 4
    assert member.hear(ActorReport("expert-g0-r1", 0, 0)) == 0
    clock.now += 4
    assert member.hear(None) == 0


async def test_a_clock_that_is_set_ends_nobody_and_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    member = Member(SPEC, "expert")
    ready(member)
    member.hear(None)
    member.bury("killed")
    now = time.time()
    for jump in (-3600.0, 3600.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        member.enter("dead", "killed")
        assert member.since == now + jump, "people are told Unix time"
        assert member.hear(None) < 60
        assert member.restart_at is not None
        assert abs(member.restart_at - control_time()) < 60
