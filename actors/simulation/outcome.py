"""What a simulation has seen: each request once, stalls, what changed in the cluster, and what that says in figures."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PERCENTILES = (0.5, 0.95, 0.99)


@dataclass(slots=True)
class Request:
    """Seconds from the start; `first` and `last` are when its first and newest tokens came."""

    arrived: float
    output_len: int
    first: float | None = None
    last: float | None = None


@dataclass(frozen=True, slots=True)
class Stall:
    """Somebody waited so many seconds longer for a step than the step itself takes, and why."""

    at: float
    front: str
    seconds: float
    why: str


@dataclass(slots=True)
class Outcome:
    num_requests: int = 0
    num_refused: int = 0
    num_finished: int = 0
    num_replayed: int = 0
    num_preempted: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    cost: float | None = None
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    balancedness: list[tuple[float, float]] = field(default_factory=list)

    def finish(self, request: Request, now: float) -> None:
        self.num_finished += 1
        self.num_tokens += request.output_len
        assert request.first is not None
        self.ttft.append(request.first - request.arrived)
        if request.output_len > 1:
            self.tpot.append((now - request.first) / (request.output_len - 1))

    def figures(self) -> dict[str, Any]:
        """Milliseconds for latencies, seconds for stalls."""
        return {
            "requests": self.num_requests,
            "finished": self.num_finished,
            "refused": self.num_refused,
            "replayed": self.num_replayed,
            "preempted": self.num_preempted,
            "tokens_per_second": self.num_tokens / self.seconds if self.seconds else 0.0,
            "ttft_ms": percentiles(self.ttft, 1000),
            "tpot_ms": percentiles(self.tpot, 1000),
            "stalls": len(self.stalls),
            "longest_stall_s": max((stall.seconds for stall in self.stalls), default=0.0),
            "balancedness": mean([value for _, value in self.balancedness]),
            "cost": self.cost,
        }

    def everything(self) -> dict[str, Any]:
        """The figures, and what they come from but for the single requests."""
        return {
            "figures": self.figures(),
            "stalls": [asdict(stall) for stall in self.stalls],
            "events": [{"at": at, "what": what} for at, what in self.events],
            "balancedness": [{"at": at, "value": value} for at, value in self.balancedness],
        }


def percentiles(values: Sequence[float], scale: float) -> dict[str, float]:
    """By the nearest rank; empty without values."""
    ordered = sorted(values)
    return {f"p{100 * p:.0f}": scale * ordered[math.ceil(p * len(ordered)) - 1] for p in PERCENTILES if ordered}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1.0
