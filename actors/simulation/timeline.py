"""Virtual time: what is due next, and nothing in between. Events of the same moment happen in the order of planning."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count


@dataclass(slots=True)
class Event:
    act: Callable[[], None]
    is_cancelled: bool = False


@dataclass(slots=True)
class Timeline:
    now: float = 0.0
    _due: list[tuple[float, int, Event]] = field(default_factory=list)
    _numbers: "count[int]" = field(default_factory=count)

    def clock(self) -> float:
        """As time.monotonic, for what reads a clock."""
        return self.now

    def at(self, when: float, act: Callable[[], None]) -> Event:
        event = Event(act)
        heapq.heappush(self._due, (max(when, self.now), next(self._numbers), event))
        return event

    def after(self, seconds: float, act: Callable[[], None]) -> Event:
        return self.at(self.now + seconds, act)

    def run(self) -> None:
        """Until nothing is due any more."""
        while self._due:
            when, _, event = heapq.heappop(self._due)
            if not event.is_cancelled:
                self.now = when
                event.act()
