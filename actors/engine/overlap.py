"""Whether a step goes through the layers as two micro-batches: measured, for each size of step.

Overlap hides the experts' time behind attention, and costs twice as many dispatches and smaller matrix products. Which
weighs more depends on the model, the machine, the lane and the size of the step: so both ways are tried, and the faster
one is used.
"""

import statistics
from collections import defaultdict, deque

from cluster.messages.actors import OverlapMode

# Smaller steps are not worth a trial: even on GPUs two micro-batches cost more there. And in bfloat16 the halves of a
# prompt round differently than the whole: the fewer steps are cut on trial, the better equal requests agree.
LEAST_TOKENS = 128
# Steps of each way before one is preferred, and remembered ones.
TRIAL, MEMORY = 4, 8
# Every so many steps, the other way is tried again: load and replicas change.
RETRY = 64
# Two micro-batches must be this much faster: where both are equal, the plain way is better.
GAIN = 0.97


class Overlap:
    """Sizes are told apart by their power of two."""

    def __init__(self, mode: OverlapMode) -> None:
        self.mode = mode
        self._seconds: dict[tuple[int, bool], deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))
        self._num_steps: dict[int, int] = defaultdict(int)

    def is_wanted(self, num_tokens: int) -> bool:
        if self.mode != "auto" or num_tokens < LEAST_TOKENS:
            return self.mode == "always"
        size = num_tokens.bit_length()
        plain, split = self._seconds[size, False], self._seconds[size, True]
        if len(plain) != len(split) and min(len(plain), len(split)) < TRIAL:
            return len(split) < len(plain)
        if len(split) < TRIAL:
            return False
        self._num_steps[size] += 1
        is_faster = statistics.median(split) < GAIN * statistics.median(plain)
        return is_faster != (self._num_steps[size] % RETRY == 0)

    def observe(self, num_tokens: int, is_split: bool, seconds: float) -> None:
        """A step has taken so long."""
        self._seconds[num_tokens.bit_length(), is_split].append(seconds)
