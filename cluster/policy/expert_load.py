"""Load of experts: how many (token, choice) pairs each expert of each layer got. Plain lists, no Ray."""

from collections import deque
from collections.abc import Mapping, Sequence

from cluster.expert_map import ExpertMap, Homes
from cluster.messages.state import ExpertsReport

Counts = Sequence[Sequence[int]]
LayerHomes = tuple[tuple[int, ...], ...]

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
        self.counts = [[0] * num_experts for _ in range(num_layers)]
        self.window_s = window_s
        self._last: dict[str, Counts] = {}
        # (time, counts), oldest first: what recent counts are counted from, and the next ones to count from.
        self._marks: deque[tuple[float, Counts]] = deque()

    @property
    def recent(self) -> list[list[int]]:
        """Counts of about the last `window_s` seconds; it slides in steps of a thirtieth."""
        if not self._marks:
            return self.counts
        base = self._marks[0][1]
        return [[n - b for n, b in zip(row, rest, strict=True)] for row, rest in zip(self.counts, base, strict=True)]

    def update(self, reports: Mapping[str, Counts], now: float) -> None:
        """Add what each front has counted since its last report. A restarted front counts from zero again.

        `now` is any clock in seconds that does not jump.
        """
        self._mark(now)
        for front, counts in reports.items():
            if not counts:
                continue
            last = self._last.get(front)
            restarted = last is None or sum(counts[0]) < sum(last[0])
            for layer, row in enumerate(counts):
                before = [0] * len(row) if restarted or last is None else last[layer]
                for expert, count in enumerate(row):
                    self.counts[layer][expert] += count - before[expert]
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
            self._marks.append((now, _frozen(self.counts)))
        while len(self._marks) > 1 and now - self._marks[1][0] >= self.window_s:
            self._marks.popleft()


def _frozen(counts: Counts) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in counts)
