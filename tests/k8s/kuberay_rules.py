"""Rules of KubeRay, see rules.py."""

import hashlib
import json
import re
from collections.abc import Iterator

from ray.autoscaler._private.kuberay import autoscaling_config

from tests.k8s.manifests import Object, one, ray_groups

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
DURATION = re.compile(r"([1-9]\d*(h|m|s))+|[1-9]\d*")
UPGRADE_TYPES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
RESOURCE_PARAMS = {"num-cpus", "num-gpus", "memory", "resources"}
# KubeRay sets these on each pod where the template does not, and its Services select by them (common/pod.go, labelPod;
# common/service.go, HeadServiceLabels).
KUBERAY_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/created-by")


def name_leaves_room(found: list[Object]) -> Iterator[str]:
    """KubeRay appends to the name; what results must be a DNS label of at most 63 characters."""
    name = one(found, "RayService")["metadata"]["name"]
    if len(name) > 47 or not DNS_1035.fullmatch(name):
        yield f"{name} is no DNS-1035 label of at most 47 characters"


def initializing_timeout_is_a_duration(found: list[Object]) -> Iterator[str]:
    """KubeRay refuses the whole object when it can't read this annotation."""
    timeout = one(found, "RayService")["metadata"].get("annotations", {}).get("ray.io/initializing-timeout", "1s")
    if not DURATION.fullmatch(timeout):
        yield f"ray.io/initializing-timeout: {timeout}"


