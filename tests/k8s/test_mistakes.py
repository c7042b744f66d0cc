"""The checks catch something: one mistake of each class, planted into a rendered overlay."""

import copy
from typing import Any

import pytest

from tests.k8s import rules, schema, serve_config
from tests.k8s.manifests import Object, one, overlay, title
from tests.k8s.schema import needs_crds

SERVICE = "RayService/outcrop"
REDIS = "StatefulSet/outcrop-redis"
SPEC = "spec.rayClusterConfig"
HEAD = f"{SPEC}.headGroupSpec"
EXPERTS, FRONT, INGRESS = (f"{SPEC}.workerGroupSpecs.{i}" for i in range(3))
POD, RAY = "template.spec", "template.spec.containers.0"
GONE: Any = object()

# (object, path, what it becomes, what the schema says); the objects are those of the overlay `production`.
TYPOS = [
    (SERVICE, "spec.serveConfig", "x", "'serveConfig' was unexpected"),
    (SERVICE, "spec.rayClusterSpec", {}, "'rayClusterSpec' was unexpected"),
    (SERVICE, f"{HEAD}.rayStartParam", {}, "'rayStartParam' was unexpected"),
    (SERVICE, f"{HEAD}.rayStartParams.num-cpus", 0, "is not of type 'string'"),
    (SERVICE, f"{FRONT}.maxReplica", 2, "'maxReplica' was unexpected"),
    (SERVICE, f"{FRONT}.groupName", GONE, "'groupName' is a required property"),
    (SERVICE, f"{FRONT}.{RAY}.resources.limit", {}, "'limit' was unexpected"),
    (SERVICE, f"{FRONT}.{RAY}.resources.limits.memory", "12 GB", "does not match"),
    (SERVICE, f"{FRONT}.{RAY}.env.0.value_from", {}, "'value_from' was unexpected"),
    (SERVICE, f"{FRONT}.{RAY}.env.1.name", "OUTCROP_API_KEY", "comes twice"),
    (SERVICE, f"{FRONT}.template.metadata.label", {}, "'label' was unexpected"),
    (SERVICE, f"{SPEC}.authOptions.mode", "on", "'on' is not one of ['disabled', 'token']"),
    (SERVICE, f"{SPEC}.autoscalerOptions.version", "v3", "'v3' is not one of"),
    (SERVICE, "metadata.lables", {}, "'lables' was unexpected"),
    (SERVICE, "kind", "RayServe", "is in no CRD"),
    ("Service/outcrop-api", "spec.port", [], "'port' was unexpected"),
    ("PodDisruptionBudget/outcrop-front", "spec.minAvailabel", 1, "'minAvailabel' was unexpected"),
    ("PodDisruptionBudget/outcrop-front", "apiVersion", "policy/v1beta1", "has no PodDisruptionBudget"),
    ("NetworkPolicy/outcrop-clients", "spec.ingress.0.form", [], "'form' was unexpected"),
    (REDIS, "spec.template.spec.securitycontext", {}, "'securitycontext' was unexpected"),
    ("Job/outcrop-fetch-model", "spec.backoffLimits", 1, "'backoffLimits' was unexpected"),
    ("PodMonitor/outcrop", "spec.podMetricsEndpoints.0.intervall", "15s", "'intervall' was unexpected"),
    ("PodMonitor/outcrop", "spec.podMetricEndpoints", [], "'podMetricEndpoints' was unexpected"),
    ("ConfigMap/outcrop-dashboards", "datas", {}, "'datas' was unexpected"),
    ("PrometheusRule/outcrop", "spec.groups.0.rules.0.exprs", "up", "'exprs' was unexpected"),
]

