"""Rules for objects that go together, see rules.py."""

import re
import tomllib
from collections.abc import Iterator

from tests.k8s import packing, serve_config
from tests.k8s.manifests import ROOT, Object, containers, one, pod_templates, title

OVERLAP_S, NODES_S = 120, 900
UNITS = {"h": 3600, "m": 60, "s": 1, "": 1}
PROMETHEUS, OPERATOR = "prometheus", "kuberay-operator"
DASHBOARD = 8265
COMPONENT = "outcrop-component"
NAME_OF_NAMESPACE = "kubernetes.io/metadata.name"  # set by Kubernetes
GUIDE = (ROOT / "docs/kubernetes.md").read_text()
LABELLED = re.findall(r"kubectl label namespace \S+ (\S+)=true", GUIDE)
DOCUMENTED_SECRETS = set(re.findall(r"create secret generic (\S+)", GUIDE))


def ray_is_the_version_that_is_installed(found: list[Object]) -> Iterator[str]:
    """KubeRay decides by rayVersion what the image can do; it can't look into the image."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pinned,) = (re.findall(r"==(\d+\.\d+)", each)[0] for each in wanted if each.startswith("ray["))
    version = one(found, "RayService")["spec"]["rayClusterConfig"].get("rayVersion", "")
    if not version.startswith(f"{pinned}."):
        yield f"rayVersion {version} is not the {pinned} of pyproject.toml"


def two_clusters_serve_for_a_while(found: list[Object]) -> Iterator[str]:
    """KubeRay's clock starts when the new cluster serves; Services and gateways find its pods later."""
    spec = one(found, "RayService")["spec"]
    delay = spec.get("rayClusterDeletionDelaySeconds", 60)
    if spec.get("upgradeStrategy", {}).get("type", "NewCluster") == "NewCluster" and delay < OVERLAP_S:
        yield f"rayClusterDeletionDelaySeconds {delay} is less than {OVERLAP_S}"


def initializing_lasts_as_long_as_loading(found: list[Object]) -> Iterator[str]:
    """The application is not RUNNING before weights are loaded, and KubeRay gives up a service for good."""
    service = one(found, "RayService")
    text = service["metadata"].get("annotations", {}).get("ray.io/initializing-timeout", "")
    limit = sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)([hms]?)", text))
    needed = serve_config.settings(service).load_timeout_s + NODES_S
    if text and limit < needed:
        yield f"ray.io/initializing-timeout {text} is less than load_timeout_s and {NODES_S} s for nodes: {needed:g} s"


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
            if isinstance(target, str) and not all(target in _ports(template) for template in selected):
                yield f"{title(each)}: a pod that it selects has no port called {target}"


def budgets_can_be_met(found: list[Object]) -> Iterator[str]:
    """Pods of a RayCluster: only a whole minAvailable works, and below the number of actors, else nodes never drain.
    Redis is one of a kind: a drain of its node is to wait for a person.
    """
    for each in (each for each in found if each["kind"] == "PodDisruptionBudget"):
        spec = each["spec"]
        if any(key.startswith("ray.io/") for key in spec["selector"].get("matchLabels", {})):
            yield f"{title(each)} selects by a label of KubeRay: ray.io/cluster changes with each upgrade"
        templates = [t for _, t in _templates(found) if _matches(spec["selector"], _labels(t))]
        component = _labels(templates[0])[COMPONENT] if templates else ""
        num_pods = _num_ready(found, component)
        least = spec.get("minAvailable")
        if component == "redis":
            continue
        if not isinstance(least, int) or isinstance(least, bool):
            yield f"{title(each)} must say minAvailable, as a whole number"
        elif least >= num_pods:
            yield f"{title(each)}: minAvailable {least} of {num_pods} pods lets none go"


def _num_ready(found: list[Object], component: str) -> int:
    """Pods of a kind that have something to serve with, while nothing is scaled."""
    config = serve_config.settings(one(found, "RayService"))
    counts = {"ingress": config.ingress_replicas, "front": config.fronts, "expert": config.groups * config.replicas}
    return counts.get(component, 0)


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


