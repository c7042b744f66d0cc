"""What each actor gets of the machine: CPUs and GPUs for Ray's bookkeeping, threads for the computation."""

import math

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.messages.actors import Machine, ResourcePlan

# What an actor with a GPU computes on the host is small: to pack and unpack messages.
GPU_ACTOR_THREADS = 4
# Threads of the native kernels take work piece by piece, and one that gets no core is not waited for: a replica with
# more of them than its share uses the cores that its siblings leave. Measured with two replicas on two cores.
NATIVE_SHARES = 2


def plan_resources(config: ClusterConfig, machine: Machine) -> ResourcePlan:
    """Share the cluster so that every actor fits. Raises ConfigError if a device is cuda and there are too few GPUs.

    CPUs are shared as if all had been scaled up that may be: Ray must find room for them then. Fronts and replicas
    compute in turn, so each kind may use all cores: threads are shared within a kind only.
    """
    num_replicas = 0 if config.lane == "local" else config.groups * config.replicas
    max_replicas = 0 if config.lane == "local" else config.groups * max(config.replicas, config.max_replicas)
    most_actors = max(config.fronts, config.max_fronts) + max_replicas
    _check_gpus(config, machine, num_replicas)
    has_gpus = machine.cluster_gpus >= _gpus_wanted(config, num_replicas, ("auto", "cuda"))
    front_device, gpus_per_front = _place(config.device_of("front"), config.gpus_per_front, has_gpus)
    replica_device, gpus_per_replica = _place(config.device_of("expert"), config.gpus_per_replica, has_gpus)
    # Two decimals down, so that the sum never exceeds what the cluster has.
    share = max(0.01, min(1.0, math.floor(100 * machine.cluster_cpus / most_actors) / 100))
    replica_threads = _threads(machine, max(1, num_replicas), replica_device)
    native_threads = _threads(machine, max(1, num_replicas) / NATIVE_SHARES, replica_device)
    return ResourcePlan(
        machine=machine,
        front_device=front_device,
        replica_device=replica_device,
        cpus_per_front=_or(config.cpus_per_front, share),
        cpus_per_replica=_or(config.cpus_per_replica, share),
        gpus_per_front=gpus_per_front,
        gpus_per_replica=gpus_per_replica,
        threads_per_front=config.threads_per_front or _threads(machine, config.fronts, front_device),
        threads_per_replica=config.threads_per_replica or replica_threads,
        native_threads_per_replica=config.threads_per_replica or native_threads,
        front_resources=config.front_resources,
        replica_resources=config.replica_resources,
    )


def _place(device: str, gpus: float | None, has_gpus: bool) -> tuple[str, float]:
    """Where a kind of actor computes, and how many GPUs each one gets. `has_gpus`: there are enough for all that may
    have some. 0 GPUs mean the CPU: Ray lets an actor that has reserved none see all of them.
    """
    if device == "cuda" or (device == "auto" and has_gpus and gpus != 0):
        return device, _or(gpus, 1.0)
    return "cpu", gpus or 0.0


def _gpus_wanted(config: ClusterConfig, num_replicas: int, devices: tuple[str, ...]) -> float:
    """By all actors whose device is among these."""
    fronts = config.fronts * _or(config.gpus_per_front, 1.0) if config.device_of("front") in devices else 0.0
    replicas = num_replicas * _or(config.gpus_per_replica, 1.0) if config.device_of("expert") in devices else 0.0
    return fronts + replicas


def _check_gpus(config: ClusterConfig, machine: Machine, num_replicas: int) -> None:
    """Raises ConfigError."""
    for setting, device, gpus in (
        ("front", config.device_of("front"), config.gpus_per_front),
        ("replica", config.device_of("expert") if num_replicas else "", config.gpus_per_replica),
    ):
        if device == "cuda" and gpus == 0:
            raise ConfigError(
                f"gpus_per_{setting}=0 with device='cuda': an actor without a GPU computes on the CPU: set "
                f"{setting}_device to cpu, or gpus_per_{setting} to 1 or to a share of one"
            )
    needed = _gpus_wanted(config, num_replicas, ("cuda",))
    expects_nodes = bool(config.front_resources or config.replica_resources)
    if machine.cluster_gpus < needed and not expects_nodes:
        raise ConfigError(
            f"device='cuda' needs {needed:g} GPUs for {config.fronts} fronts and {num_replicas} expert replicas, "
            f"the Ray cluster has {machine.cluster_gpus:g}: lower fronts, groups, replicas, gpus_per_front or "
            "gpus_per_replica, or set device, front_device or replica_device to cpu"
        )


def _threads(machine: Machine, num_actors: float, device: str) -> int:
    most = machine.largest_node_cpus if device == "cpu" else GPU_ACTOR_THREADS
    return max(1, int(min(most, machine.cluster_cpus / num_actors)))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
