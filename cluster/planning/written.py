"""A plan as what starts it: settings for `outcrop serve --config`, or values for the Helm chart. Plain mappings."""

import math
from typing import Any

from cluster.config import ClusterConfig
from cluster.models.hub import HUB_ID
from cluster.planning.layout import Layout
from cluster.planning.memory import GIB, kv_bytes
from cluster.planning.search import Plan
from cluster.planning.steady_state import Serving
from cluster.planning.workload import ServedModel

Json = dict[str, Any]
# Of a pod: what its actors compute with, and one CPU for Ray and the host's part of lanes.
GPU_ACTOR_CPUS, RAY_CPUS = 2, 1
# Ingresses are single processes of Python; more than this share of a core, and they queue.
INGRESS_SHARE = 0.7
INGRESS_CPUS = 2
TOLERATE_GPUS = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def settings(plan: Plan, model: ServedModel, name: str) -> Json:
    """Those of ClusterConfig that the plan decides, to serve what `name` names. Scaling stays within them: more actors
    want more devices. Raises ConfigError or ValidationError where they can't be had.
    """
    layout, serving = plan.layout, Serving(model, plan.layout, plan.traffic)
    cache = kv_bytes(model, layout)
    longest = min(model.spec.max_context, int(cache // model.sizes.kv_per_token))
    found: Json = {
        "model": name,
        "lane": "auto" if layout.lane in ("unix", "zmq") and not layout.is_shared else layout.lane,
        "dtype": model.dtype,
        "fronts": layout.fronts,
        "groups": layout.groups,
        "replicas": layout.replicas,
        "max_fronts": layout.fronts,
        "max_replicas": layout.replicas,
        "max_model_len": longest,
        "max_num_seqs": max(1, serving.most_running),
        "ingress_replicas": ingress_replicas(plan),
    }
    found |= _devices(layout)
    if layout.front_node.device == "cpu":
        most = longest * found["max_num_seqs"] * model.sizes.kv_per_token
        found["kv_cache_gib"] = max(0.01, math.floor(100 * min(cache, most) / GIB) / 100)
    return ClusterConfig.model_validate(found).model_dump(include=set(found), mode="json")


def _devices(layout: Layout) -> Json:
    front, replica = layout.front_node.device, layout.replica_node.device
    found: Json = {"device": front} if front == replica else {"front_device": front, "replica_device": replica}
    if front == "cuda":
        found["gpus_per_front"] = 1
    if replica == "cuda" and not layout.is_local:
        found["gpus_per_replica"] = 1
    return found


def ingress_replicas(plan: Plan) -> int:
    """As many as the traffic keeps busy; one more where losses are to be survived is the operator's choice."""
    return min(64, max(1, math.ceil(plan.now.http_cores / INGRESS_SHARE)))


def helm_values(plan: Plan, model: ServedModel, name: str) -> Json:
    """Values for k8s/chart. A layout that is on one host is one pod, as its lane is; else an actor has a pod to itself.
    A Hub id is fetched into the volume of models; any other name is a path that pods have.
    """
    decided, layout = settings(plan, model, name), plan.layout
    of_actors = _threads(layout)
    is_one_pod = layout.num_nodes == 1 and (layout.lane == "unix" or layout.is_shared)
    http = {"supervisor": {"cpus": 0.5}, "gate": {"cpus": 0.1}, "ingress": {"cpus": INGRESS_CPUS}}
    values: Json = {"settings": decided | of_actors, "deployments": http}
    values["pools"] = _one_pod(plan, model, of_actors) if is_one_pod else _pools(plan, model)
    if HUB_ID.fullmatch(name):
        decided["model"] = values["settings"]["model"] = f"/models/{name.partition('/')[2]}"
        values["settings"]["served_model_name"] = name
        mode = "ReadWriteOnce" if is_one_pod else "ReadWriteMany"
        by = "initContainer" if is_one_pod else "job"
        values["models"] = {"volume": _volume(model, mode), "fetch": {"by": by, "hubId": name}}
    if is_one_pod:
        # A second cluster beside the first would want as many devices again.
        values["upgrade"] = {"strategy": "None", "inPlace": True}
    return values


def _volume(model: ServedModel, mode: str) -> Json:
    size = math.ceil(1.2 * (model.sizes.front + model.sizes.experts) / GIB) + 5
    return {"enabled": True, "accessMode": mode, "size": f"{size}Gi"}


def _threads(layout: Layout) -> Json:
    """Stated, so that they do not depend on which pods have joined."""

    def threads(node_cores: int, device: str, actors: int) -> int:
        return GPU_ACTOR_CPUS if device == "cuda" else max(1, node_cores // actors)

    sharing = layout.num_actors if layout.is_shared else 1
    front = threads(layout.front_node.cores, layout.front_node.device, 1)
    found: Json = {"cpus_per_front": _cpus(front, sharing), "threads_per_front": front}
    replica = threads(layout.replica_node.cores, layout.replica_node.device, layout.groups if layout.is_shared else 1)
    return found | {"cpus_per_replica": _cpus(replica, sharing), "threads_per_replica": replica}


def _cpus(threads: int, sharing: int) -> float:
    """For Ray's books: actors that share a machine compute in turn."""
    return threads if sharing == 1 else max(0.1, math.floor(10 * threads / sharing) / 10)


def _memory(num_bytes: float) -> str:
    return f"{math.ceil(num_bytes / GIB) + 4}Gi"


def _one_pod(plan: Plan, model: ServedModel, actors: Json) -> Json:
    layout = plan.layout
    cpus = layout.fronts * actors["cpus_per_front"] + layout.num_replicas * actors["cpus_per_replica"]
    cpus = math.ceil(cpus + ingress_replicas(plan) * INGRESS_CPUS + RAY_CPUS)
    is_gpu = layout.front_node.device == "cuda"
    weights = model.sizes.front * layout.fronts + model.sizes.experts * max(1, layout.replicas)
    cache = 0.0 if is_gpu else settings(plan, model, "x")["kv_cache_gib"] * GIB * layout.fronts
    gpus = layout.num_actors if is_gpu else 0
    memory = _memory(weights + cache)
    pod: Json = {"role": "all", "resources": {"cpu": str(cpus), "cpuLimit": str(cpus), "memory": memory}, "gpus": gpus}
    return {"all": pod | ({"tolerations": TOLERATE_GPUS} if gpus else {})}


def _pools(plan: Plan, model: ServedModel) -> Json:
    layout, number = plan.layout, ingress_replicas(plan)
    resources = {"cpu": str(INGRESS_CPUS + RAY_CPUS), "cpuLimit": str(INGRESS_CPUS + 2), "memory": "8Gi"}
    counts = {"replicas": number, "minReplicas": number, "maxReplicas": number + 1}
    pools: Json = {"ingress": {"role": "ingress", "resources": resources} | counts}
    # Weights go through the host's memory, piece by piece; on a CPU they stay there.
    fronts = model.sizes.front + (model.sizes.experts if layout.is_local else 0)
    pools["front"] = _pool("front", layout.front_node.device, layout.front_node.cores, layout.fronts)
    pools["front"]["resources"]["memory"] = _pod_memory(layout.front_node.device, layout.front_node.memory_gib, fronts)
    if layout.num_replicas:
        device, cores = layout.replica_node.device, layout.replica_node.cores
        pools["experts"] = _pool("expert", device, cores, layout.num_replicas)
        weights = model.sizes.experts / layout.groups
        pools["experts"]["resources"]["memory"] = _pod_memory(device, layout.replica_node.memory_gib, weights)
    return pools


def _pool(role: str, device: str, cores: int, number: int) -> Json:
    """Pods with one actor each, and one more beside a pod whose node is lost, which counts until it is gone."""
    cpus = str(GPU_ACTOR_CPUS + RAY_CPUS if device == "cuda" else cores + RAY_CPUS)
    pool: Json = {
        "role": role, "replicas": number, "minReplicas": number, "maxReplicas": number + 1,
        "resources": {"cpu": cpus, "cpuLimit": cpus},
    }  # fmt: skip
    return pool | ({"gpus": 1, "tolerations": TOLERATE_GPUS} if device == "cuda" else {})


def _pod_memory(device: str, memory_gib: float, weights: float) -> str:
    return _memory(min(weights, 8 * GIB)) if device == "cuda" else f"{math.floor(memory_gib)}Gi"
