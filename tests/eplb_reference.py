"""Balanced packing and replication as EPLB publishes them (https://github.com/deepseek-ai/EPLB), written from their
description: the oracle for cluster.policy.placement where the rules are the same.
"""

from collections.abc import Sequence


def balanced_packing(weights: Sequence[float], num_packs: int) -> list[int]:
    """Pack of each item, equally many in each: heaviest first, into the lightest pack with room, lowest at ties."""
    room = [len(weights) // num_packs] * num_packs
    sums = [0.0] * num_packs
    pack_of = [-1] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: weights[i], reverse=True):  # stable, reversed or not
        lightest = -1
        for p in range(num_packs):
            if room[p] and (lightest < 0 or sums[p] < sums[lightest]):
                lightest = p
        pack_of[item] = lightest
        sums[lightest] += weights[item]
        room[lightest] -= 1
    return pack_of


def replicate_experts(weights: Sequence[float], num_slots: int) -> list[int]:
    """Copies of each expert: every slot beyond the first ones goes to the highest weight per copy, lowest at ties."""
    copies = [1] * len(weights)
    while sum(copies) < num_slots:
        per_copy = [w / n for w, n in zip(weights, copies, strict=True)]
        copies[per_copy.index(max(per_copy))] += 1
    return copies