# The same, and the rule that objects.
BREACHES: list[tuple[str, str, Any, str]] = [
    (SERVICE, "metadata.name", "a-name-that-is-longer-than-kuberay-can-work-with-x", "name_leaves_room"),
    (SERVICE, "metadata.annotations", {"ray.io/initializing-timeout": "soon"}, "initializing_timeout_is_a_duration"),
    (SERVICE, f"{HEAD}.rayStartParams.num-cpus", GONE, "head_offers_no_cpu"),
    (SERVICE, f"{HEAD}.{RAY}.ports", [], "head_names_the_serve_port"),
    (SERVICE, f"{SPEC}.authOptions.mode", GONE, "token_authentication_is_on"),
    (SERVICE, f"{FRONT}.rayStartParams.num-gpus", "1", "resources_are_named_once"),
    (SERVICE, f"{HEAD}.rayStartParams.resources", '{"x": 1}', "custom_resources_are_readable"),
    (SERVICE, f"{HEAD}.rayStartParams.resources", '"{\\"x\\": 1}"', "custom_resources_are_readable"),
    (SERVICE, f"{HEAD}.rayStartParams.resources", "'{\"x\": 0.5}'", "custom_resources_are_readable"),
    (SERVICE, f"{FRONT}.resources.outcrop_front", "0.5", "custom_resources_are_readable"),
    (SERVICE, f"{FRONT}.resources.outcrop_front", "one", "custom_resources_are_readable"),
    (SERVICE, f"{HEAD}.template.metadata.labels.app\\.kubernetes\\.io/name", "outcrop", "kuberay_finds_its_pods"),
    (SERVICE, f"{HEAD}.template.metadata.annotations", {}, "settings_start_a_new_cluster"),
    (SERVICE, f"{HEAD}.{RAY}.env.5.value", "30", "the_head_closes_at_once"),
    (SERVICE, f"{FRONT}.labels.outcrop-role", "front node", "labels_are_labels"),
    (SERVICE, f"{FRONT}.rayStartParams.labels", "a=b", "labels_are_labels"),
    (SERVICE, f"{FRONT}.replicas", 9, "groups_make_sense"),
    (SERVICE, f"{INGRESS}.groupName", "front", "groups_make_sense"),
    (SERVICE, f"{FRONT}.{POD}.restartPolicy", "Always", "autoscaler_v2_owns_restarts"),
    (SERVICE, f"{SPEC}.autoscalerOptions.version", GONE, "autoscaler_v2_owns_restarts"),
    (SERVICE, f"{HEAD}.{RAY}.env.1.name", "RAY_REDIS_ADDRESS", "redis_is_said_once"),
    (SERVICE, "spec.upgradeStrategy.type", "RollingUpdate", "upgrade_is_one_that_works"),
    (SERVICE, "spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade", "upgrade_is_one_that_works"),
    (SERVICE, f"{FRONT}.{POD}.securityContext.runAsNonRoot", False, "pods_are_restricted"),
    (SERVICE, f"{FRONT}.{POD}.initContainers.0.securityContext", GONE, "pods_are_restricted"),
    (SERVICE, f"{SPEC}.autoscalerOptions.securityContext", GONE, "pods_are_restricted"),
    (REDIS, "spec.template.spec.securityContext.seccompProfile", GONE, "pods_are_restricted"),
    (SERVICE, f"{FRONT}.{RAY}.resources.requests.memory", "1Gi", "containers_have_bounds"),
    (SERVICE, f"{FRONT}.{RAY}.resources.limits.cpu", GONE, "containers_have_bounds"),
    (SERVICE, f"{FRONT}.{RAY}.image", "outcrop:latest", "images_are_pinned"),
    (SERVICE, f"{FRONT}.{POD}.enableServiceLinks", GONE, "services_leave_settings_alone"),
    (SERVICE, f"{FRONT}.{POD}.automountServiceAccountToken", GONE, "only_who_needs_it_may_ask_the_api_server"),
    (SERVICE, f"{EXPERTS}.{RAY}.env.0.name", "OUTCROP_APIKEY", "ray_containers_have_the_same_settings"),
    (SERVICE, f"{HEAD}.{RAY}.env.0.valueFrom.secretKeyRef.optional", True, "the_api_key_is_not_optional"),
    (REDIS, "spec.template.spec.containers.0.args", ["--requirepass", "$(REDIS_PASSWORD)"], "secrets_are_no_arguments"),
    (SERVICE, f"{EXPERTS}.{RAY}.readinessProbe", GONE, "workers_say_when_they_are_ready"),
    (
        SERVICE,
        f"{INGRESS}.{RAY}.readinessProbe.exec.command",
        ["outcrop-ready", "node"],
        "workers_say_when_they_are_ready",
    ),
    (SERVICE, f"{INGRESS}.{RAY}.lifecycle", GONE, "pods_that_serve_drain"),
    (SERVICE, f"{INGRESS}.{POD}.terminationGracePeriodSeconds", 345, "pods_that_serve_drain"),
    (SERVICE, f"{FRONT}.{RAY}.lifecycle", GONE, "drains_outlive_the_head"),
    (SERVICE, f"{FRONT}.{RAY}.lifecycle.preStop.exec.command", ["outcrop-linger", "60"], "drains_outlive_the_head"),
    (SERVICE, f"{EXPERTS}.{RAY}.env.6.value", "60", "drains_outlive_the_head"),
    (SERVICE, f"{SPEC}.rayVersion", "2.59.0", "ray_is_the_version_that_is_installed"),
    (SERVICE, "spec.rayClusterDeletionDelaySeconds", GONE, "two_clusters_serve_for_a_while"),
    (
        SERVICE,
        "metadata.annotations",
        {"ray.io/initializing-timeout": "50m"},
        "initializing_lasts_as_long_as_loading",
    ),
    (SERVICE, f"{EXPERTS}.replicas", 0, "actors_find_room"),
    (SERVICE, f"{FRONT}.resources", {"outcrop_fornt": "1"}, "actors_find_room"),
    ("Service/outcrop-api", "spec.selector.outcrop-http", "yes", "services_lead_to_pods"),
    ("Service/outcrop-api", "spec.ports.0.targetPort", "http", "services_lead_to_pods"),
    ("PodDisruptionBudget/outcrop-expert", "spec.minAvailable", 4, "budgets_can_be_met"),
    ("PodDisruptionBudget/outcrop-expert", "spec.minAvailable", "50%", "budgets_can_be_met"),
    ("PodDisruptionBudget/outcrop-expert", "spec.selector.matchLabels.ray\\.io/cluster", "x", "budgets_can_be_met"),
    ("NetworkPolicy/outcrop-clients", "spec.podSelector.matchLabels.outcrop-http", "yes", "policies_cover_every_pod"),
    (SERVICE, f"{FRONT}.template.metadata.labels.outcrop-instance", "x", "policies_cover_every_pod"),
    ("PodMonitor/outcrop", "spec.selector.matchLabels.outcrop-http", "yes", "monitors_lead_to_pods"),
    ("PodMonitor/outcrop", "spec.podMetricsEndpoints.0.port", "http", "monitors_lead_to_pods"),
    ("NetworkPolicy/outcrop-prometheus", "spec.ingress.0.ports.0.port", 8001, "who_has_to_gets_through"),
    ("NetworkPolicy/outcrop-prometheus", "spec.ingress.0.from.0.namespaceSelector", GONE, "who_has_to_gets_through"),
    ("NetworkPolicy/outcrop-operator", "spec.ingress.0.from.0.namespaceSelector", {}, "namespaces_are_named"),
    (
        "NetworkPolicy/outcrop-prometheus",
        "spec.ingress.0.from.0.namespaceSelector.matchLabels",
        {"outcrop-monitor": "true"},
        "namespaces_are_named",
    ),
    ("NetworkPolicy/outcrop-operator", "spec.podSelector.matchLabels", {"a": "b"}, "who_has_to_gets_through"),
    (SERVICE, f"{FRONT}.{POD}.volumes.0.persistentVolumeClaim.claimName", "x", "references_lead_somewhere"),
    (SERVICE, f"{FRONT}.{POD}.priorityClassName", "outcrop", "references_lead_somewhere"),
    (SERVICE, f"{SPEC}.authOptions.secretName", "x", "references_lead_somewhere"),
]

