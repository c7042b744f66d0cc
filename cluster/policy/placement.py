"""Which groups hold which experts: load balancing as pure functions of counts. No Ray, no torch, no clock.

Per layer this is the method of DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB): hot experts get redundant
copies, then the copies are packed onto groups of equal size. Our rules on top of it: no expert twice in a group,
experts stay at home where that costs no balance, and a layer changes only if it gets better.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from cluster.errors import ConfigError
from cluster.expert_map import Homes, LayerHomes
from cluster.policy.expert_load import Counts, balancedness, layer_balancedness

# Trying all permutations of more groups than this takes longer than a greedy match is worth.
MAX_GROUPS_EXACT = 5
# Sums of shares such as 10/3 differ in the last bits: less than this is no gain.
NO_GAIN = 1e-9


@dataclass(frozen=True, slots=True)
class Move:
    """An expert that the replicas of a group have to load before the plan's homes can be published."""

    layer: int
    expert: int
    group: int


@dataclass(frozen=True, slots=True)
class RebalancePlan:
    """A rebalance, not yet done. `reason` says why to skip it; then `homes` are the current ones.

    `before` and `after` are balancedness under the same load. `changed_layers` may have layers without a move:
    there, groups only drop copies. `bytes_to_move` counts every replica of a receiving group.
    """

    homes: Homes
    before: float
    after: float
    changed_layers: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()
    bytes_to_move: int = 0
    reason: str = ""

    @property
    def is_worthwhile(self) -> bool:
        return not self.reason


def plan_rebalance(
    counts: Counts,
    current: Homes,
    *,
    slots_per_layer: int,
    bytes_per_expert: int,
    replicas: Sequence[int],
    threshold: float = 0.9,
    min_gain: float = 0.02,
) -> RebalancePlan:
    """What a rebalance would do under this load. `replicas[group]` is the group's number of replicas.

    Skipped without load, at a balancedness of `threshold` or more, and when no layer gains `min_gain` in
    balancedness; layers that are at the threshold stay as they are. Homes that take more than the slots are always
    replaced. A threshold of 1 and a gain of 0 take every improvement. Raises ConfigError as check_slots.
    """
    num_groups = len(replicas)
    before = balancedness(counts, current, num_groups)
    homes = place(counts, current, num_groups, slots_per_layer, enough=threshold, min_gain=min_gain)
    if all(can_hold(layer, num_groups, slots_per_layer) for layer in current):
        if not any(map(any, counts)):
            return RebalancePlan(current, before, before, reason="no load was seen")
        if before >= threshold:
            reason = f"balancedness {before:.3f} is not below the threshold {threshold:.3f}"
            return RebalancePlan(current, before, before, reason=reason)
        if homes == current:
            return RebalancePlan(current, before, before, reason=f"no layer would gain {min_gain:.3f} in balancedness")
    moves = moves_between(current, homes)
    return RebalancePlan(
        homes,
        before,
        balancedness(counts, homes, num_groups),
        tuple(layer for layer, (old, new) in enumerate(zip(current, homes, strict=True)) if old != new),
        moves,
        sum(replicas[move.group] for move in moves) * bytes_per_expert,
    )


def place(
    counts: Counts,
    current: Homes,
    num_groups: int,
    slots_per_layer: int,
    *,
    enough: float = 1.0,
    min_gain: float = 0.0,
) -> Homes:
    """New homes under the load `counts[layer][expert]`, layer by layer; every group has slots_per_layer/groups slots.

    A layer stays as it is if it is `enough` balanced (without load it is) or would gain less than `min_gain`, unless
    its current homes take more slots than there are. Slots stay empty when all experts with load are in all groups.
    Raises ConfigError as check_slots.
    """
    homes = []
    for load, old in zip(counts, current, strict=True):
        check_slots(len(old), num_groups, slots_per_layer)
        must_change = not can_hold(old, num_groups, slots_per_layer)
        before = layer_balancedness(load, old, num_groups)
        if not must_change and before >= enough:
            homes.append(old)
            continue
        new = place_layer(load, old, num_groups, slots_per_layer)
        gain = layer_balancedness(load, new, num_groups) - before
        homes.append(new if must_change or (gain > NO_GAIN and gain >= min_gain) else old)
    return tuple(homes)


