"""Which experts tokens choose, where they are at home, and how unevenly that loads groups.

Shapes: L layers with experts, E experts.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.expert_map import contiguous_homes
from cluster.models.spec import ModelSpec
from cluster.planning.expert_use import ExpertUse
from cluster.policy.expert_load import ExpertLoad, balancedness, group_loads

# A hot expert gets as many tokens as so many others together.
HOT = 16.0
# Popularity is handed to placement, which counts, as choices of so many tokens.
TOKENS = 1_000_000


class ExpertTraffic:
    """`spread` is the standard deviation of the logarithm of an expert's popularity; 0: all alike. Measured counts of
    `use` win over it.
    """

    def __init__(self, spec: ModelSpec, use: ExpertUse, groups: int, window_s: float, spread: float, seed: int) -> None:
        shape = (spec.num_expert_layers, spec.num_experts)
        dice = np.random.default_rng(seed)
        self._popularity_LE: NDArray[Any] = (
            np.array(use.counts, float) if use.counts is not None else dice.lognormal(0.0, spread, shape)
        )
        self._dice, self._top_k, self._groups = dice, spec.top_k, groups
        self._num_tokens = 0.0
        self._choices_LE = np.zeros(shape)
        self.load = ExpertLoad(*shape, window_s)
        self.homes = contiguous_homes(*shape, groups)
        self._normalise()

    def _normalise(self) -> None:
        """Shares of a layer's choices; and by group, of the busiest group's load."""
        self._popularity_LE /= self._popularity_LE.sum(axis=1, keepdims=True)
        counts = (TOKENS * self._popularity_LE).astype(np.int64).tolist()
        self.balancedness = balancedness(counts, self.homes, self._groups)
        loads = [group_loads(row, homes, self._groups) for row, homes in zip(counts, self.homes, strict=True)]
        totals = np.array(loads).sum(axis=0)
        self.shares: list[float] = (totals / totals.max()).tolist()

    def heat(self) -> None:
        """From now on one expert of each layer is hot."""
        layers = np.arange(len(self._popularity_LE))
        hot = self._dice.integers(self._popularity_LE.shape[1], size=len(layers))
        self._popularity_LE[layers, hot] += HOT / self._popularity_LE.shape[1]
        self._normalise()

    def move(self, homes: Any) -> None:
        self.homes = homes
        self._normalise()

    def see(self, num_tokens: float, now: float) -> None:
        """So many tokens have been computed since the last time."""
        self._choices_LE += num_tokens * self._top_k * self._popularity_LE
        self.load.update({"all": np.round(self._choices_LE).astype(np.int64)}, now)
