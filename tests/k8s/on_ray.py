"""The chart's examples for production, with two kinds of expert nodes, on a Ray of several nodes on this machine:
prints where each actor has landed, which of them a readiness probe would see, and what Serve said of the application
while it was loading and when it served, as JSON.

Nodes have the CPUs, GPUs (Ray takes our word for them) and custom resources that the worker groups' pods would have.
The application comes from the chart's serveConfigV2, with the demo model on the CPU and one of each kind. Nodes of
fronts and experts join after the application has been deployed, as pods do.
"""

import fcntl
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from ray import serve
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatusOverview, ServeDeploySchema

from tests.e2e.servers import free_port
from tests.k8s import serve_config
from tests.k8s.heads import STORE
from tests.k8s.manifests import Object, chart, one, ray_groups
from tests.k8s.packing import offer

SMALL = {"model": "demo", "device": "cpu", "ingress_replicas": 1, "fronts": 1, "groups": 2, "replicas": 1}
FEWER = {"min_replicas": 1, "threads_per_front": 1, "threads_per_replica": 1, "autoscale": False}
READY_S = 120


def main() -> None:
    service = one(chart("gpu-multi-node", "production", "gfd"), "RayService")
    groups = {name: group for name, group in ray_groups(service) if name != "head"}
    ingress = groups.pop("ingress")
    with TemporaryDirectory(prefix="outcrop-", dir="/tmp") as temp_dir:  # short: paths of sockets have 107 characters
        # Cluster notes its address for whoever asks for "auto", in a directory that need not be there: in ours, not in
        # /tmp/ray, where it would send others to this Ray.
        os.environ["RAY_TMPDIR"] = temp_dir
        Path(temp_dir, "ray").mkdir()
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "temp_dir": temp_dir}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            ray.init(cluster.address, log_to_driver=False)
            names = {ray.nodes()[0]["NodeID"]: "head"}
            _join(cluster, [ingress], names)
            port = deploy(service)
            wait(lambda: health(port) == 503, "/health answers 503")
            wait(lambda: _deployments()["ingress"] == _deployments()["supervisor"] == "HEALTHY", "all but the gate")
            loading = _application().status
            _join(cluster, list(groups.values()), names)
            wait(lambda: health(port) == 200, "/health answers 200")
            wait(lambda: _application().status != loading, f"no longer {loading}")
            statuses = [loading, _application().status]
            print(json.dumps({"places": _places(names), "statuses": statuses, "ready": _ready(temp_dir)}))
        finally:
            ray.shutdown()
            cluster.shutdown()


def _ready(temp_dir: str) -> list[str]:
    """Actors that hold the lock of a file which `outcrop-ready actor` looks at."""
    found = []
    for file in sorted(Path(temp_dir).glob("**/session_latest/outcrop-ready/*")):
        with file.open() as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(file.name.rpartition("-")[0])
    return found


def _join(cluster: Cluster, groups: list[Object], names: dict[str, str]) -> None:
    for group in groups:
        have = offer(group)
        cpus, gpus = have.pop("CPU"), have.pop("GPU")
        node = cluster.add_node(num_cpus=cpus, num_gpus=gpus, resources=have, object_store_memory=STORE)
        names[node.node_id] = group["groupName"]


def deploy(service: Object) -> int:
    config = serve_config.parsed(service)
    config["applications"][0]["args"] |= SMALL | FEWER
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    del config["http_options"]
    # What Ray's dashboard does with what KubeRay sends.
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
    return port


def wait(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + READY_S
    while not is_so():
        assert time.monotonic() < deadline, f"not within {READY_S} s: {what}"
        time.sleep(0.5)


def _application() -> ApplicationStatusOverview:
    return serve.status().applications["outcrop"]


def _deployments() -> dict[str, str]:
    return {name: deployment.status for name, deployment in _application().deployments.items()}


def health(port: int) -> int | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _places(names: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for actor in actors().values():
        if actor["State"] == "ALIVE":
            found.setdefault(names[actor["Address"]["NodeID"]], []).append(actor["Name"] or actor["ActorClassName"])
    return found


if __name__ == "__main__":
    main()