# (text of serveConfigV2, what it becomes, what is said)
SERVE_TYPOS = [
    ("http_options:", "http_option:", "serveConfigV2.http_option is no key"),
    ("host: 0.0.0.0", "host: 127.0.0.1", "host is not 0.0.0.0"),
    ("route_prefix:", "route_prefixes:", "serveConfigV2.applications[0].route_prefixes is no key"),
    ("deploy.app:build", "deploy.ingress.api:build", "import_path"),
    ("max_replicas_per_node:", "max_replicas_a_node:", "max_replicas_a_node is no key"),
    ("num_cpus: 0.5", "num_cpu: 0.5", "num_cpu"),
    ("num_cpus: 0.5", "num_cpus: 0", "may land on the head"),
    ("name: gate", "name: gates", "deployment gate has no entry"),
    ("name: ingress", "name: ingres", "deployment ingres is not in the application"),
    ("fronts: 2", "front: 2", "front=2 is unknown"),
    ("fronts: 2", "fronts: two", "fronts"),
    ("outcrop_front: 1", "outcrop_front: 1.5", "whole number"),
    ("autoscale: true", "autoscale: maybe", "autoscale"),
]


def is_called(found: Object, name: str) -> bool:
    """The name of the Job ends with a sum of what it does."""
    return title(found) == name or (found["kind"] == "Job" and title(found).startswith(f"{name}-"))


