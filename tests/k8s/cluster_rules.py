"""Rules for objects that go together, see rules.py."""

import re
import tomllib
from collections.abc import Iterator

from tests.k8s import packing, serve_config
from tests.k8s.manifests import K8S, ROOT, Object, containers, one, pod_templates, ray_groups, title

DOCUMENTED_SECRETS = set(re.findall(r"create secret generic (\S+)", (K8S / "README.md").read_text()))


def ray_is_the_version_that_is_installed(found: list[Object]) -> Iterator[str]:
    """KubeRay decides by rayVersion what the image can do; it can't look into the image."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pinned,) = (re.findall(r"==(\d+\.\d+)", each)[0] for each in wanted if each.startswith("ray["))
    version = one(found, "RayService")["spec"]["rayClusterConfig"].get("rayVersion", "")
    if not version.startswith(f"{pinned}."):
        yield f"rayVersion {version} is not the {pinned} of pyproject.toml"


def the_old_cluster_outlives_loading(found: list[Object]) -> Iterator[str]:
    """KubeRay's clock starts when Serve runs, and weights are loaded after that."""
    service = one(found, "RayService")
    delay, needed = (
        service["spec"].get("rayClusterDeletionDelaySeconds", 60),
        serve_config.settings(service).load_timeout_s,
    )
    if service["spec"].get("upgradeStrategy", {}).get("type", "NewCluster") == "NewCluster" and delay < needed:
        yield f"rayClusterDeletionDelaySeconds {delay} is less than load_timeout_s {needed:g}"


def actors_find_room(found: list[Object]) -> Iterator[str]:
    """Ray lets an actor that fits nowhere wait for ever, without an error."""
    for at_most in (False, True):
        if homeless := packing.homeless(one(found, "RayService"), at_most):
            yield f"no pod has room for {', '.join(homeless)}{', scaled up' * at_most}"


def placement_is_all_or_nothing(found: list[Object]) -> Iterator[str]:
    """Where only one kind asks for custom resources, the other may take the pods that are meant for it."""
    config = serve_config.settings(one(found, "RayService"))
    if bool(config.front_resources) != bool(config.replica_resources):
        yield "set both of front_resources and replica_resources, or none"


def threads_and_cpus_are_stated(found: list[Object]) -> Iterator[str]:
    """The defaults come from the nodes that have joined when the supervisor starts: here maybe one of many."""
    config = serve_config.settings(one(found, "RayService"))
    for name in ("cpus_per_front", "cpus_per_replica", "threads_per_front", "threads_per_replica"):
        if getattr(config, name) is None:
            yield f"args: {name} is not set"
    if config.device == "auto":
        yield "args: device is auto: whether there are GPUs depends on which pods have joined"


def services_lead_to_pods(found: list[Object]) -> Iterator[str]:
    """A selector that matches nothing, or a port name that no pod has, is no error to Kubernetes."""
    for each in (each for each in found if each["kind"] == "Service"):
        selected = [t for _, t in _templates(found) if _matches({"matchLabels": each["spec"]["selector"]}, _labels(t))]
        if not selected:
            yield f"{title(each)} selects no pod"
        for port in each["spec"]["ports"]:
            target = port.get("targetPort")
            if isinstance(target, str) and not all(target in _port_names(template) for template in selected):
                yield f"{title(each)}: a pod that it selects has no port called {target}"


def budgets_can_be_met(found: list[Object]) -> Iterator[str]:
    """Pods of a RayCluster: only a whole minAvailable works, and below the number of pods, else nodes never drain."""
    for each in (each for each in found if each["kind"] == "PodDisruptionBudget"):
        spec = each["spec"]
        if any(key.startswith("ray.io/") for key in spec["selector"].get("matchLabels", {})):
            yield f"{title(each)} selects by a label of KubeRay: ray.io/cluster changes with each upgrade"
        groups = [
            g for _, g in ray_groups(one(found, "RayService")) if _matches(spec["selector"], _labels(g["template"]))
        ]
        num_pods = sum(group.get("minReplicas", 1) for group in groups)
        least = spec.get("minAvailable")
        if not isinstance(least, int) or isinstance(least, bool):
            yield f"{title(each)} must say minAvailable, as a whole number"
        elif least >= num_pods:
            yield f"{title(each)}: minAvailable {least} of {num_pods} pods lets none go"


def policies_cover_every_pod(found: list[Object]) -> Iterator[str]:
    """A policy that selects nothing does nothing; a pod that no policy selects is open."""
    policies = [each for each in found if each["kind"] == "NetworkPolicy"]
    templates = list(_templates(found))
    for each in policies:
        if not any(_matches(each["spec"]["podSelector"], _labels(template)) for _, template in templates):
            yield f"{title(each)} selects no pod"
    closed = [p["spec"] for p in policies if not p["spec"].get("ingress") and "Ingress" in p["spec"]["policyTypes"]]
    for where, template in templates if policies else ():
        if not any(_matches(spec["podSelector"], _labels(template)) for spec in closed):
            yield f"{where} is not denied by default"


def references_lead_somewhere(found: list[Object]) -> Iterator[str]:
    """A pod with a missing claim or Secret stays pending, without an error; with a missing class it is refused."""
    claims = {each["metadata"]["name"] for each in found if each["kind"] == "PersistentVolumeClaim"}
    classes = {each["metadata"]["name"] for each in found if each["kind"] == "PriorityClass"}
    for where, template in _templates(found):
        for volume in template["spec"].get("volumes", ()):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and claim not in claims:
                yield f"{where}: there is no claim {claim}"
        if template["spec"].get("priorityClassName", next(iter(classes), None)) not in (classes or {None}):
            yield f"{where}: there is no priority class {template['spec']['priorityClassName']}"
    for name in sorted(set(secrets_of(found)) - DOCUMENTED_SECRETS):
        yield f"k8s/README.md does not say how to make Secret {name}"


def secrets_of(found: list[Object]) -> Iterator[str]:
    cluster = one(found, "RayService")["spec"]["rayClusterConfig"]
    if name := cluster["authOptions"].get("secretName"):
        yield name
    if password := cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword"):
        yield password["valueFrom"]["secretKeyRef"]["name"]
    for _, template in _templates(found):
        for container in containers(template):
            refs = (each.get("valueFrom", {}).get("secretKeyRef") for each in container.get("env", ()))
            yield from (ref["name"] for ref in refs if ref)


def _templates(found: list[Object]) -> Iterator[tuple[str, Object]]:
    for each in found:
        yield from pod_templates(each)


def _labels(template: Object) -> dict[str, str]:
    return template["metadata"].get("labels", {})  # type: ignore[no-any-return]


def _port_names(template: Object) -> set[str]:
    return {port.get("name") for each in template["spec"]["containers"] for port in each.get("ports", ())}


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    """A label selector, with the operators that we use."""
    for each in selector.get("matchExpressions", ()):
        is_in = labels.get(each["key"]) in each["values"]
        if is_in != {"In": True, "NotIn": False}[each["operator"]]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


RULES = (
    ray_is_the_version_that_is_installed,
    the_old_cluster_outlives_loading,
    actors_find_room,
    placement_is_all_or_nothing,
    threads_and_cpus_are_stated,
    services_lead_to_pods,
    budgets_can_be_met,
    policies_cover_every_pod,
    references_lead_somewhere,
)
