"""Ray's own autoscaler (v2) with the chart's pools as node types, on this machine: prints how many nodes of each there
are while the application is scaled, as JSON.

The autoscaler reads the pools with Ray's code for KubeRay; what it asks for is made by Ray's provider of fake nodes,
which starts raylets here instead of pods.
"""

import json
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import Any

import ray
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.util import get_node_ip_address

from tests.e2e.servers import free_port
from tests.k8s.heads import STORE, ray_head
from tests.k8s.manifests import Object, chart, one, ray_groups
from tests.k8s.on_ray import deploy, health, wait

HEAD, HEAD_ID = "ray.head.default", "f" * 56
# Named by its path: the wheel of Ray lacks the file that its own name for it stands for.
FAKE_NODES = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
IDLE_S = 3


def node_types(service: Object) -> dict[str, Any]:
    """As the autoscaler reads them from the RayCluster, but small: one ingress node, and nobody idles for long."""
    found: dict[str, Any] = {}
    for name, group in ray_groups(service):
        if name != "head":
            found[name] = autoscaling_config._node_type_from_group_spec(group, is_head=False)
            found[name]["min_workers"] = min(1, found[name]["min_workers"])
            del found[name]["resources"]["memory"]
            found[name]["resources"]["object_store_memory"] = STORE
            if "idle_timeout_s" in found[name]:
                found[name]["idle_timeout_s"] = IDLE_S
    return found


def config(service: Object, gcs_address: str) -> dict[str, Any]:
    provider: dict[str, Any] = {"type": "external", "module": FAKE_NODES, "use_node_id_as_ip": True}
    provider |= {"disable_node_updaters": True, "disable_launch_config_check": True, "launch_multiple": True}
    types = node_types(service) | {HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    return autoscaling_config._generate_legacy_autoscaling_config_fields() | {
        "cluster_name": "fake",
        "max_workers": 32,
        "provider": provider | {"gcs_address": gcs_address, "head_node_id": HEAD_ID},
        "available_node_types": types,
        "head_node_type": HEAD,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 60,
    }


@contextmanager
def head(service: Object) -> Iterator[str]:
    """A head with its autoscaler; yields its address."""
    port = free_port()
    settings = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    settings |= {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    with NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config(service, f"{get_node_ip_address()}:{port}"), file)
        file.flush()
        with ray_head(f"--autoscaling-config={file.name}", port=port, env=settings) as (_, address):
            yield address


def nodes() -> Counter[str]:
    """Live nodes by the role of their pods: each pool here has another one."""
    offers = (name for node in ray.nodes() if node["Alive"] for name in node["Resources"])
    return Counter(name.removeprefix("outcrop_") for name in offers if name.startswith("outcrop_"))


def _scale(port: int, group: int, replicas: int) -> None:
    body = json.dumps({"group": group, "replicas": replicas}).encode()
    url = f"http://127.0.0.1:{port}/v1/cluster/scale"
    urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=30).close()


def main() -> None:
    service = one(chart("gpu-multi-node", "production"), "RayService")
    with head(service) as address:
        wait(lambda: _connects(address), f"a head at {address}")
        try:
            print(json.dumps(_scaled(service)))
        finally:
            ray.shutdown()


def _connects(address: str) -> bool:
    try:
        ray.init(address, log_to_driver=False)
    except (ConnectionError, RuntimeError):
        return False
    return True


def _scaled(service: Object) -> list[Counter[str]]:
    port = deploy(service)
    wait(lambda: health(port) == 200, "/health answers 200")
    seen = [nodes()]
    for replicas in (2, 1):
        _scale(port, 0, replicas)
        wait(lambda wanted=replicas + 1: nodes()["expert"] == wanted, f"{replicas} of group 0, each on a node")
        seen.append(nodes())
    return seen


if __name__ == "__main__":
    main()
