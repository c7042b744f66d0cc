"""What each actor gets of the machine: CPUs and GPUs for Ray's bookkeeping, threads for the computation."""

import math

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.messages.actors import Machine, ResourcePlan


def plan_resources(config: ClusterConfig, machine: Machine) -> ResourcePlan:
    """Share the cluster so that every actor fits. Raises ConfigError if device=cuda and there are too few GPUs.

    CPUs are shared as if all had been scaled up that may be: Ray must find room for them then. Fronts and replicas
    compute in turn, so each kind may use all cores: threads are shared within a kind only.
    """
    num_replicas = 0 if config.lane == "local" else config.groups * config.replicas
    max_replicas = 0 if config.lane == "local" else config.groups * max(config.replicas, config.max_replicas)
    most_actors = max(config.fronts, config.max_fronts) + max_replicas
    gpus_front, gpus_replica = _or(config.gpus_per_front, 1.0), _or(config.gpus_per_replica, 1.0)
    gpus_wanted = config.fronts * gpus_front + num_replicas * gpus_replica
    expects_nodes = bool(config.front_resources or config.replica_resources)
    if config.device == "cuda" and machine.cluster_gpus < gpus_wanted and not expects_nodes:
        raise ConfigError(
            f"device='cuda' needs {gpus_wanted:g} GPUs for {config.fronts} fronts and {num_replicas} expert replicas, "
            f"the Ray cluster has {machine.cluster_gpus:g}: lower fronts, groups, replicas, gpus_per_front or "
            "gpus_per_replica, or set device to cpu"
        )
    use_gpus = config.device == "cuda" or (config.device == "auto" and machine.cluster_gpus >= gpus_wanted)
    # Two decimals down, so that the sum never exceeds what the cluster has.
    share = max(0.01, min(1.0, math.floor(100 * machine.cluster_cpus / most_actors) / 100))
    return ResourcePlan(
        machine=machine,
        device=config.device if use_gpus else "cpu",
        cpus_per_front=_or(config.cpus_per_front, share),
        cpus_per_replica=_or(config.cpus_per_replica, share),
        gpus_per_front=gpus_front if use_gpus else config.gpus_per_front or 0.0,
        gpus_per_replica=gpus_replica if use_gpus else config.gpus_per_replica or 0.0,
        threads_per_front=config.threads_per_front or _threads(machine, config.fronts),
        threads_per_replica=config.threads_per_replica or _threads(machine, max(1, num_replicas)),
        front_resources=config.front_resources,
        replica_resources=config.replica_resources,
    )


def _threads(machine: Machine, num_actors: int) -> int:
    return max(1, int(min(machine.largest_node_cpus, machine.cluster_cpus / num_actors)))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
