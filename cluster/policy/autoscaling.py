"""How many replicas a group should have, and how many fronts: pure functions of signals, limits, state and time.

Up fast, down slow. Load is measured in busy members: two members that compute half of the time are a load of 1. A
step up takes the fewest members that bring the load per member to the target; a step down is taken only if one member
less still meets the target. So under a constant utilisation a step is never undone.
"""

import math
from dataclasses import dataclass

# Rounding must not turn 3 members at exactly the target into 4.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Limits:
    """The fewest and the most members, both allowed."""

    minimum: int = 1
    maximum: int = 1

    def __post_init__(self) -> None:
        assert 1 <= self.minimum <= self.maximum, f"limits {self.minimum} to {self.maximum}"

    def clamp(self, count: int) -> int:
        return max(self.minimum, min(self.maximum, count))


@dataclass(frozen=True, slots=True)
class Policy:
    """Marks of utilisation (0 to 1), and for how many seconds it must be beyond a mark.

    `high_queue_wait_s` is the queue wait of fronts that counts as much as the high mark.
    """

    low: float = 0.3
    target: float = 0.6
    high: float = 0.8
    up_after_s: float = 5.0
    down_after_s: float = 300.0
    high_queue_wait_s: float = 1.0

    def __post_init__(self) -> None:
        assert 0 <= self.low < self.target < self.high <= 1, "marks must be low < target < high, from 0 to 1"
        assert min(self.up_after_s, self.down_after_s) >= 0, "durations can't be negative"
        assert self.high_queue_wait_s > 0, "high_queue_wait_s must be positive"


@dataclass(frozen=True, slots=True)
class GroupSignals:
    """Of an expert group: the share of time that its ready replicas compute (mean), and how many there are.

    `replicas` includes those that are still starting: their work is not measured, but they have been asked for.
    """

    utilisation: float
    replicas: int
    ready: int


@dataclass(frozen=True, slots=True)
class FrontSignals:
    """Of all fronts: mean queue wait over the window, sequences, and what one front can run at once."""

    queue_wait_s: float
    num_waiting: int
    num_running: int
    max_num_seqs: int
    fronts: int
    ready: int


@dataclass(frozen=True, slots=True)
class ScalingState:
    """Since when utilisation has been beyond a mark without a break; None while it is not."""

    above_since: float | None = None
    below_since: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The members wanted now, why (empty when nothing changes), and the state for the next call."""

    desired: int
    state: ScalingState = ScalingState()
    reason: str = ""


def scale_group(signals: GroupSignals, limits: Limits, state: ScalingState, now: float, policy: Policy) -> Decision:
    """Replicas that an expert group should have. `now` is any clock in seconds that does not jump."""
    return _decide(signals.utilisation, signals.replicas, signals.ready, limits, state, now, policy)


def scale_fronts(signals: FrontSignals, limits: Limits, state: ScalingState, now: float, policy: Policy) -> Decision:
    """Fronts that there should be. `now` as in scale_group."""
    utilisation = front_utilisation(signals, policy)
    return _decide(utilisation, signals.fronts, signals.ready, limits, state, now, policy)


def front_utilisation(signals: FrontSignals, policy: Policy) -> float:
    """0 to 1: how full the batches are, or how long requests wait, whichever is worse.

    Requests may wait before the batches are full, when the KV cache or the token budget is what is short. Waiting is
    not proportional to load, so there a step down can turn out wrong: it is undone after up_after_s.
    """
    places = max(1, signals.ready) * signals.max_num_seqs
    occupancy = (signals.num_running + signals.num_waiting) / places
    wait = policy.high * signals.queue_wait_s / policy.high_queue_wait_s
    return min(1.0, max(occupancy, wait))


def _decide(
    utilisation: float, count: int, ready: int, limits: Limits, state: ScalingState, now: float, policy: Policy
) -> Decision:
    allowed = limits.clamp(count)
    if allowed != count:
        return Decision(allowed, reason=f"{count} is outside {limits.minimum} to {limits.maximum}")
    load = utilisation * min(ready, count)
    # Members that are starting will take their share: without them, one peak would be answered again and again.
    per_member = load / count
    above = per_member > policy.high
    below = per_member < policy.low and ready >= count > 1 and load <= policy.target * (count - 1)
    state = ScalingState(_since(above, state.above_since, now), _since(below, state.below_since, now))
    if _has_lasted(state.above_since, policy.up_after_s, now) and count < limits.maximum:
        wanted = limits.clamp(math.ceil(load / policy.target - ROUNDING))
        return Decision(wanted, reason=f"utilisation {per_member:.2f} > {policy.high:.2f}")
    if _has_lasted(state.below_since, policy.down_after_s, now) and count > limits.minimum:
        return Decision(count - 1, reason=f"utilisation {per_member:.2f} < {policy.low:.2f}")
    return Decision(count, state)


def _since(is_beyond: bool, since: float | None, now: float) -> float | None:
    if not is_beyond:
        return None
    return now if since is None else since


def _has_lasted(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since >= seconds
