"""Load of experts: how many (token, choice) pairs each expert of each layer got. Plain lists, no Ray."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cluster.expert_map import ExpertMap, Homes, LayerHomes
from cluster.messages.state import ExpertsReport

Counts = Sequence[Sequence[int]]
Array = NDArray[np.int64]  # the same

NUM_STEPS = 30


def group_loads(counts: Sequence[float], homes: LayerHomes, num_groups: int) -> list[float]:
    """Load of each group in one layer. The groups of an expert share its tokens evenly, as fronts alternate."""
    loads = [0.0] * num_groups
    for groups, count in zip(homes, counts, strict=True):
        for group in groups:
            loads[group] += count / len(groups)
    return loads


def layer_balancedness(counts: Sequence[float], homes: LayerHomes, num_groups: int) -> float:
    """Mean/max load over groups: 1 is perfect, 1/groups is all on one. 1 without load."""
    loads = group_loads(counts, homes, num_groups)
    return sum(loads) / num_groups / max(loads) if any(loads) else 1.0


def balancedness(counts: Counts, homes: Homes, num_groups: int) -> float:
    """Mean over the layers that have load. 1 without load."""
    ratios = [layer_balancedness(c, h, num_groups) for c, h in zip(counts, homes, strict=True) if any(c)]
    return sum(ratios) / len(ratios) if ratios else 1.0


class ExpertLoad:
    """Sums the ever-growing counts of fronts; a front that is gone keeps its share.

    `counts` are those since the start. Balance is judged by `recent` ones: load of yesterday must not hold experts.
    """

    def __init__(self, num_layers: int, num_experts: int, window_s: float = 300.0) -> None:
        self._counts: Array = np.zeros((num_layers, num_experts), np.int64)
        self.window_s = window_s
        self._last: dict[str, Array] = {}
        # (time, counts), oldest first: what recent counts are counted from, and the next ones to count from.
        self._marks: deque[tuple[float, Array]] = deque()

    @property
    def counts(self) -> list[list[int]]:
        return cast("list[list[int]]", self._counts.tolist())

    @property
    def recent(self) -> list[list[int]]:
        """Counts of about the last `window_s` seconds; it slides in steps of a thirtieth."""
        recent = self._counts - self._marks[0][1] if self._marks else self._counts
        return cast("list[list[int]]", recent.tolist())

    def update(self, reports: Mapping[str, Counts | Array], now: float) -> None:
        """Add what each front has counted since its last report. A restarted front counts from zero again.

        `now` is any clock in seconds that does not jump.
        """
        self._mark(now)
        for front, reported in reports.items():
            if len(reported) == 0:
                continue
            counts, last = np.asarray(reported, np.int64), self._last.get(front)
            restarted = last is None or counts[0].sum() < last[0].sum()
            self._counts += counts if restarted or last is None else counts - last
            self._last[front] = counts

    def balancedness(self, expert_map: ExpertMap) -> float:
        """Of recent load: mean over layers of mean/max load over groups, see `balancedness`."""
        return balancedness(self.recent, expert_map.homes, expert_map.num_groups)

    def report(self, expert_map: ExpertMap) -> ExpertsReport:
        return ExpertsReport(
            counts=_frozen(self.counts),
            recent_counts=_frozen(self.recent),
            window_seconds=self.window_s,
            balancedness=self.balancedness(expert_map),
            map_version=expert_map.version,
            placement=expert_map.homes,
        )

    def _mark(self, now: float) -> None:
        if not self._marks or now - self._marks[-1][0] >= self.window_s / NUM_STEPS:
            self._marks.append((now, self._counts.copy()))
        while len(self._marks) > 1 and now - self._marks[1][0] >= self.window_s:
            self._marks.popleft()


def _frozen(counts: Counts) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in counts)
