"""Rules for each pod by itself, see rules.py."""

import re
from collections.abc import Iterator

from tests.k8s.manifests import Object, containers, one, pod_templates, ray_groups

API_KEY = "OUTCROP_API_KEY"
RAY_SETTINGS = {"RAY_max_direct_call_object_size"}
STOP_MARGIN_S = 30
# Ray's own drain of a node, on the SIGTERM after preStop (ray/_private/node.py): default.
RAY_DRAIN, RAY_DRAIN_S = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30
DRAIN, LINGER = "outcrop-drain", "outcrop-linger"
# Ray's processes end when they have not reached the head for this long, by default.
RECONNECT, RECONNECT_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60


def pods_are_restricted(found: list[Object]) -> Iterator[str]:
    """Namespaces that enforce the Pod Security Standard `restricted` refuse anything else, and so do we."""
    for where, template in _pods(found):
        pod = template["spec"].get("securityContext", {})
        if not pod.get("runAsNonRoot") or pod.get("runAsUser") == 0:
            yield f"{where}: may run as root"
        if pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{where}: no seccompProfile RuntimeDefault"
        for container in containers(template):
            if not _is_confined(container.get("securityContext", {})):
                yield f"{where} {container['name']}: escalation is allowed or capabilities are kept"
    for service in (each for each in found if each["kind"] == "RayService"):
        cluster = service["spec"]["rayClusterConfig"]
        added = cluster.get("autoscalerOptions", {}).get("securityContext", {})
        if cluster.get("enableInTreeAutoscaling") and not _is_confined(added):
            yield "autoscalerOptions.securityContext: the container that KubeRay adds to the head is not restricted"


def _is_confined(context: Object) -> bool:
    drops = context.get("capabilities", {}).get("drop", ())
    return context.get("allowPrivilegeEscalation") is False and "ALL" in drops and not context.get("privileged")


def containers_have_bounds(found: list[Object]) -> Iterator[str]:
    """Ray counts a pod's CPUs, memory and GPUs from its limits; memory requested below its limit gets pods killed."""
    for where, template in _pods(found):
        for container in containers(template):
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            if not {"cpu", "memory"} <= set(requests) or not {"cpu", "memory"} <= set(limits):
                yield f"{where} {container['name']}: cpu and memory need requests and limits"
            for name in (set(requests) | set(limits)) - {"cpu"}:
                if (least := requests.get(name)) != (most := limits.get(name)):
                    yield f"{where} {container['name']}: {name} is requested as {least} of {most}"


def images_are_pinned(found: list[Object]) -> Iterator[str]:
    """`latest`, or no tag, makes pods of one cluster differ: Ray refuses to connect other versions."""
    for where, template in _pods(found):
        for container in containers(template):
            _, _, tag = container["image"].rpartition("/")[2].partition(":")
            if tag in ("", "latest"):
                yield f"{where} {container['name']}: image {container['image']} has no fixed tag"


def services_leave_settings_alone(found: list[Object]) -> Iterator[str]:
    """Kubernetes sets OUTCROP_* variables for a Service called outcrop-*; OUTCROP_* variables are settings."""
    for where, template in _pods(found):
        if template["spec"].get("enableServiceLinks") is not False:
            yield f"{where}: enableServiceLinks is not false"


def only_who_needs_it_may_ask_the_api_server(found: list[Object]) -> Iterator[str]:
    """Only the autoscaler, in the head, has business with the API server."""
    for service in (each for each in found if each["kind"] == "RayService"):
        for name, group in ray_groups(service):
            mounts = group["template"]["spec"].get("automountServiceAccountToken", True)
            is_needed = name == "head" and bool(service["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling"))
            if mounts is not is_needed:
                yield f"{name}: automountServiceAccountToken is {mounts}"


def ray_containers_have_the_same_settings(found: list[Object]) -> Iterator[str]:
    """Serve builds the application, which reads the API key, on any node; Ray's settings must agree on all nodes."""
    groups = list(ray_groups(one(found, "RayService")))
    is_keyed = any(API_KEY in _environment(group) for _, group in groups)
    for name, group in groups:
        if missing := RAY_SETTINGS.union({API_KEY} if is_keyed else ()) - set(_environment(group)):
            yield f"{name}: {', '.join(sorted(missing))} is not in the environment"


