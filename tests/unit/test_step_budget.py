"""The budget of a step follows what steps have taken. Seconds are numbers here: no test waits."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.step_budget import LEAST, MOST, TARGET_S, StepBudget


def machine(fixed_s: float, per_token_s: float) -> Callable[[int], float]:
    return lambda num_tokens: fixed_s + per_token_s * num_tokens


def run(budget: StepBudget, seconds: Callable[[int], float], num_steps: int, num_decodes: int = 8) -> list[float]:
    """Prompts never run out: every step uses its budget."""
    taken = []
    for _ in range(num_steps):
        num_tokens = num_decodes + budget.prompt_tokens(num_decodes)
        taken.append(seconds(num_tokens))
        budget.observe(num_tokens, taken[-1])
    return taken


def test_a_setting_is_kept_whatever_steps_take() -> None:
    budget = StepBudget(100)
    run(budget, machine(1, 1), 20)
    assert [budget.prompt_tokens(n) for n in (0, 30, 100)] == [100, 70, 0]
    assert budget.most_decodes(500) == 100


def test_while_nobody_waits_steps_are_large() -> None:
    budget = StepBudget()
    assert budget.prompt_tokens(0) == MOST
    run(budget, machine(0, 1), 20)
    assert budget.prompt_tokens(0) == MOST
    assert budget.most_decodes(500) == 500, "those who are being answered never wait for each other"


def test_one_large_step_tells_enough_for_the_next() -> None:
    """512 tokens in 0.9 s: the step after it has answers to continue, and must not take as long again."""
    slow = machine(0.1, 0.0015)
    budget = StepBudget()
    budget.observe(MOST, slow(MOST))
    taken = run(budget, slow, 20)
    assert max(taken) < 1.4 * TARGET_S
    assert max(taken[5:]) < 1.1 * TARGET_S


def test_where_answers_alone_take_the_target_prompts_are_read_nevertheless() -> None:
    budget = StepBudget()
    run(budget, machine(0.25, 0.003), 20)
    assert budget.prompt_tokens(32) == LEAST


@given(fixed_ms=st.floats(1, 100), tokens_per_s=st.floats(900, 5000), first=st.integers(1, MOST))
def test_the_target_is_found_from_any_start_and_kept(fixed_ms: float, tokens_per_s: float, first: int) -> None:
    seconds = machine(fixed_ms / 1000, 1 / tokens_per_s)
    budget = StepBudget()
    budget.observe(first, seconds(first))
    run(budget, seconds, 40)
    taken = run(budget, seconds, 10)
    assert max(taken) <= 1.1 * TARGET_S
    wasted = seconds(8 + budget.prompt_tokens(8) + 16)
    assert wasted > 0.9 * TARGET_S or budget.prompt_tokens(8) == MOST - 8, "smaller than need be"


@given(st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 1000)), max_size=20), st.integers(1, 1000))
def test_some_prompt_tokens_join_every_step_and_never_too_many(steps: list[tuple[int, float]], decodes: int) -> None:
    budget = StepBudget()
    for num_tokens, seconds in steps:
        budget.observe(num_tokens, seconds)
    assert LEAST <= budget.prompt_tokens(decodes) <= max(LEAST, MOST - decodes) or not steps


@pytest.mark.parametrize("outliers", [[5.0], [2.0, 9.0], [0.0]])
def test_steps_that_something_else_held_up_change_nothing(outliers: list[float]) -> None:
    budget = StepBudget()
    seconds = machine(0.05, 0.001)
    run(budget, seconds, 30)
    usual = budget.prompt_tokens(8)
    for outlier in outliers:
        budget.observe(8 + usual, outlier)
    assert abs(budget.prompt_tokens(8) - usual) <= 1


def test_a_machine_that_becomes_slower_or_faster_is_followed() -> None:
    budget = StepBudget()
    run(budget, machine(0.05, 0.001), 30)
    for seconds in (machine(0.08, 0.0015), machine(0.02, 0.0005)):
        run(budget, seconds, 40)
        assert run(budget, seconds, 1)[0] == pytest.approx(TARGET_S, rel=0.1)


def test_short_steps_say_nothing_against_longer_ones() -> None:
    """A step of one token costs nearly as much as one of fifty: it reads the same weights."""
    budget = StepBudget()
    seconds = machine(0.08, 0.001)
    run(budget, seconds, 30)
    usual = budget.prompt_tokens(8)
    for _ in range(100):
        budget.observe(1, seconds(1))
    assert budget.prompt_tokens(8) == usual
