"""The scaling policy: up fast, down slow, never back and forth."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy.autoscaling import (
    Decision,
    FrontSignals,
    GroupSignals,
    Limits,
    Policy,
    ScalingState,
    front_utilisation,
    scale_fronts,
    scale_group,
)

POLICY = Policy()
UTILISATION = st.floats(0, 1)
LIMITS = st.tuples(st.integers(1, 8), st.integers(0, 24)).map(lambda pair: Limits(pair[0], sum(pair)))
SINCE = st.none() | st.floats(0, 1000)
STATES = st.builds(ScalingState, SINCE, SINCE)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    low, target, high = sorted(draw(st.lists(st.integers(1, 99), min_size=3, max_size=3, unique=True)))
    return Policy(low / 100, target / 100, high / 100, draw(st.floats(0, 30)), draw(st.floats(0, 600)))


def simulate(
    utilisation: Callable[[int, float], float],
    count: int,
    limits: Limits,
    seconds: int,
    policy: Policy = POLICY,
) -> list[int]:
    """Replicas after each second; new ones are ready at once. `utilisation` is a function of (replicas, time)."""
    state, counts = ScalingState(), []
    for now in range(seconds):
        signals = GroupSignals(min(1.0, utilisation(count, float(now))), count, count)
        decision = scale_group(signals, limits, state, float(now), policy)
        count, state = decision.desired, decision.state
        counts.append(count)
    return counts


# -- limits ----------------------------------------------------------------------------------------------------------


@given(UTILISATION, st.integers(0, 40), st.integers(0, 40), LIMITS, STATES, st.floats(1000, 2000), policies())
def test_never_outside_the_limits_and_down_one_at_a_time(
    utilisation: float, replicas: int, ready: int, limits: Limits, state: ScalingState, now: float, policy: Policy
) -> None:
    desired = scale_group(GroupSignals(utilisation, replicas, ready), limits, state, now, policy).desired
    assert limits.minimum <= desired <= limits.maximum
    if limits.clamp(replicas) == replicas:
        assert desired >= replicas - 1
    else:
        assert desired == limits.clamp(replicas), "brought into range at once, and no further"


@given(UTILISATION, UTILISATION, st.integers(1, 40), LIMITS, STATES, st.floats(1000, 2000), policies())
def test_more_utilisation_never_means_fewer_replicas(
    a: float, b: float, replicas: int, limits: Limits, state: ScalingState, now: float, policy: Policy
) -> None:
    less, more = (
        scale_group(GroupSignals(u, replicas, replicas), limits, state, now, policy).desired for u in sorted((a, b))
    )
    assert less <= more


# -- hysteresis ------------------------------------------------------------------------------------------------------


@given(st.floats(0, 20), st.integers(1, 25), LIMITS, policies())
@settings(max_examples=200)
def test_a_constant_load_settles_without_going_back_and_forth(
    load: float, start: int, limits: Limits, policy: Policy
) -> None:
    policy = Policy(policy.low, policy.target, policy.high, up_after_s=2, down_after_s=10)
    counts = simulate(lambda count, _: load / count, start, limits, 500, policy)
    steps = [after - before for before, after in pairwise(counts) if after != before]
    assert all(step > 0 for step in steps) or all(step == -1 for step in steps)
    assert len(set(counts[-100:])) == 1
    assert load / counts[-1] <= policy.high or counts[-1] == limits.maximum


@given(st.floats(0, 4.9), st.integers(1, 4), st.integers(10, 20))
def test_a_spike_shorter_than_up_after_changes_nothing(length: float, replicas: int, start: int) -> None:
    def spike(_: int, now: float) -> float:
        return 1.0 if start <= now <= start + length else 0.5

    assert set(simulate(spike, replicas, Limits(1, 8), 60)) == {replicas}


def test_a_dip_starts_the_wait_for_a_step_down_again() -> None:
    counts = simulate(lambda _, now: 0.5 if now == 200 else 0.1, 2, Limits(1, 4), 600)
    assert counts.index(1) == 201 + 300


def test_up_fast_down_slow() -> None:
    up = simulate(lambda count, _: 4 / count, 1, Limits(1, 8), 60)
    assert [up.index(n) for n in (2, 4, 7)] == [5, 11, 17], "each step may wait for 5 s, and is by ratio"
    down = simulate(lambda count, _: 0.5 / count, 4, Limits(1, 8), 1200)
    assert [down.index(n) for n in (3, 2, 1)] == [300, 601, 902]


def test_a_step_down_that_would_overload_the_rest_is_not_taken() -> None:
    policy = Policy(low=0.45, target=0.6, high=0.8)
    assert set(simulate(lambda count, _: 0.8 / count, 2, Limits(1, 4), 1000, policy)) == {2}


# -- replicas that are starting --------------------------------------------------------------------------------------

LONG = ScalingState(above_since=0.0)


def test_replicas_that_are_starting_are_not_ordered_again() -> None:
    assert scale_group(GroupSignals(1.0, 2, 2), Limits(1, 16), LONG, 10.0, POLICY).desired == 4
    assert scale_group(GroupSignals(1.0, 4, 2), Limits(1, 16), LONG, 20.0, POLICY).desired == 4
    assert scale_group(GroupSignals(1.0, 4, 4), Limits(1, 16), LONG, 30.0, POLICY).desired == 7


@pytest.mark.parametrize("ready", [0, 1])
def test_nothing_leaves_while_replicas_are_starting(ready: int) -> None:
    idle = ScalingState(below_since=0.0)
    assert scale_group(GroupSignals(0.0, 2, ready), Limits(1, 4), idle, 1e6, POLICY) == Decision(2)


def test_a_decision_says_why() -> None:
    assert scale_group(GroupSignals(0.9, 2, 2), Limits(1, 4), LONG, 9.0, POLICY) == Decision(
        3, ScalingState(), "utilisation 0.90 > 0.80"
    )
    idle = ScalingState(below_since=0.0)
    assert scale_group(GroupSignals(0.1, 2, 2), Limits(1, 4), idle, 300.0, POLICY).reason == "utilisation 0.10 < 0.30"
    assert scale_group(GroupSignals(0.1, 9, 9), Limits(1, 4), idle, 300.0, POLICY).reason == "9 is outside 1 to 4"


def test_at_the_maximum_nothing_is_decided() -> None:
    assert scale_group(GroupSignals(1.0, 4, 4), Limits(1, 4), LONG, 9.0, POLICY) == Decision(4, LONG)


@pytest.mark.parametrize(("count", "wanted"), [(5, 7), (9, 13), (10, 14)])
def test_a_load_that_fits_exactly_takes_no_replica_more(count: int, wanted: int) -> None:
    """In floating point, 7 x 0.6 / 5 x 5 / 0.6 is a little more than 7."""
    signals = GroupSignals(wanted * POLICY.target / count, count, count)
    assert scale_group(signals, Limits(1, 99), LONG, 9.0, POLICY).desired == wanted


# -- fronts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait", "waiting", "running", "expected"),
    [
        (0.0, 0, 0, 0.0),
        (0.0, 0, 16, 0.25),  # of 2 fronts with 32 places each
        (0.5, 0, 16, 0.4),  # half of the queue wait that counts as the high mark
        (9.0, 3, 16, 1.0),  # the KV cache is short: places are free and requests wait
        (0.0, 8, 32, 0.625),
        (0.0, 64, 64, 1.0),
    ],
)
def test_fronts_are_as_busy_as_their_batches_are_full_or_requests_wait(
    wait: float, waiting: int, running: int, expected: float
) -> None:
    signals = FrontSignals(wait, waiting, running, max_num_seqs=32, fronts=2, ready=2)
    assert front_utilisation(signals, POLICY) == pytest.approx(expected)


def test_fronts_grow_when_requests_wait_and_shrink_when_idle() -> None:
    waiting = FrontSignals(3.0, 5, 16, max_num_seqs=32, fronts=2, ready=2)
    first = scale_fronts(waiting, Limits(1, 8), ScalingState(), 0.0, POLICY)
    assert first == Decision(2, ScalingState(above_since=0.0))
    assert scale_fronts(waiting, Limits(1, 8), first.state, 5.0, POLICY).desired == 4
    idle = FrontSignals(0.0, 0, 1, max_num_seqs=32, fronts=4, ready=4)
    first = scale_fronts(idle, Limits(1, 8), ScalingState(), 100.0, POLICY)
    assert scale_fronts(idle, Limits(1, 8), first.state, 399.0, POLICY).desired == 4
    assert scale_fronts(idle, Limits(1, 8), first.state, 400.0, POLICY).desired == 3


@pytest.mark.parametrize("marks", [(0.6, 0.6, 0.8), (0.3, 0.9, 0.8), (0.3, 0.6, 1.1)])
def test_marks_in_the_wrong_order_are_refused(marks: tuple[float, float, float]) -> None:
    with pytest.raises(AssertionError, match="marks must be"):
        Policy(*marks)