def check_slots(num_experts: int, num_groups: int, slots_per_layer: int) -> None:
    """Raise ConfigError if the slots can't hold every expert or can't be shared evenly by the groups."""
    least = -(-num_experts // num_groups) * num_groups
    if slots_per_layer < num_experts:
        raise ConfigError(f"slots_per_layer={slots_per_layer} can't hold {num_experts} experts: choose {least} or more")
    if slots_per_layer % num_groups:
        lower = slots_per_layer - slots_per_layer % num_groups
        choices = [str(n) for n in (lower, lower + num_groups) if n >= least]
        raise ConfigError(
            f"groups={num_groups} does not divide slots_per_layer={slots_per_layer}: choose " + " or ".join(choices)
        )


def can_hold(homes: LayerHomes, num_groups: int, slots_per_layer: int) -> bool:
    """True if no group needs more than its share of the slots."""
    held = Counter(group for groups in homes for group in groups)
    return all(count <= slots_per_layer // num_groups for count in held.values())


def moves_between(old: Homes, new: Homes) -> tuple[Move, ...]:
    """What has to be loaded to get from old to new homes, ordered by layer, expert, group."""
    return tuple(
        Move(layer, expert, group)
        for layer, (before, after) in enumerate(zip(old, new, strict=True))
        for expert, groups in enumerate(after)
        for group in sorted(set(groups) - set(before[expert]))
    )


def place_layer(load: Sequence[float], current: LayerHomes, num_groups: int, slots: int) -> LayerHomes:
    """The best homes that the greedy method finds for one layer; `current` only decides between equals."""
    copies = replicate(load, slots, num_groups)
    packs = pack([count / n for count, n in zip(load, copies, strict=True)], copies, num_groups, slots // num_groups)
    group_of = match_packs(packs, current)
    homes: list[list[int]] = [[] for _ in load]
    for group, experts in zip(group_of, packs, strict=True):
        for expert in experts:
            homes[expert].append(group)
    _settle_equals(load, homes, current)
    # Preferred first: where the expert was preferred before, as its weights are there already.
    return tuple(
        (*(g for g in old if g in groups), *sorted(set(groups) - set(old)))
        for groups, old in zip(homes, current, strict=True)
    )


def replicate(load: Sequence[float], num_slots: int, max_copies: int) -> list[int]:
    """Copies per expert: one each, then slot by slot one more for the expert with the highest load per copy.

    An expert without load gets no second copy: loading it would cost bytes and gain nothing.
    """
    copies = [1] * len(load)
    hot = [(-count, expert) for expert, count in enumerate(load) if count and max_copies > 1]
    heapq.heapify(hot)
    for _ in range(num_slots - len(load)):
        if not hot:
            break
        _, expert = heapq.heappop(hot)
        copies[expert] += 1
        if copies[expert] < max_copies:
            heapq.heappush(hot, (-load[expert] / copies[expert], expert))
    return copies


def pack(shares: Sequence[float], copies: Sequence[int], num_packs: int, capacity: int) -> list[list[int]]:
    """Put `copies[expert]` copies of load `shares[expert]` into packs: heaviest first, each into the lightest pack.

    Ties go to the lower expert and the lower pack. No pack gets more than `capacity` experts, nor one twice. Copies
    must be at most num_packs each and num_packs x capacity in all.
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    weights = [0.0] * num_packs
    for expert in sorted(range(len(shares)), key=lambda e: -shares[e]):
        for _ in range(copies[expert]):
            free = [p for p in range(num_packs) if len(packs[p]) < capacity and expert not in packs[p]]
            if free:
                chosen = min(free, key=weights.__getitem__)
            else:
                chosen = _make_room(packs, weights, shares, expert, capacity)
            packs[chosen].append(expert)
            weights[chosen] += shares[expert]
    return packs


def _make_room(
    packs: list[list[int]], weights: list[float], shares: Sequence[float], expert: int, capacity: int
) -> int:
    """Free a slot in a pack without the expert, by moving out another one, when all packs with free slots have it.

    There is always one to move: the full pack has more experts than the other one, and not this one.
    """
    full = min((p for p, held in enumerate(packs) if expert not in held), key=weights.__getitem__)
    spare = min((p for p, held in enumerate(packs) if len(held) < capacity), key=weights.__getitem__)

    def heavier_after(guest: int) -> float:
        return max(weights[full] - shares[guest] + shares[expert], weights[spare] + shares[guest])

    guest = min((e for e in packs[full] if e not in packs[spare]), key=heavier_after)
    packs[full].remove(guest)
    packs[spare].append(guest)
    weights[full] -= shares[guest]
    weights[spare] += shares[guest]
    return full


def match_packs(packs: Sequence[Sequence[int]], current: LayerHomes) -> list[int]:
    """The group for each pack, so that many experts stay where they are: groups are interchangeable.

    The most that is possible for up to MAX_GROUPS_EXACT groups, greedily the largest overlap first for more.
    """
    numbers = range(len(packs))
    stay = [Counter(group for expert in pack for group in current[expert]) for pack in packs]
    if len(packs) <= MAX_GROUPS_EXACT:
        return list(max(permutations(numbers), key=lambda order: sum(stay[p][g] for p, g in enumerate(order))))
    group_of: dict[int, int] = {}
    taken: set[int] = set()
    overlaps = [(-count, p, group) for p, counts in enumerate(stay) for group, count in counts.items()]
    for _, p, group in sorted(overlaps):
        if p not in group_of and group not in taken:
            group_of[p] = group
            taken.add(group)
    rest = (group for group in numbers if group not in taken)
    return [group_of[p] if p in group_of else next(rest) for p in numbers]


def _settle_equals(load: Sequence[float], homes: list[list[int]], current: LayerHomes) -> None:
    """Let experts of the same load, with one copy each, swap homes in place so that they stay where they were."""
    equals: dict[float, list[int]] = {}
    for expert, groups in enumerate(homes):
        if len(groups) == 1:
            equals.setdefault(load[expert], []).append(expert)
    for experts in equals.values():
        places = [homes[expert][0] for expert in experts]
        movers = []
        for expert in experts:
            home = next((group for group in current[expert] if group in places), None)
            if home is None:
                movers.append(expert)
            else:
                places.remove(home)
                homes[expert] = [home]
        for expert, group in zip(movers, places, strict=True):
            homes[expert] = [group]
