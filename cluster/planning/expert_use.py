"""How many experts a batch touches, and how evenly: from measured counts, or as if tokens chose evenly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ConfigError
from cluster.expert_map import contiguous_homes
from cluster.models.spec import ModelSpec
from cluster.planning.cost import num_touched
from cluster.policy.expert_load import balancedness
from cluster.policy.placement import place


@dataclass(frozen=True, slots=True, eq=False)
class ExpertUse:
    """`counts[layer][expert]` are (token, choice) pairs, of the layers that have experts; None: all alike."""

    num_experts: int
    top_k: int
    counts: tuple[tuple[int, ...], ...] | None = None
    # What was worked out already: a search asks for the same numbers again and again.
    _touched: dict[float, float] = field(default_factory=dict, repr=False)
    _placed: dict[int, float] = field(default_factory=dict, repr=False)

    @classmethod
    def even(cls, spec: ModelSpec) -> "ExpertUse":
        return cls(spec.num_experts, spec.top_k)

    @classmethod
    def measured(cls, spec: ModelSpec, counts: Any) -> "ExpertUse":
        """`counts` as `GET /v1/experts` has them. Raises ConfigError if they are those of another model."""
        rows = counts if isinstance(counts, Sequence) else []
        shape = (len(rows), len(rows[0]) if rows else 0)
        if shape != (spec.num_expert_layers, spec.num_experts) or any(len(row) != shape[1] for row in rows):
            raise ConfigError(
                f"expert_counts={shape[0]} layers x {shape[1]} experts, the model has {spec.num_expert_layers} x "
                f"{spec.num_experts}: give the answer of /v1/experts of this model"
            )
        return cls(spec.num_experts, spec.top_k, tuple(tuple(int(n) for n in row) for row in rows))

    def touched(self, num_tokens: float) -> float:
        """Experts of a layer that get one of so many tokens, on average over layers. At least top_k for one token."""
        if self.counts is None:
            return num_touched(self.num_experts, self.top_k, num_tokens)
        if (tokens := float(f"{num_tokens:.3g}")) not in self._touched:
            self._touched[tokens] = _touched(self.counts, self.top_k, tokens)
        return self._touched[tokens]

    def reached(self, num_tokens: float, groups: int) -> float:
        """Tokens that have an expert in one group, which it is sent: on average."""
        per_group = self.num_experts // groups
        missed = 1.0
        for nth in range(self.top_k):
            # Choices of a token are all different.
            missed *= max(0.0, 1 - per_group / (self.num_experts - nth))
        return num_tokens * (1 - missed)

    def imbalance(self, num_tokens: float, groups: int) -> float:
        """Load of the busiest of `groups`, which a step waits for, over the mean: what counts say when experts are
        placed by them, times what chance adds in so few choices. From 1 to `groups`.

        Chance: the largest of `groups` sums of independent choices lies sqrt(2 ln groups) deviations above the mean,
        about; choices of one token exclude each other, which this leaves out.
        """
        if groups == 1 or num_tokens <= 0:
            return 1.0
        deviation = math.sqrt((groups - 1) / (num_tokens * self.top_k))
        by_chance = 1 + deviation * math.sqrt(2 * math.log(groups)) * _OF_TWO.get(groups, 1.0)
        return min(float(groups), by_chance / self._balancedness(groups))

    def _balancedness(self, groups: int) -> float:
        """As a rebalance would leave it, without copies."""
        if self.counts is None:
            return 1.0
        if groups not in self._placed:
            now = contiguous_homes(len(self.counts), self.num_experts, groups)
            homes = place(self.counts, now, groups, self.num_experts)
            self._placed[groups] = balancedness(self.counts, homes, groups)
        return self._placed[groups]


# Of two groups one has as much more as the other one has less: the larger lies sqrt(2 / pi) deviations above the mean.
_OF_TWO = {2: math.sqrt(2 / math.pi) / math.sqrt(2 * math.log(2))}


def _touched(counts: tuple[tuple[int, ...], ...], top_k: int, num_tokens: float) -> float:
    found, layers = 0.0, 0
    for row in counts:
        if total := sum(row):
            layers += 1
            found += sum(1 - (1 - min(1.0, top_k * n / total)) ** num_tokens for n in row)
    return found / layers if layers else num_touched(len(counts[0]), top_k, num_tokens)