def the_api_key_is_not_optional(found: list[Object]) -> Iterator[str]:
    """Where the name of an optional Secret is misspelt, pods start without the key and serve everybody."""
    for where, template in _pods(found):
        for container in containers(template):
            for each in container.get("env", ()):
                if each["name"] == API_KEY and each.get("valueFrom", {}).get("secretKeyRef", {}).get("optional"):
                    yield f"{where} {container['name']}: {API_KEY} is optional: apiKey.secretName: null says so openly"


def secrets_are_no_arguments(found: list[Object]) -> Iterator[str]:
    """Everybody on a node can read the arguments of its processes."""
    for where, template in _pods(found):
        for container in containers(template):
            secret = {e["name"] for e in container.get("env", ()) if "secretKeyRef" in e.get("valueFrom", {})}
            used = re.findall(r"\$\((\w+)\)", " ".join([*container.get("command", ()), *container.get("args", ())]))
            for name in sorted(secret.intersection(used)):
                yield f"{where} {container['name']}: $({name}) of a Secret is among the arguments"


def workers_say_when_they_are_ready(found: list[Object]) -> Iterator[str]:
    """KubeRay's own probe asks for an HTTP proxy only: too little for pods that serve, never true for the others. A
    budget counts ready pods: one whose actor still loads must not count.
    """
    for name, group in _workers(found):
        wanted = "http" if _serves_http(group) else "actor"
        probe = group["template"]["spec"]["containers"][0].get("readinessProbe", {})
        if probe.get("exec", {}).get("command") != ["outcrop-ready", wanted]:
            yield f"{name}: the readiness probe is not `outcrop-ready {wanted}`"


def pods_that_serve_drain(found: list[Object]) -> Iterator[str]:
    """preStop must wait for requests. Ray drains after it, for those that other pods have sent; the rest is its end."""
    for name, group in _workers(found):
        pod = group["template"]["spec"]
        script, seconds = _pre_stop(group)
        if _serves_http(group) and script != DRAIN:
            yield f"{name}: serves HTTP and has no preStop that drains"
        least = seconds + int(_environment(group).get(RAY_DRAIN) or RAY_DRAIN_S) + STOP_MARGIN_S
        if pod.get("terminationGracePeriodSeconds", 30) < least:
            yield f"{name}: terminationGracePeriodSeconds is less than {least}: drains, and {STOP_MARGIN_S} s"


def drains_outlive_the_head(found: list[Object]) -> Iterator[str]:
    """A cluster's pods are all told to stop at once. Who serves HTTP finishes its requests, and needs the others."""
    longest = max((_pre_stop(group)[1] for _, group in _workers(found) if _serves_http(group)), default=0)
    for name, group in _workers(found):
        script, seconds = _pre_stop(group)
        if not _serves_http(group) and (script != LINGER or seconds < longest):
            yield f"{name}: does not stay for the {longest} s that others drain: preStop [{LINGER}, {longest}]"
        if int(_environment(group).get(RECONNECT) or RECONNECT_S) < longest:
            yield f"{name}: lives less than {longest} s without the head: {RECONNECT}"


def _pods(found: list[Object]) -> Iterator[tuple[str, Object]]:
    for each in found:
        yield from pod_templates(each)


def _workers(found: list[Object]) -> Iterator[tuple[str, Object]]:
    return (each for each in ray_groups(one(found, "RayService")) if each[0] != "head")


def _pre_stop(group: Object) -> tuple[str, int]:
    """Script and seconds."""
    hook = group["template"]["spec"]["containers"][0].get("lifecycle", {}).get("preStop", {})
    script, seconds = hook.get("exec", {}).get("command", ["", "0"])
    return script, int(seconds)


def _environment(group: Object) -> dict[str, str | None]:
    """Of the Ray container: names and values, None for those from Secrets."""
    return {each["name"]: each.get("value") for each in group["template"]["spec"]["containers"][0].get("env", ())}


def _serves_http(group: Object) -> bool:
    return group["template"]["metadata"]["labels"].get("outcrop-http") == "true"


RULES = (
    pods_are_restricted,
    containers_have_bounds,
    images_are_pinned,
    services_leave_settings_alone,
    only_who_needs_it_may_ask_the_api_server,
    ray_containers_have_the_same_settings,
    the_api_key_is_not_optional,
    secrets_are_no_arguments,
    workers_say_when_they_are_ready,
    pods_that_serve_drain,
    drains_outlive_the_head,
)
