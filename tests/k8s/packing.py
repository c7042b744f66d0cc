"""Whether the actors of an application find room in the pods of its worker groups. First fit, largest first."""

from collections.abc import Iterator
from contextlib import suppress

from tests.k8s import serve_config
from tests.k8s.kuberay_rules import custom_resources
from tests.k8s.manifests import Object, ray_groups

Resources = dict[str, float]


def homeless(service: Object, at_most: bool = False) -> list[str]:
    """Actors that would wait for ever: at the start, or with as many pods and actors as scaling allows."""
    pods = [dict(pod) for pod in _pods(service, "maxReplicas" if at_most else "replicas")]
    demands = sorted(
        _demands(service, at_most), key=lambda each: (each[1].get("GPU", 0), each[1].get("CPU", 0)), reverse=True
    )
    return [name for name, demand in demands if not _place(demand, pods)]


def _place(demand: Resources, pods: list[Resources]) -> bool:
    for pod in pods:
        if all(pod.get(name, 0) >= amount for name, amount in demand.items()):
            for name, amount in demand.items():
                pod[name] = pod.get(name, 0) - amount
            return True
    return False


def _pods(service: Object, count: str) -> Iterator[Resources]:
    for name, group in ray_groups(service):
        if name != "head":
            yield from [offer(group)] * group.get(count, 0)


def offer(group: Object) -> Resources:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    offer = {"CPU": _cpus(limits.get("cpu", "0")), "GPU": float(limits.get("nvidia.com/gpu", 0))}
    with suppress(AssertionError, ValueError):  # another rule says so
        offer |= custom_resources(group)
    return offer


def _demands(service: Object, at_most: bool) -> Iterator[tuple[str, Resources]]:
    config = serve_config.settings(service)
    replicas = config.max_replicas if at_most else config.replicas
    # On the lane local, fronts have the experts.
    num_replicas = 0 if config.lane == "local" else config.groups * replicas
    for i in range(config.max_fronts if at_most else config.fronts):
        gpus = 1.0 if config.gpus_per_front is None else config.gpus_per_front
        gpus = gpus if config.device_of("front") == "cuda" else 0.0
        yield f"front-{i}", {"CPU": config.cpus_per_front or 0, "GPU": gpus} | config.front_resources
    for i in range(num_replicas):
        gpus = 1.0 if config.gpus_per_replica is None else config.gpus_per_replica
        gpus = gpus if config.device_of("expert") == "cuda" else 0.0
        yield f"expert-{i}", {"CPU": config.cpus_per_replica or 0, "GPU": gpus} | config.replica_resources
    for deployment in serve_config.parsed(service)["applications"][0]["deployments"]:
        options = deployment["ray_actor_options"]
        for i in range(config.ingress_replicas if deployment["name"] == "ingress" else 1):
            yield f"{deployment['name']}-{i}", {"CPU": options["num_cpus"]} | options.get("resources", {})


def _cpus(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