@needs_crds
@pytest.mark.parametrize(("name", "path", "value", "said"), TYPOS, ids=[f"{t[0]}.{t[1]}" for t in TYPOS])
def test_typo(name: str, path: str, value: Any, said: str) -> None:
    (found,) = (each for each in overlay("production") if is_called(each, name))
    assert schema.errors(found) == []
    _plant(found, path, value)
    assert said in "\n".join(schema.errors(found))


@pytest.mark.parametrize(("name", "path", "value", "rule"), BREACHES, ids=[f"{b[3]}-{b[1]}" for b in BREACHES])
def test_breach(name: str, path: str, value: Any, rule: str) -> None:
    found = overlay("production")
    (one_of_them,) = (each for each in found if is_called(each, name))
    _plant(one_of_them, path, value)
    assert rule in {said.partition(":")[0] for said in rules.broken(found)}


@pytest.mark.parametrize(("old", "new", "said"), SERVE_TYPOS, ids=[t[1] for t in SERVE_TYPOS])
def test_serve_typo(old: str, new: str, said: str) -> None:
    service = one(overlay("production"), "RayService")
    text = service["spec"]["serveConfigV2"]
    assert old in text
    service["spec"]["serveConfigV2"] = text.replace(old, new, 1)
    assert said in "\n".join(serve_config.errors(service))


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("replica_resources:\n        outcrop_expert: 1", "replica_resources: {}", "placement_is_all_or_nothing"),
        ("max_fronts: 4", "max_fronts: 6", "actors_find_room"),
        ("threads_per_front: 2", "", "threads_and_cpus_are_stated"),
        ("device: cuda", "device: auto", "threads_and_cpus_are_stated"),
    ],
)
def test_breach_in_the_serve_config(old: str, new: str, rule: str) -> None:
    found = overlay("production")
    spec = one(found, "RayService")["spec"]
    assert old in spec["serveConfigV2"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)
    assert rule in {said.partition(":")[0] for said in rules.broken(found)}


def test_each_rule_has_a_breach_and_a_reason() -> None:
    breached = {breach[3] for breach in BREACHES} | {"placement_is_all_or_nothing", "threads_and_cpus_are_stated"}
    assert {rule.__name__ for rule in rules.RULES} == breached
    assert all(rule.__doc__ for rule in rules.RULES)


def _plant(found: Object, path: str, value: Any) -> None:
    """Put `value` at a dotted path (`\\.` is a dot within a key), or remove what is there."""
    *parents, last = (part.replace("\0", ".") for part in path.replace("\\.", "\0").split("."))
    here: Any = found
    for part in parents:
        here = here[int(part)] if isinstance(here, list) else here[part]
    if value is GONE:
        del here[last]
    else:
        here[last] = copy.deepcopy(value)
