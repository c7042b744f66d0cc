"""Placement: the EPLB method as oracle where the rules are the same, properties for the rest."""

import random
import time
from itertools import permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.expert_map import ExpertMap, Homes, contiguous_homes
from cluster.policy.expert_load import balancedness, group_loads, layer_balancedness
from cluster.policy.placement import (
    MAX_GROUPS_EXACT,
    Move,
    RebalancePlan,
    can_hold,
    check_slots,
    match_packs,
    moves_between,
    pack,
    place,
    place_layer,
    plan_rebalance,
    replicate,
)
from tests.eplb_reference import balanced_packing, replicate_experts

# Few distinct small numbers make ties, large ones make skew.
LOADS = st.one_of(st.integers(0, 3), st.integers(0, 100), st.integers(0, 10**6))


@st.composite
def problems(draw: st.DrawFn, max_copies: int = 2) -> tuple[list[list[int]], Homes, int, int]:
    """(counts, current homes, groups, slots per layer); the homes fit the slots, some experts have copies."""
    num_groups, size, num_layers = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 2))
    num_experts = num_groups * size
    slots = num_groups * draw(st.integers(size, max_copies * size))
    counts = [draw(st.lists(LOADS, min_size=num_experts, max_size=num_experts)) for _ in range(num_layers)]
    shuffled = draw(st.permutations(range(num_experts)))
    layer = [[shuffled[expert] // size] for expert in range(num_experts)]
    for expert, group in draw(st.lists(st.tuples(st.integers(0, num_experts - 1), st.integers(0, num_groups - 1)))):
        if group not in layer[expert] and sum(group in groups for groups in layer) < slots // num_groups:
            layer[expert].append(group)
    return counts, (tuple(map(tuple, layer)),) * num_layers, num_groups, slots


def check_homes(homes: Homes, num_groups: int, slots: int) -> None:
    ExpertMap(1, num_groups, homes).check_integrity()
    assert all(can_hold(layer, num_groups, slots) for layer in homes)


# -- the same as EPLB where the rules are the same -------------------------------------------------------------------


@given(problems(max_copies=1))
@settings(max_examples=500)
def test_without_redundancy_group_loads_are_those_of_eplb(problem: tuple[list[list[int]], Homes, int, int]) -> None:
    counts, current, num_groups, slots = problem
    for load, old in zip(counts, current, strict=True):
        pack_of = balanced_packing(load, num_groups)
        expected = sorted(sum(n for n, p in zip(load, pack_of, strict=True) if p == g) for g in range(num_groups))
        assert sorted(group_loads(load, place_layer(load, old, num_groups, slots), num_groups)) == expected
        [placed] = place([load], (old,), num_groups, slots)
        assert max(group_loads(load, placed, num_groups)) == min(expected[-1], max(group_loads(load, old, num_groups)))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(0, 20))
def test_without_the_limit_of_groups_copies_are_those_of_eplb(load: list[int], extra: int) -> None:
    assert replicate(load, len(load) + extra, max_copies=100) == replicate_experts(load, len(load) + extra)


def test_a_layer_worked_out_by_hand() -> None:
    """90 goes to the first group, 40 to the second, 30 to it, 20 to it as well (70 < 90), then it is full."""
    assert pack([20, 90, 40, 5, 30, 1], [1] * 6, num_packs=2, capacity=3) == [[1, 3, 5], [2, 4, 0]]


# -- rules of our own ------------------------------------------------------------------------------------------------


@given(problems())
@settings(max_examples=500)
def test_every_expert_has_a_home_and_no_layer_gets_worse(problem: tuple[list[list[int]], Homes, int, int]) -> None:
    counts, current, num_groups, slots = problem
    homes = place(counts, current, num_groups, slots)
    check_homes(homes, num_groups, slots)
    for load, old, new in zip(counts, current, homes, strict=True):
        if new == old:
            continue
        assert layer_balancedness(load, new, num_groups) > layer_balancedness(load, old, num_groups)
        used, loaded = sum(map(len, new)), sum(map(bool, load))
        assert used == min(slots, len(load) - loaded + loaded * num_groups)


@given(problems())
def test_the_same_question_has_the_same_answer_and_asking_again_changes_nothing(
    problem: tuple[list[list[int]], Homes, int, int],
) -> None:
    counts, current, num_groups, slots = problem
    homes = place(counts, current, num_groups, slots)
    assert place(counts, current, num_groups, slots) == homes
    assert place(counts, homes, num_groups, slots) == homes


@given(problems())
def test_homes_that_no_longer_fit_are_replaced_even_without_load(
    problem: tuple[list[list[int]], Homes, int, int],
) -> None:
    counts, current, num_groups, _ = problem
    fewest = len(counts[0])
    assume(not can_hold(current[0], num_groups, fewest))
    for load in (counts, [[0] * fewest] * len(counts)):
        homes = place(load, current, num_groups, fewest)
        check_homes(homes, num_groups, fewest)
        assert all(len(groups) == 1 for groups in homes[0])


@pytest.mark.parametrize("load", [[0] * 4, [5] * 4, [9, 1, 5, 5], [9, 0, 0, 0]])
def test_balanced_or_idle_layers_and_those_that_can_not_gain_stay(load: list[int]) -> None:
    current = contiguous_homes(1, 4, 2)
    assert place([load], current, 2, 4) == current


def test_redundancy_splits_a_hot_expert_over_groups() -> None:
    [layer] = place([[12, 2, 2, 2]], contiguous_homes(1, 4, 2), 2, 6)
    assert sorted(layer[0]) == [0, 1]
    assert layer[0][0] == 0, "preferred where it was"
    assert layer_balancedness([12, 2, 2, 2], layer, 2) > 0.9


def test_the_groups_of_an_expert_share_its_load() -> None:
    assert group_loads([6, 2], ((0, 1), (1,)), 2) == [3, 5]
    assert balancedness([[6, 2], [0, 0]], (((0, 1), (1,)),) * 2, 2) == 0.8, "the idle layer does not count"


def test_an_expert_has_at_most_one_copy_per_group_and_an_idle_one_a_single_copy() -> None:
    assert replicate([100, 1, 0, 0], num_slots=8, max_copies=2) == [2, 2, 1, 1]


@given(st.data())
def test_copies_always_find_a_group_without_the_expert(data: st.DataObject) -> None:
    num_packs, capacity = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    copies: list[int] = []
    while sum(copies) < num_packs * capacity:
        copies.append(data.draw(st.integers(1, min(num_packs, num_packs * capacity - sum(copies)))))
    shares = data.draw(st.lists(LOADS, min_size=len(copies), max_size=len(copies)))
    packs = pack(shares, copies, num_packs, capacity)
    assert all(len(held) == len(set(held)) == capacity for held in packs)
    assert [sum(expert in held for held in packs) for expert in range(len(copies))] == copies


def test_an_expert_makes_way_for_the_second_copy_of_another() -> None:
    """The only free slot is in the pack that has expert 4 already: the lightest of the others moves there."""
    assert pack([9, 4, 3, 1, 0.5], [1, 1, 1, 1, 2], num_packs=2, capacity=3) == [[0, 4, 3], [1, 2, 4]]


# -- staying at home -------------------------------------------------------------------------------------------------


def test_equal_experts_stay_and_only_the_odd_ones_move() -> None:
    """Both hot experts are in group 0: one of them leaves, one of the cold ones makes way."""
    homes = place([[9, 9, 0, 0, 0, 0]], contiguous_homes(1, 6, 2), 2, 6)
    assert moves_between(contiguous_homes(1, 6, 2), homes) == (Move(0, 1, 1), Move(0, 5, 0))


def test_groups_are_relabelled_before_experts_move() -> None:
    """Heaviest first would be in group 0, but groups 1 and 2 have its pack."""
    current = (((2,), (0,), (1,), (2,), (0,), (1,)),)
    homes = place([[50, 30, 20, 9, 8, 1]], current, 3, 6)
    assert homes != current
    assert len(moves_between(current, homes)) == 2


@given(st.data(), st.integers(2, MAX_GROUPS_EXACT + 2))
def test_packs_match_the_groups_that_hold_most_of_them(data: st.DataObject, num_groups: int) -> None:
    experts = range(3 * num_groups)
    current = tuple((data.draw(st.integers(0, num_groups - 1)),) for _ in experts)
    shuffled = data.draw(st.permutations(experts))
    packs = [shuffled[3 * g : 3 * g + 3] for g in range(num_groups)]

    def num_staying(order: tuple[int, ...]) -> int:
        return sum(order[p] in current[expert] for p, held in enumerate(packs) for expert in held)

    order = tuple(match_packs(packs, current))
    assert sorted(order) == list(range(num_groups))
    if num_groups <= MAX_GROUPS_EXACT:
        assert num_staying(order) == max(map(num_staying, permutations(range(num_groups))))
    else:
        assert num_staying(order) * 2 >= max(map(num_staying, permutations(range(num_groups))))


# -- plans -----------------------------------------------------------------------------------------------------------


def plan(counts: list[list[int]], current: Homes, replicas: tuple[int, ...], **options: float) -> RebalancePlan:
    slots = len(current[0])
    return plan_rebalance(counts, current, slots_per_layer=slots, bytes_per_expert=100, replicas=replicas, **options)  # type: ignore[arg-type]


def test_a_plan_says_what_it_costs_and_what_it_gains() -> None:
    current = contiguous_homes(2, 4, 2)
    made = plan([[4, 4, 1, 1], [3, 3, 3, 3]], current, replicas=(1, 2))
    assert made.is_worthwhile
    assert (made.before, made.after) == (pytest.approx((5 / 8 + 1) / 2), 1.0)
    assert made.changed_layers == (0,)
    assert made.moves == (Move(0, 1, 1), Move(0, 3, 0))
    assert made.bytes_to_move == 300, "group 1 has two replicas, and each loads the expert"
    assert made.homes == (((0,), (1,), (1,), (0,)), current[1])


@pytest.mark.parametrize(
    ("load", "options", "reason"),
    [
        ([0, 0, 0, 0], {}, "no load was seen"),
        ([6, 5, 5, 5], {}, "balancedness 0.955 is not below the threshold 0.900"),
        ([9, 0, 1, 0], {}, "no layer would gain 0.020 in balancedness"),
        ([60, 40, 40, 39], {"threshold": 1.0, "min_gain": 0.2}, "no layer would gain 0.200 in balancedness"),
    ],
)
def test_a_plan_that_is_not_worthwhile_says_why(load: list[int], options: dict[str, float], reason: str) -> None:
    current = contiguous_homes(1, 4, 2)
    made = plan([load], current, (1, 1), **options)
    assert not made.is_worthwhile
    assert made.reason == reason
    assert (made.homes, made.moves, made.bytes_to_move, made.after) == (current, (), 0, made.before)


def test_layers_above_the_threshold_are_left_alone() -> None:
    current = contiguous_homes(2, 4, 2)
    made = plan([[60, 50, 50, 49], [9, 9, 1, 1]], current, (1, 1), min_gain=0.0)
    assert made.changed_layers == (1,)


def test_homes_that_take_too_many_slots_are_worth_a_plan_whatever_the_load() -> None:
    current = (((0, 1), (0,), (1,), (1, 0)),)
    made = plan([[0, 0, 0, 0]], current, (1, 1))
    assert made.is_worthwhile
    assert (made.changed_layers, made.moves) == ((0,), ()), "copies are dropped, nothing has to be loaded"


@given(problems())
def test_moves_are_the_difference_of_homes(problem: tuple[list[list[int]], Homes, int, int]) -> None:
    counts, current, num_groups, slots = problem
    replicas = tuple(range(1, num_groups + 1))
    made = plan_rebalance(
        counts, current, slots_per_layer=slots, bytes_per_expert=7, replicas=replicas, threshold=1.0, min_gain=0.0
    )
    old, new = (
        {(la, e, g) for la, layer in enumerate(h) for e, gs in enumerate(layer) for g in gs}
        for h in (current, made.homes)
    )
    assert {(m.layer, m.expert, m.group) for m in made.moves} == new - old
    assert len(made.moves) == len(new - old)
    assert made.bytes_to_move == 7 * sum(1 + group for _, _, group in new - old)
    assert made.is_worthwhile == (made.homes != current)
    assert made.after == balancedness(counts, made.homes, num_groups) >= made.before


@pytest.mark.parametrize(
    ("slots", "groups", "message"),
    [
        (38, 4, "slots_per_layer=38 can't hold 40 experts: choose 40 or more"),
        (42, 4, "groups=4 does not divide slots_per_layer=42: choose 40 or 44"),
        (41, 3, "groups=3 does not divide slots_per_layer=41: choose 42"),
    ],
)
def test_slots_that_do_not_work_are_refused_with_the_choices(slots: int, groups: int, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_slots(40, groups, slots)
    assert str(raised.value) == message


def test_many_experts_and_layers_are_placed_in_a_second() -> None:
    """The largest published models have about so many."""
    rng = random.Random(0)
    counts = [[int(rng.paretovariate(1)) for _ in range(512)] for _ in range(60)]
    homes, began = contiguous_homes(60, 512, 8), time.process_time()
    plan = plan_rebalance(counts, homes, slots_per_layer=544, bytes_per_expert=1, replicas=[1] * 8)
    assert time.process_time() - began < 5
    assert plan.after > 0.99 > 0.5 > plan.before
    for layer in plan.homes:
        assert all(groups and len(set(groups)) == len(groups) for groups in layer)
        assert all(sum(group in groups for groups in layer) <= 68 for group in range(8))
