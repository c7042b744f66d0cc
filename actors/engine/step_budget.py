"""How many tokens a step may compute. Knows numbers only: steps are observed, no clock is read.

Whoever is being answered waits for each step to end. Without a setting, steps beside running answers are therefore as
large as fits a target time on this machine, with this model, now; while nobody waits, they are as large as pays.
"""

import statistics
from collections import deque

TARGET_S = 0.25
# Prompt tokens of a step: never fewer, since a step of a few costs nearly as much (it reads the same weights) and first
# tokens would come late where answers alone take the target; never more.
LEAST, MOST = 96, 512
# Their median counts: a step that a failover held up changes nothing.
MEMORY = 5


class StepBudget:
    """`fixed` is the operator's number of tokens in every step; None follows the target."""

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed
        self._fitting: deque[float] = deque(maxlen=MEMORY)

    def most_decodes(self, num_running: int) -> int:
        return num_running if self.fixed is None else self.fixed

    def prompt_tokens(self, num_decodes: int) -> int:
        """How many prompt tokens may join a step that continues so many answers."""
        if self.fixed is not None:
            return self.fixed - num_decodes
        if not num_decodes or not self._fitting:
            return MOST
        return max(LEAST, min(MOST, int(self.fitting)) - num_decodes)

    @property
    def fitting(self) -> float:
        """Tokens that fit the target time."""
        return statistics.median_high(self._fitting)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step has taken so long.

        Its tokens scaled to the target are a bound for those that fit, because a step has costs that do not grow with
        its tokens: a lower bound if it was shorter than the target, an upper one if it was longer. Steps of the size
        that the bound allows give a closer one, so that a few of them find the number.
        """
        fits = num_tokens * TARGET_S / max(seconds, 1e-6)
        if self._fitting:
            fits = max(fits, self.fitting) if seconds <= TARGET_S else min(fits, self.fitting)
        self._fitting.append(fits)