def head_offers_no_cpu(found: list[Object]) -> Iterator[str]:
    """Actors on the head die with it, and weigh on the process that everything else depends on."""
    if _cluster(found)["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'headGroupSpec.rayStartParams.num-cpus must be "0"'


def head_names_the_serve_port(found: list[Object]) -> Iterator[str]:
    """KubeRay takes the port of its Serve service from a container port called serve, and else makes none."""
    ports = _cluster(found)["headGroupSpec"]["template"]["spec"]["containers"][0].get("ports", ())
    if not any(port.get("name") == "serve" for port in ports):
        yield "the head's first container has no port called serve"


def token_authentication_is_on(found: list[Object]) -> Iterator[str]:
    """`authOptions: {}` and no authOptions at all leave it off, and whoever reaches Ray's ports can run code."""
    options, version = _cluster(found).get("authOptions", {}), _ray_version(found)
    if options.get("mode") != "token":
        yield "authOptions.mode is not token"
    if version < (2, 52):
        yield "token authentication needs rayVersion 2.52 or later"
    if options.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth is not supported for a RayService"


def resources_are_named_once(found: list[Object]) -> Iterator[str]:
    """KubeRay refuses a group with resources in `resources` and in rayStartParams."""
    for name, group in ray_groups(one(found, "RayService")):
        if group.get("resources") and RESOURCE_PARAMS & set(group.get("rayStartParams", ())):
            yield f"{name}: resources both in `resources` and in rayStartParams"


def custom_resources_are_readable(found: list[Object]) -> Iterator[str]:
    """KubeRay, Ray's autoscaler, the pod's shell and `ray start` read them: all agree on the group's `resources`."""
    for name, group in ray_groups(one(found, "RayService")):
        try:
            by_autoscaler, by_kuberay = custom_resources(group), _as_kuberay_reads(group)
        except (ArithmeticError, AssertionError, ValueError) as error:
            yield f"{name}: custom resources: {error or 'not whole numbers'}"
            continue
        if by_autoscaler != by_kuberay:
            yield f"{name}: KubeRay reads {by_kuberay}, Ray's autoscaler {by_autoscaler}"


def custom_resources(group: Object) -> dict[str, int]:
    """A group's custom resources, as Ray's autoscaler reads them."""
    read = autoscaling_config._get_custom_resources
    return read(group.get("resources", {}), group.get("rayStartParams", {}), group.get("groupName", "head"))


def _as_kuberay_reads(group: Object) -> dict[str, float]:
    """common/pod.go, updateRayStartParamsResources and getResourcesMap. What it can't read keeps it from looking for
    GPUs, and Ray starts without --num-gpus.
    """
    if given := group.get("resources"):
        return {name: float(number) for name, number in given.items()}
    text = group.get("rayStartParams", {}).get("resources", "{}").strip("'\"` ")
    return {name: float(number) for name, number in json.loads(text).items()}


def kuberay_finds_its_pods(found: list[Object]) -> Iterator[str]:
    """Where a template overrides a label that KubeRay selects by, the Service of the head has no endpoints."""
    for name, group in ray_groups(one(found, "RayService")):
        for key in group["template"]["metadata"]["labels"]:
            if key in KUBERAY_LABELS or key.startswith("ray.io/"):
                yield f"{name}: label {key} is KubeRay's"


def settings_start_a_new_cluster(found: list[Object]) -> Iterator[str]:
    """KubeRay applies a change of serveConfigV2 alone in place, which is an outage: the head's template has its sum."""
    spec = one(found, "RayService")["spec"]
    template = spec["rayClusterConfig"]["headGroupSpec"]["template"]
    known = template["metadata"].get("annotations", {}).get("outcrop-settings")
    has_room = spec["upgradeStrategy"]["type"] != "None"
    if has_room and known != hashlib.sha256(spec["serveConfigV2"].rstrip("\n").encode()).hexdigest():
        yield "headGroupSpec.template: the annotation outcrop-settings is not the SHA-256 of serveConfigV2"


def the_head_closes_at_once(found: list[Object]) -> Iterator[str]:
    """On SIGTERM Ray drains a node for 30 s (ray/_private/node.py) while the head still answers: outcrop-linger would
    take the end of a cluster for that of a pod.
    """
    head = dict(ray_groups(one(found, "RayService")))["head"]
    env = {each["name"]: each.get("value") for each in head["template"]["spec"]["containers"][0].get("env", ())}
    if env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") != "0":
        yield "head: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S is not 0"


def labels_are_labels(found: list[Object]) -> Iterator[str]:
    """Node labels go into the group's `labels`; KubeRay refuses rayStartParams.labels and values that are no labels."""
    for name, group in ray_groups(one(found, "RayService")):
        if "labels" in group.get("rayStartParams", {}):
            yield f"{name}: rayStartParams.labels: use the group's labels"
        for key, value in group.get("labels", {}).items():
            if len(value) > 63 or not LABEL_VALUE.fullmatch(value):
                yield f"{name}: label {key}={value}"


def groups_make_sense(found: list[Object]) -> Iterator[str]:
    """Group names become labels and must differ; replicas outside of min and max are corrected at once."""
    groups = _cluster(found).get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    yield from (f"group {name} comes twice" for name in sorted(set(names)) if names.count(name) > 1)
    for group in groups:
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not low <= group.get("replicas", 0) <= high:
            yield f"{group['groupName']}: replicas {group.get('replicas', 0)} is not within {low} and {high}"


def autoscaler_v2_owns_restarts(found: list[Object]) -> Iterator[str]:
    """Autoscaler v2 replaces pods itself: KubeRay refuses a restartPolicy other than Never, and the v1 switch."""
    cluster = _cluster(found)
    is_v2 = cluster.get("enableInTreeAutoscaling") and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    for name, group in ray_groups(one(found, "RayService")):
        if is_v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy must be unset"
        if (group.get("priority") or group.get("idleTimeoutSeconds")) and not (
            is_v2 and _ray_version(found) >= (2, 56)
        ):
            yield f"{name}: priority and idleTimeoutSeconds need autoscaler v2 and rayVersion 2.56"
    if "RAY_enable_autoscaler_v2" in _head_environment(found):
        yield "RAY_enable_autoscaler_v2 in the head's environment: use autoscalerOptions.version"


def redis_is_said_once(found: list[Object]) -> Iterator[str]:
    """With gcsFaultToleranceOptions KubeRay sets these itself, and without it refuses them as half a configuration."""
    params = _cluster(found)["headGroupSpec"].get("rayStartParams", {})
    for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"):
        if name in _head_environment(found):
            yield f"{name} in the head's environment: use gcsFaultToleranceOptions"
    for name in ("redis-password", "redis-username"):
        if name in params:
            yield f"{name} in the head's rayStartParams: use gcsFaultToleranceOptions"
    for name in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if name in one(found, "RayService")["metadata"].get("annotations", {}):
            yield f"annotation {name}: use gcsFaultToleranceOptions"


def upgrade_is_one_that_works(found: list[Object]) -> Iterator[str]:
    """The CRD takes any string; and an incremental upgrade scales Serve replicas, which fronts and experts are not."""
    kind = one(found, "RayService")["spec"].get("upgradeStrategy", {}).get("type", "NewCluster")
    if kind not in UPGRADE_TYPES:
        yield f"upgradeStrategy.type {kind} is none of {', '.join(UPGRADE_TYPES)}"
    if kind == "NewClusterWithIncrementalUpgrade":
        yield f"upgradeStrategy.type {kind}: fronts and expert replicas don't follow target_capacity"
    if _cluster(found)["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headGroupSpec.headService.metadata.name must not be set"


def _cluster(found: list[Object]) -> Object:
    return one(found, "RayService")["spec"]["rayClusterConfig"]


def _ray_version(found: list[Object]) -> tuple[int, ...]:
    return tuple(int(part) for part in _cluster(found).get("rayVersion", "0.0").split("."))


def _head_environment(found: list[Object]) -> set[str]:
    head = _cluster(found)["headGroupSpec"]["template"]["spec"]["containers"][0]
    return {each["name"] for each in head.get("env", ())}


RULES = (
    name_leaves_room,
    initializing_timeout_is_a_duration,
    head_offers_no_cpu,
    head_names_the_serve_port,
    token_authentication_is_on,
    resources_are_named_once,
    custom_resources_are_readable,
    kuberay_finds_its_pods,
    settings_start_a_new_cluster,
    the_head_closes_at_once,
    labels_are_labels,
    groups_make_sense,
    autoscaler_v2_owns_restarts,
    redis_is_said_once,
    upgrade_is_one_that_works,
)
