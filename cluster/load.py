"""Load of experts: how many (token, choice) pairs each expert of each layer got. Plain lists, no Ray."""

from collections.abc import Mapping, Sequence

from cluster.expert_map import ExpertMap

Counts = Sequence[Sequence[int]]


class ExpertLoad:
    """Sums the ever-growing counts of fronts; a front that is gone keeps its share."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.counts = [[0] * num_experts for _ in range(num_layers)]
        self._last: dict[str, Counts] = {}

    def update(self, reports: Mapping[str, Counts]) -> None:
        """Add what each front has counted since its last report. A restarted front counts from zero again."""
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
        """Mean over layers of mean/max load over groups: 1 is perfect, 1/groups is all on one. 1 without load."""
        ratios = []
        for homes, counts in zip(expert_map.homes, self.counts, strict=True):
            loads = [0.0] * expert_map.num_groups
            for groups, count in zip(homes, counts, strict=True):
                for group in groups:
                    loads[group] += count / len(groups)
            if any(loads):
                ratios.append(sum(loads) / len(loads) / max(loads))
        return sum(ratios) / len(ratios) if ratios else 1.0
