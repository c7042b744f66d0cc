"""How often something is timed, and what of that counts."""

import statistics
import time
from collections.abc import Callable

LEAST = 5


def usual_seconds(run: Callable[[], object], budget_s: float) -> float:
    """Of one call. The first call is not counted: it allocates and wakes threads."""
    run()
    taken: list[float] = []
    ends = time.perf_counter() + budget_s
    while len(taken) < LEAST or time.perf_counter() < ends:
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return undisturbed(taken)


def undisturbed(seconds: list[float]) -> float:
    """The lower decile: whatever else a machine does only makes a call longer, and does so in bursts."""
    return statistics.quantiles(seconds, n=10, method="inclusive")[0]
