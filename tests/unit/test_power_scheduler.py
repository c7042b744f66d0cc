"""The Power scheduler of arXiv 2408.13359: equations 7 and 8, with the paper's own numbers."""

import dataclasses
import itertools

import pytest

from deploy.demo.training.power_scheduler import PowerSchedule, batch_in_sequences, power_lr

PAPER = PowerSchedule(
    batch_size=1024,
    lr_max=0.02,
    warmup_tokens=1_000_000_000,
    total_tokens=1_000_000_000_000,
    decay_tokens=100_000_000_000,
)


def test_after_warm_up_the_rate_is_batch_size_times_a_power_of_the_tokens() -> None:
    tokens = 500e9
    assert power_lr(PAPER, tokens) == pytest.approx(1024 * 4 * tokens**-0.51)


def test_the_predicted_optimum_of_the_paper_is_reproduced() -> None:
    """Section 4: for 10 trillion tokens and a batch size of 1024 the optimum is 0.0011 (with a = 4.6)."""
    schedule = PowerSchedule(batch_size=1024, a=4.6)
    assert power_lr(schedule, 10e12) == pytest.approx(0.0011, abs=5e-5)


def test_the_rate_never_exceeds_lr_max() -> None:
    assert power_lr(PAPER, PAPER.warmup_tokens) == 0.02
    assert max(power_lr(PAPER, n * 1e9) for n in range(1001)) == 0.02


def test_warm_up_is_linear_from_zero_to_the_power_rate_at_its_end() -> None:
    schedule = dataclasses.replace(PAPER, batch_size=16)
    top = 16 * 4 * 1e9**-0.51
    assert top < schedule.lr_max
    assert power_lr(schedule, 0) == 0.0
    assert power_lr(schedule, 0.25e9) == pytest.approx(top / 4)
    assert power_lr(schedule, 1e9) == pytest.approx(top)


def test_final_decay_goes_linearly_from_the_rate_at_its_start_to_zero() -> None:
    start = power_lr(PAPER, 900e9)
    assert power_lr(PAPER, 950e9) == pytest.approx(start / 2)
    assert power_lr(PAPER, 1000e9) == 0.0
    assert power_lr(PAPER, 1100e9) == 0.0


def test_the_schedule_is_continuous_and_falls_after_warm_up() -> None:
    rates = [power_lr(PAPER, n * 1e9) for n in range(1, 1001)]
    assert all(earlier >= later for earlier, later in itertools.pairwise(rates))
    assert max(a - b for a, b in itertools.pairwise(rates[200:])) < 1e-4


def test_doubling_the_batch_doubles_the_rate_below_the_cap() -> None:
    small, large = PowerSchedule(batch_size=8), PowerSchedule(batch_size=16)
    assert power_lr(large, 1e9) == pytest.approx(2 * power_lr(small, 1e9))


def test_without_a_planned_end_the_rate_follows_the_power_law_forever() -> None:
    schedule = PowerSchedule(batch_size=1024, decay_tokens=0, total_tokens=None)
    assert power_lr(schedule, 1e15) == pytest.approx(4096 * 1e15**-0.51)


def test_without_warm_up_the_first_step_takes_lr_max() -> None:
    assert power_lr(PowerSchedule(batch_size=1, lr_max=0.01), 0) == 0.01


def test_batch_size_counts_sequences_of_4096_tokens() -> None:
    assert batch_in_sequences(4 * 4096) == 4.0
    assert batch_in_sequences(1024) == 0.25


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"lr_max": -1.0},
        {"a": 0.0},
        {"warmup_tokens": -1},
        {"decay_tokens": -1},
        {"total_tokens": 10, "warmup_tokens": 6, "decay_tokens": 5},
    ],
)
def test_impossible_schedules_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"batch_size|warmup_tokens"):
        PowerSchedule(**{"batch_size": 1.0, **wrong})  # type: ignore[arg-type]
