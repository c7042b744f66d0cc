"""What is simulated: a plan, its traffic, and what the policies are told."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from actors.dispatch.failover import HEDGE_SHARE
from actors.simulation.failures import Failure
from actors.simulation.traffic import Arrival
from cluster.config import ClusterConfig
from cluster.planning.layout import Layout
from cluster.planning.workload import ServedModel


@dataclass(frozen=True, slots=True)
class Options:
    """`arrivals` gives the traffic anew for each run. `start_s`: until a new process can read weights, which it does at
    `load_gb_per_second`. `spread`: see ExpertTraffic.
    """

    config: ClusterConfig
    model: ServedModel
    layout: Layout
    arrivals: Callable[[], Iterator[Arrival]]
    seconds: float
    failures: tuple[Failure, ...] = ()
    seed: int = 0
    spread: float = 0.5
    hedge_share: float = HEDGE_SHARE
    start_s: float = 10.0
    load_gb_per_second: float = 1.0