def monitors_lead_to_pods(found: list[Object]) -> Iterator[str]:
    """A monitor that selects no pod, or a port that no pod names, is no error to the operator: nothing is scraped."""
    for monitor in (each for each in found if each["kind"] == "PodMonitor"):
        selected = [
            template for _, template in _templates(found) if _matches(monitor["spec"]["selector"], _labels(template))
        ]
        if not selected:
            yield f"{title(monitor)} selects no pod"
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if selected and not any(endpoint["port"] in _ports(template) for template in selected):
                yield f"{title(monitor)}: no pod that it selects has a port called {endpoint['port']}"


def who_has_to_gets_through(found: list[Object]) -> Iterator[str]:
    """With default-deny policies, a scrape or a deployment that is let through by none ends in a time-out."""
    policies = [each["spec"] for each in found if each["kind"] == "NetworkPolicy"]
    for where, template in _templates(found) if policies else ():
        for caller, port in _callers(found, template):
            if not any(_admits(policy, template, caller, port) for policy in policies):
                yield f"{where}: no policy lets {caller} in on port {port}"


def _callers(found: list[Object], template: Object) -> Iterator[tuple[str, int]]:
    """Who must reach a pod from elsewhere: (app.kubernetes.io/name, port)."""
    if _labels(template).get(COMPONENT) == "head":
        yield OPERATOR, DASHBOARD
    for monitor in (each["spec"] for each in found if each["kind"] == "PodMonitor"):
        for endpoint in monitor["podMetricsEndpoints"]:
            if _matches(monitor["selector"], _labels(template)) and endpoint["port"] in _ports(template):
                yield PROMETHEUS, _ports(template)[endpoint["port"]]


def _admits(policy: Object, template: Object, caller: str, port: int) -> bool:
    """Whether it lets pods of that name, in some other namespace, in on a port."""
    pods = {"matchLabels": {"app.kubernetes.io/name": caller}}
    return _matches(policy["podSelector"], _labels(template)) and any(
        any(peer.get("podSelector") == pods and "namespaceSelector" in peer for peer in rule.get("from", ()))
        and port in {each["port"] for each in rule.get("ports", ())}
        for rule in policy.get("ingress", ())
    )


def namespaces_are_named(found: list[Object]) -> Iterator[str]:
    """Who may start a pod in some namespace labels it as he likes: only namespaces tell friend from stranger."""
    for policy in (each for each in found if each["kind"] == "NetworkPolicy"):
        rules = (*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ()))
        for peer in (peer for rule in rules for peer in (*rule.get("from", ()), *rule.get("to", ()))):
            labels = peer.get("namespaceSelector", {}).get("matchLabels", {})
            if "namespaceSelector" in peer and not labels:
                yield f"{title(policy)} lets every namespace through"
            for label in set(labels) - {NAME_OF_NAMESPACE, *LABELLED}:
                yield f"docs/kubernetes.md does not say which namespace has the label {label}"


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
        yield f"docs/kubernetes.md does not say how to make Secret {name}"


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


def _ports(template: Object) -> dict[str, int]:
    ports = (port for each in template["spec"]["containers"] for port in each.get("ports", ()))
    return {port["name"]: port["containerPort"] for port in ports}


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    """A label selector, with the operators that we use."""
    for each in selector.get("matchExpressions", ()):
        is_in = labels.get(each["key"]) in each["values"]
        if is_in != {"In": True, "NotIn": False}[each["operator"]]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


RULES = (
    ray_is_the_version_that_is_installed,
    two_clusters_serve_for_a_while,
    initializing_lasts_as_long_as_loading,
    actors_find_room,
    placement_is_all_or_nothing,
    threads_and_cpus_are_stated,
    services_lead_to_pods,
    budgets_can_be_met,
    policies_cover_every_pod,
    monitors_lead_to_pods,
    who_has_to_gets_through,
    namespaces_are_named,
    references_lead_somewhere,
)
